"""The doctor's checks of a job's probe, a function for each finding."""

from argparse import Namespace
from functools import partial
from pathlib import Path

import numpy as np

from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.core.writable import unwritable
from megatron_tokscale.corpus.source import DataSource
from megatron_tokscale.data import Plan, match_datasets
from megatron_tokscale.data.document_strata import documents_of_strata
from megatron_tokscale.data.plan_scores import scores_of_plan
from megatron_tokscale.data.scores import identity_of
from megatron_tokscale.doctor.findings import (
    OF_THE_CHECKPOINT,
    Findings,
    known_arguments,
    takes_arguments,
)
from megatron_tokscale.probe import ProbeSchedule, ProbeSet
from megatron_tokscale.store import RunWriter
from megatron_tokscale.training.data.held_out import TrainedPart, held_out, other_strata
from megatron_tokscale.training.probe.size import model_info
from megatron_tokscale.training.replay import saved_steps, wanted_steps
from megatron_tokscale.training.samples.replayed import checkpoint_before
from megatron_tokscale.training.settings import JobPlanSettings, JobProbeSettings, JobSettings
from megatron_tokscale.training.support import (
    probe_refusals,
    probe_set_misfits,
    repeated_probe_sets,
    replayed_step_refusals,
    sample_refusals,
)


def check_probe(
    probe: JobProbeSettings,
    settings: JobSettings,
    run: Path | None,
    args: Namespace,
    findings: Findings,
) -> None:
    """Note the findings on a job's probe.

    Args:
        probe: settings of the probe.
        settings: settings of the job.
        run: the run directory; None if it is refused.
        args: Megatron's arguments, not validated by it.
        findings: takes the findings.
    """
    _check_support(args, findings)
    if probe.records_samples:
        findings.refused += sample_refusals(args)
    schedule = findings.attempt(lambda: probe.schedule)
    if settings.replay:
        _check_checkpoints(settings.replay, schedule, probe.replayed_step, findings)
    if probe.replayed_step is not None:
        findings.refused += replayed_step_refusals(args)
    vocab_size, loaded = _vocab_size(args, findings), {}
    for file in findings.attempt(lambda: probe.probe_sets) or ():
        probe_set = findings.attempt(partial(ProbeSet.load, file.path))
        if probe_set is None:
            continue
        loaded[str(file.path)] = probe_set
        if _fits(file.path, probe_set, vocab_size, args, findings):
            is_trained = settings.replay is None
            state = _check_held_out(probe_set, settings.plan, args, findings) if is_trained else ""
            findings.passed.append(
                f"probe set {file.path} fits: {probe_set.n_tokens} tokens in "
                f"{probe_set.n_sequences} sequences, vocabulary {probe_set.vocab_size}{state}"
            )
        if run is not None:
            _check_run_directory(probe, file.directory(run), probe_set, args, findings)
    findings.refused += repeated_probe_sets(loaded)


def _check_support(args: Namespace, findings: Findings) -> None:
    """Refuse settings of Megatron's under which a probe would be wrong."""
    refusals = probe_refusals(known_arguments(args, findings))
    findings.refused += refusals
    if not refusals:
        findings.passed.append("the probe supports all of Megatron's settings")


def _check_checkpoints(
    folder: Path, schedule: ProbeSchedule | None, replayed: int | None, findings: Findings
) -> None:
    """Look for the checkpoints that a replay is to probe, and for that of a replayed step."""
    saved = findings.attempt(lambda: saved_steps(folder))
    if saved and replayed is not None:
        findings.attempt(lambda: checkpoint_before(saved, replayed))
    if not saved or schedule is None:
        return
    findings.attempt(lambda: wanted_steps(folder, saved, schedule))
    findings.unchecked.append(f"whether the {len(saved)} checkpoints in {folder} can be loaded")


def _fits(
    path: Path, probe_set: ProbeSet, vocab_size: int | None, args: Namespace, findings: Findings
) -> bool:
    """Compare a probe set with the job's sequence length and vocabulary; return whether it fits.

    Args:
        path: the file of the probe set.
        probe_set: its content.
        vocab_size: size of the job's vocabulary; None if it is not known.
        args: Megatron's arguments, not validated by it.
        findings: takes the findings.
    """
    misfits = probe_set_misfits(probe_set, str(path), args.seq_length, vocab_size)
    findings.refused += misfits
    if args.seq_length is None:
        findings.unchecked.append(
            f"the sequence length: no --seq-length is given, that of probe set {path} is "
            f"{probe_set.seq_length}"
        )
    return not misfits


