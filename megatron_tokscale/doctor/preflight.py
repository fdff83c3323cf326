"""The reasons for which a job with given flags would be refused, found without starting it.

Neither torch.distributed nor a GPU is needed: the flags are read by Megatron's own parser, and not
validated by it. Each check is the function that the job calls; what needs the job's processes, its
checkpoint's arguments or files that are elsewhere is listed as not checked. Nothing is written.
"""

import errno
import os
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, TypeVar

from megatron_tokscale import cpu
from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.core.files import is_there
from megatron_tokscale.corpus.bin_idx import Portion
from megatron_tokscale.corpus.source import DEFAULT_SPLIT, DataSource
from megatron_tokscale.data import Plan, match_datasets, with_decisions
from megatron_tokscale.data.history import resume
from megatron_tokscale.data.match import check_documents
from megatron_tokscale.data.record import DatasetRecord, check_order, load_records, record_path
from megatron_tokscale.data.scores import identity_of
from megatron_tokscale.data.strata import Strata
from megatron_tokscale.probe import Moment, ProbeSchedule, ProbeSet
from megatron_tokscale.store import RunPaths, RunWriter
from megatron_tokscale.training.config import (
    TokscaleConfig,
    config_from_args,
    run_directory,
    schedule_of,
)
from megatron_tokscale.training.data.held_out import TrainedPart, held_out
from megatron_tokscale.training.data.provider import PARTS_UNKNOWN
from megatron_tokscale.training.data.replan import check_interval
from megatron_tokscale.training.gpt_flags import flag_refusals, megatron_parser
from megatron_tokscale.training.history.checkpoint import start_of
from megatron_tokscale.training.probe.prober import model_info
from megatron_tokscale.training.replay import check_schedule, saved_steps
from megatron_tokscale.training.support import (
    SKIP_TRAIN,
    plan_misfits,
    plan_refusals,
    probe_refusals,
    probe_set_misfits,
    scores_of_plan,
)

Result = TypeVar("Result")

# What --use-checkpoint-args takes from the checkpoint even where the command line gives it.
_OF_THE_CHECKPOINT: Final = ("position_embedding_type", "num_experts")


@dataclass
class Findings:
    """What was found in a job's flags, a line each.

    Attributes:
        refused: for what the job would be refused.
        warned: what the job would say and go on.
        passed: what was checked and is right.
        unchecked: what only the job itself can check.
    """

    refused: list[str] = field(default_factory=list)
    warned: list[str] = field(default_factory=list)
    passed: list[str] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)

    def attempt(self, read: Callable[..., Result], *args: Any, **kwargs: Any) -> Result | None:
        """Read something, or note why it is refused."""
        try:
            return read(*args, **kwargs)
        except (TokscaleError, OSError) as error:
            self.refused.append(" ".join(str(error).split()))
            return None


def check_flags(words: Sequence[str], *, is_own_script: bool = True) -> Findings:
    """Check the flags of a job: Megatron's and ours, as they stand on its command line.

    Args:
        words: the flags.
        is_own_script: the job is `-m megatron_tokscale.pretrain`, not a script of the user's.
    """
    findings = Findings()
    parsed = findings.attempt(_parse, words)
    if parsed is None:
        return findings
    args, unknown = parsed
    _check_unknown(unknown, findings, is_own_script=is_own_script)
    if is_own_script:
        findings.refused += flag_refusals(megatron_parser(), words)
    _check_devices(args, findings)
    config = findings.attempt(config_from_args, args)
    if config is None:
        return findings
    has_part = config.tokscale_probe_set or config.tokscale_plan
    if has_part and args.skip_train and not config.tokscale_replay:
        findings.warned.append(SKIP_TRAIN)
    elif has_part:
        folder = findings.attempt(run_directory, config, args)
        if config.tokscale_probe_set:
            _check_probe(config, config.tokscale_probe_set, folder, args, findings)
        if config.tokscale_plan:
            _check_plan(config, config.tokscale_plan, folder, args, findings)
        if not is_own_script:
            findings.unchecked.append(
                "the script: its forward step must return the losses of the batch that it is given"
                + (", its datasets provider run on every rank" if config.tokscale_plan else "")
            )
    else:
        findings.passed.append("no --tokscale-probe-set and no --tokscale-plan: nothing is wrapped")
    findings.unchecked.append(
        "Megatron's own validation of its flags, which needs the job's processes and devices"
    )
    return findings