def _check_held_out(
    probe_set: ProbeSet, plan: JobPlanSettings | None, args: Namespace, findings: Findings
) -> str:
    """Note whether the watched tokens are held out; if they are, return the end of the line."""
    try:
        parts = None if args.mock_data else _trained_parts(plan, args)
    except TokscaleError as error:
        findings.unchecked.append(f"whether the watched tokens are held out: {error}")
        return ""
    finding = held_out(probe_set, parts)
    if finding.state == "held out":
        return f"; {finding.line}"
    replans = plan is not None and plan.steps_between_decisions is not None
    if replans and (refusal := other_strata(probe_set, finding)):
        findings.refused.append(refusal)
        return ""
    is_trained_on = finding.state == "trained on"
    (findings.warned if is_trained_on else findings.unchecked).append(finding.line)
    return ""


def _trained_parts(settings: JobPlanSettings | None, args: Namespace) -> list[TrainedPart]:
    """Return the documents that the job trains on: of a plan without those that it keeps out.

    Raises:
        TokscaleError: the data, the plan or its scores cannot be read, or do not fit together.
    """
    portions = DataSource.from_flags(args).portions("train")
    parts = [TrainedPart(row.tokens.prefix, row.sequences) for row in portions]
    if settings is None:
        return parts
    plan = Plan.load(settings.path)
    identities = [identity_of(row.tokens) for row in portions]
    order = match_datasets(plan, identities, plan.seq_length, 0)
    for dataset, (place, cut) in enumerate(zip(order, plan.cuts, strict=True)):
        if place is None or cut is None or not cut.held_out:
            continue
        tokens, documents = portions[place].tokens, portions[place].sequences
        scores = scores_of_plan(plan, dataset, tokens.prefix, documents, settings.scores_dir)
        bounds = documents.start, documents.stop
        strata = documents_of_strata(plan, dataset, scores, bounds, tokens.lengths)
        parts[place] = TrainedPart(tokens.prefix, np.sort(np.concatenate(strata)))
    return parts


def _check_run_directory(
    probe: JobProbeSettings, run: Path, probe_set: ProbeSet, args: Namespace, findings: Findings
) -> None:
    """Note whether a probe set's run directory is this run's or new, free, and writable."""
    writer, n_refused = RunWriter(run), len(findings.refused)
    findings.attempt(lambda: writer.check(probe_set, _known_sizes(args)))
    if findings.attempt(writer.check_free) is False:
        findings.unchecked.append(f"whether another job has {writer.paths.folder}")
    paths = writer.paths
    files = (paths.losses / "a", paths.lock, paths.journal, paths.folder / "a")
    reasons = [unwritable(file.parent, file.name) for file in files]
    if reason := next(filter(None, reasons), None):
        message = f"losses cannot be written to {writer.paths.folder}: {reason}"
        if probe.stops_on_write_error:
            findings.refused.append(message)
        else:
            findings.warned.append(f"{message}; training continues WITHOUT probes")
    elif len(findings.refused) == n_refused:
        is_new = not paths.identity.exists()
        state = "is new" if is_new else "holds a run of this probe set and model"
        findings.passed.append(f"run directory {writer.paths.folder} {state}")


def _known_sizes(args: Namespace) -> dict[str, int | None]:
    """Return the model's sizes that the flags give; Megatron's validation fills in the others."""
    sizes = model_info(args)
    told = {"num_experts"}  # without the flag the model has none
    if takes_arguments(args):
        sizes |= dict.fromkeys(OF_THE_CHECKPOINT)
        told -= {*OF_THE_CHECKPOINT}
    return {name: value for name, value in sizes.items() if value is not None or name in told}


def _vocab_size(args: Namespace, findings: Findings) -> int | None:
    """Return the size of the job's vocabulary without padding; None if this machine cannot tell."""
    if args.vocab_size:
        return int(args.vocab_size)
    if takes_arguments(args) and getattr(args, "use_tokenizer_model_from_checkpoint_args", True):
        findings.unchecked.append("the vocabulary: the tokenizer is the checkpoint's")
        return None
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer

    try:
        return int(build_tokenizer(args).vocab_size)
    except Exception as error:  # a tokenizer may need files or a network that are elsewhere
        findings.unchecked.append(
            f"the vocabulary: the tokenizer cannot be built here ({type(error).__name__})"
        )
        return None