def _parse(words: Sequence[str]) -> tuple[Namespace, list[str]]:
    parser = megatron_parser()
    try:
        args, unknown = parser.parse_known_args(list(words))
    except (KeyError, AssertionError) as error:  # from Megatron's own readers of values
        raise TokscaleError(f"Megatron cannot read a value among the flags: {error!r}") from error
    args.seq_length = args.seq_length or getattr(args, "encoder_seq_length", None)
    return args, unknown


def _check_unknown(unknown: Sequence[str], findings: Findings, *, is_own_script: bool) -> None:
    flags = [word for word in unknown if word.startswith("--")]
    ours = [flag for flag in flags if is_own_script or flag.startswith("--tokscale-")]
    findings.refused += [f"there is no flag {flag}" for flag in ours]
    others = [flag for flag in flags if flag not in ours]
    if others:
        findings.unchecked.append(
            f"{', '.join(others)}: not among this Megatron's flags, so the script must add them"
        )


def _check_devices(args: Namespace, findings: Findings) -> None:
    import torch

    n_devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    is_on_cpu = args.tokscale_cpu or cpu.is_requested(())
    if is_on_cpu and n_devices:
        findings.refused.append(cpu.gpu_refusal(n_devices))
    if not is_on_cpu and not n_devices:
        findings.unchecked.append(f"a GPU: this machine has none, and {cpu.FLAG} is not given")


def _takes_arguments(args: Namespace) -> bool:
    """Return True if the job takes arguments from its checkpoint."""
    return bool(getattr(args, "use_checkpoint_args", False))


def _given(args: Namespace, findings: Findings) -> Namespace:
    """Return the arguments without those that the checkpoint decides, which are not checked."""
    if not _takes_arguments(args):
        return args
    given = Namespace(**vars(args))
    names = [name for name in _OF_THE_CHECKPOINT if getattr(args, name, None) is not None]
    for name in names:
        setattr(given, name, None)
    brought = "what --use-checkpoint-args brings from the checkpoint"
    if brought not in findings.unchecked:
        findings.unchecked.append(brought)
    return given


def _check_probe(
    config: TokscaleConfig, path: str, folder: Path | None, args: Namespace, findings: Findings
) -> None:
    refusals = probe_refusals(_given(args, findings))
    findings.refused += refusals
    if not refusals:
        findings.passed.append("the probe supports all of Megatron's settings")
    schedule = findings.attempt(schedule_of, config, args)
    if config.tokscale_replay:
        _check_replay(Path(config.tokscale_replay), schedule, findings)
    probe_set = findings.attempt(ProbeSet.load, Path(path))
    if probe_set is None:
        return
    vocab_size = _vocab_size(args, findings)
    misfits = probe_set_misfits(probe_set, path, args.seq_length, vocab_size)
    findings.refused += misfits
    if args.seq_length is None:
        findings.unchecked.append(
            f"the sequence length: no --seq-length is given, the probe set's is "
            f"{probe_set.seq_length}"
        )
    if not misfits:
        findings.passed.append(
            f"probe set {path} fits: {probe_set.n_tokens} tokens in {probe_set.n_sequences} "
            f"sequences, vocabulary {probe_set.vocab_size}"
            + ("" if config.tokscale_replay else _held_out(probe_set, args, findings))
        )
    if folder is not None:
        _check_run(config, folder, probe_set, args, findings)


def _check_replay(folder: Path, schedule: ProbeSchedule | None, findings: Findings) -> None:
    saved = findings.attempt(saved_steps, folder)
    if not saved or schedule is None:
        return

    def is_on_schedule(step: int, *, is_last: bool) -> bool:
        moment = Moment(step=step, is_checkpoint=True, is_last=is_last, tokens_before=0)
        return schedule.is_due(moment)

    findings.attempt(check_schedule, folder, saved, is_on_schedule)
    findings.unchecked.append(f"whether the {len(saved)} checkpoints in {folder} can be loaded")


def _held_out(probe_set: ProbeSet, args: Namespace, findings: Findings) -> str:
    """Note whether the watched tokens are held out; return what to add where they are."""
    if args.mock_data:
        parts = None
    else:
        try:
            portions = DataSource.from_flags(args).portions("train")
        except TokscaleError as error:
            findings.unchecked.append(f"whether the watched tokens are held out: {error}")
            return ""
        parts = [
            TrainedPart(row.tokens.prefix, row.sequences.start, row.sequences.stop)
            for row in portions
        ]
    found = held_out(probe_set, parts)
    if found.state == "held out":
        return f"; {found.line}"
    (findings.warned if found.state == "trained on" else findings.unchecked).append(found.line)
    return ""


def _check_run(
    config: TokscaleConfig,
    folder: Path,
    probe_set: ProbeSet,
    args: Namespace,
    findings: Findings,
) -> None:
    writer, n_refused = RunWriter(folder), len(findings.refused)
    findings.attempt(writer.check, probe_set, _known_model(args))
    if findings.attempt(writer.check_free) is False:
        findings.unchecked.append(f"whether another job has {writer.folder}")
    paths = writer.paths
    files = (paths.losses / "a", paths.lock, paths.journal, paths.folder / "a")
    reasons = [_unwritable(file.parent, file.name) for file in files]
    if reason := next(filter(None, reasons), None):
        message = f"losses cannot be written to {writer.folder}: {reason}"
        if config.tokscale_replay or config.tokscale_on_write_error == "abort":
            findings.refused.append(message)
        else:
            findings.warned.append(f"{message}; training goes on WITHOUT probes")
    elif len(findings.refused) == n_refused:
        is_new = not writer.paths.identity.exists()
        what = "is new" if is_new else "holds a run of this probe set and model"
        findings.passed.append(f"run directory {writer.folder} {what}")


def _known_model(args: Namespace) -> Mapping[str, Any]:
    """Return what the job's flags tell of its model; Megatron's validation fills in the rest."""
    model = model_info(args)
    if _takes_arguments(args):
        model |= dict.fromkeys(_OF_THE_CHECKPOINT)
    is_told = {"num_experts"} - ({*_OF_THE_CHECKPOINT} if _takes_arguments(args) else set())
    return {name: value for name, value in model.items() if value is not None or name in is_told}


def _unwritable(folder: Path, name: str) -> str | None:
    """Return the error with which this user would fail to make or replace a file; None for none."""
    try:
        return _obstacle(folder, name)
    except OSError as error:  # a folder that this user may not enter, a name that is too long
        return str(error)


def _obstacle(folder: Path, name: str) -> str | None:
    if not folder.exists():
        path = next(path for path in (folder, *folder.parents) if path.parent.exists())
        if not path.parent.is_dir():
            return f"[Errno {errno.ENOTDIR}] Not a directory: '{folder}'"
    elif not folder.is_dir():
        return f"[Errno {errno.EEXIST}] File exists: '{folder}'"
    else:
        path = folder / name
    place = path if path.is_file() else path.parent
    if os.access(place, os.W_OK | (os.X_OK if place.is_dir() else 0)):
        return None
    return f"[Errno {errno.EACCES}] Permission denied: '{path}'"


def _vocab_size(args: Namespace, findings: Findings) -> int | None:
    """Return the size of the job's vocabulary without padding; None if this machine cannot tell."""
    if args.vocab_size:
        return int(args.vocab_size)
    if _takes_arguments(args) and getattr(args, "use_tokenizer_model_from_checkpoint_args", True):
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


def _check_plan(
    config: TokscaleConfig, path: str, folder: Path | None, args: Namespace, findings: Findings
) -> None:
    refusals = plan_refusals(_given(args, findings))
    findings.refused += refusals
    if config.tokscale_replan_interval is not None:
        findings.attempt(check_interval, config.tokscale_replan_interval)
    plan = findings.attempt(Plan.load, Path(path))
    if plan is None:
        return
    misfits = [] if args.seq_length is None else plan_misfits(plan, path, args.seq_length)
    findings.refused += misfits
    if args.seq_length is None:
        findings.unchecked.append(
            f"the sequence length: no --seq-length is given, the plan's is {plan.seq_length}"
        )
    if folder is not None:
        place = RunPaths(folder).folder
        if reason := _unwritable(place, "a"):
            findings.refused.append(f"the plan cannot be kept in {place}: {reason}")
        _check_followed(config, plan, folder, args, findings, is_good=not refusals + misfits)


def _check_followed(
    config: TokscaleConfig,
    given: Plan,
    folder: Path,
    args: Namespace,
    findings: Findings,
    *,
    is_good: bool,
) -> None:
    """Hold a plan against what its run has consumed, and against the job's data."""
    start = start_of(args)
    if start is None:
        findings.unchecked.append(
            f"where the job goes on, and so whether plan {given.fingerprint} keeps the run's past: "
            f"the checkpoint in {args.load} cannot be read here"
        )
        return
    accept = config.tokscale_override_plan
    settled = findings.attempt(resume, given, folder, start.consumed, start.step, accept=accept)
    path = record_path(folder)
    if is_there(path) and (error := _error_of(load_records, path)):
        if start.consumed:
            findings.refused.append(error)
        else:
            where = findings.unchecked if config.tokscale_probe_set else findings.refused
            where.append(f"the plan cannot be kept in {path.parent}: {error}")
    if settled is None or not is_good:
        return
    findings.passed.append(f"plan {config.tokscale_plan} can be followed")
    plan = with_decisions(*settled)
    try:
        portions = DataSource.from_flags(args).portions("train")
    except TokscaleError as error:
        findings.unchecked.append(f"whether the job's datasets are those of the plan: {error}")
        return
    if not plan.documents:
        findings.unchecked.append(PARTS_UNKNOWN)
    _check_planned_data(plan, portions, config, start.consumed, args, findings)


def _error_of(read: Callable[..., Any], *args: Any) -> str | None:
    try:
        read(*args)
    except TokscaleError as error:
        return str(error)
    return None


def _check_planned_data(
    plan: Plan,
    portions: Sequence[Portion],
    config: TokscaleConfig,
    consumed: int,
    args: Namespace,
    findings: Findings,
) -> None:
    n_refused = len(findings.refused)
    identities = [identity_of(portion.tokens) for portion in portions]
    order = findings.attempt(match_datasets, plan, identities, plan.seq_length, consumed)
    if order is None:
        return
    bounds = [(portion.sequences.start, portion.sequences.stop) for portion in portions]
    findings.attempt(check_documents, plan, order, bounds)
    folder = run_directory(config, args)
    if consumed and _error_of(load_records, record_path(folder)) is None:
        findings.attempt(check_order, record_path(folder), _records(portions, args))
    # Of a plan that no job has followed yet every dataset that is drawn from is there.
    chosen = [None if place is None else portions[place] for place in order]
    _check_scores(plan, chosen, config, folder, args, findings)
    sizes_D = [
        0 if part is None else max(part.n_tokens - 1, 0) // plan.seq_length for part in chosen
    ]
    cache = Path(args.data_cache_path or RunPaths(folder).cache)
    if reason := _unwritable(cache, "a"):
        findings.unchecked.append(
            f"whether the plan's index is in the data cache {cache}, which cannot be written: "
            f"{reason}"
        )
    n_samples = _train_samples(args)
    if n_samples is None:
        findings.unchecked.append(
            "how often each stratum is gone through: the samples of the job are not known from "
            "--train-samples, nor from --train-iters with --global-batch-size"
        )
        return
    strata = Strata(plan, sizes_D, [None] * len(sizes_D))
    findings.attempt(strata.check, plan, n_samples, consumed)
    if len(findings.refused) == n_refused:
        findings.passed.append(
            f"the job's datasets are those of the plan, and {n_samples} samples repeat no stratum "
            "more often than it allows"
        )


def _check_scores(
    plan: Plan,
    chosen: Sequence[Portion | None],
    config: TokscaleConfig,
    folder: Path,
    args: Namespace,
    findings: Findings,
) -> None:
    cache = Path(args.data_cache_path or RunPaths(folder).cache)
    for dataset, portion in enumerate(chosen):
        if portion is None or plan.cuts[dataset] is None:
            continue
        prefix, documents = portion.tokens.prefix, portion.sequences
        error = _error_of(
            scores_of_plan, plan, dataset, prefix, documents, config.tokscale_scores_dir
        )
        if error and any(cache.glob("tokscale-*-ranked.npy")):
            findings.unchecked.append(f"whether the strata are in {cache} already; else: {error}")
        elif error:
            findings.refused.append(" ".join(error.split()))


def _records(portions: Sequence[Portion], args: Namespace) -> list[DatasetRecord]:
    """Return what the job will note of its datasets, as far as their order goes."""
    is_split = any((args.data_path, args.data_args_path))
    split = (args.split or DEFAULT_SPLIT) if is_split else None
    order = DatasetRecord.order_of(args.seed, split)
    return [replace(DatasetRecord.unused(row.tokens.prefix), order=order) for row in portions]


def _train_samples(args: Namespace) -> int | None:
    """Return the samples of the whole job; None where Megatron's validation decides them."""
    if getattr(args, "phase_transition_iterations", None):
        return None
    if args.train_samples:
        return int(args.train_samples)
    if args.train_iters and args.global_batch_size:
        return int(args.train_iters) * int(args.global_batch_size)
    return None
