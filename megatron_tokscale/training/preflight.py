"""What a job with given flags would be refused for, found without starting it.

Neither torch.distributed nor a GPU is needed: the flags are read by Megatron's own parser, and not
validated by it.
"""

from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from megatron_tokscale import cpu
from megatron_tokscale.data import Plan, match_datasets
from megatron_tokscale.data.scores import identity_of
from megatron_tokscale.data.strata import Strata
from megatron_tokscale.data_source import DataSource
from megatron_tokscale.errors import TokscaleError
from megatron_tokscale.probe import ProbeSet, Schedule
from megatron_tokscale.store import RunWriter
from megatron_tokscale.training.config import (
    TokscaleConfig,
    add_arguments,
    config_from_args,
    run_directory,
)
from megatron_tokscale.training.replan import parse_interval
from megatron_tokscale.training.replay import saved_steps
from megatron_tokscale.training.support import (
    plan_misfits,
    plan_refusals,
    probe_refusals,
    probe_set_misfits,
    scores_of_plan,
)

Result = TypeVar("Result")


@dataclass
class Findings:
    """What was found in a job's flags, a line each.

    Attributes:
        refused: for what the job would be refused.
        passed: what was checked and is right.
        unchecked: what only the job itself can check.
    """

    refused: list[str] = field(default_factory=list)
    passed: list[str] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)

    def attempt(self, read: Callable[..., Result], *args: Any) -> Result | None:
        """Read something, or note why it is refused."""
        try:
            return read(*args)
        except TokscaleError as error:
            self.refused.append(" ".join(str(error).split()))
            return None


def check_flags(words: Sequence[str]) -> Findings:
    """Check the flags of a job: Megatron's and ours, as they stand on its command line."""
    findings = Findings()
    parsed = findings.attempt(_parse, words)
    if parsed is None:
        return findings
    args, unknown = parsed
    _check_unknown(unknown, findings)
    _check_devices(args, findings)
    config = findings.attempt(config_from_args, args)
    if config is None:
        return findings
    if config.tokscale_probe_set:
        _check_probe(config, config.tokscale_probe_set, args, findings)
    if config.tokscale_plan:
        _check_plan(config, config.tokscale_plan, args, findings)
    if not config.tokscale_probe_set and not config.tokscale_plan:
        findings.passed.append("no --tokscale-probe-set and no --tokscale-plan: nothing is wrapped")
    findings.unchecked.append(
        "Megatron's own validation of its flags, which needs the job's processes and devices"
    )
    return findings


class _Parser(ArgumentParser):
    """A parser whose error is one line and no exit."""

    def error(self, message: str) -> NoReturn:
        raise TokscaleError(f"Megatron cannot read the flags: {message}")


def _parse(words: Sequence[str]) -> tuple[Namespace, list[str]]:
    from megatron.training.arguments import add_megatron_arguments

    parser = _Parser(allow_abbrev=False, add_help=False)
    add_megatron_arguments(parser)
    add_arguments(parser)
    try:
        args, unknown = parser.parse_known_args(list(words))
    except (KeyError, AssertionError) as error:  # from Megatron's own readers of values
        raise TokscaleError(f"Megatron cannot read a value among the flags: {error!r}") from error
    args.seq_length = args.seq_length or getattr(args, "encoder_seq_length", None)
    return args, unknown


def _check_unknown(unknown: Sequence[str], findings: Findings) -> None:
    flags = [word for word in unknown if word.startswith("--")]
    ours = [flag for flag in flags if flag.startswith("--tokscale-")]
    findings.refused += [f"there is no flag {flag}" for flag in ours]
    others = [flag for flag in flags if flag not in ours]
    if others:
        findings.unchecked.append(
            f"{', '.join(others)}: not among this Megatron's flags, so the script must add them"
        )


def _check_devices(args: Namespace, findings: Findings) -> None:
    import torch

    n_devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if args.tokscale_cpu and n_devices:
        findings.refused.append(
            f"{cpu.FLAG} is for machines without a GPU, and this one has {n_devices}"
        )
    if not args.tokscale_cpu and not n_devices:
        findings.unchecked.append(f"a GPU: this machine has none, and {cpu.FLAG} is not given")


def _check_probe(config: TokscaleConfig, path: str, args: Namespace, findings: Findings) -> None:
    refusals = probe_refusals(args)
    findings.refused += refusals
    if not refusals:
        findings.passed.append("the probe supports all of Megatron's settings")
    if config.tokscale_schedule is not None:
        findings.attempt(Schedule.parse, config.tokscale_schedule)
    if config.tokscale_replay:
        findings.attempt(saved_steps, Path(config.tokscale_replay))
    folder = findings.attempt(run_directory, config, args)
    probe_set = findings.attempt(ProbeSet.load, Path(path))
    if probe_set is None:
        return
    vocab_size = _vocab_size(args, findings)
    misfits = probe_set_misfits(probe_set, path, args.seq_length, vocab_size)
    findings.refused += misfits
    if not misfits:
        findings.passed.append(
            f"probe set {path} fits: {probe_set.n_tokens} tokens in {probe_set.n_sequences} "
            f"sequences, vocabulary {probe_set.vocab_size}"
        )
    if folder is not None:
        _check_run(folder, probe_set, args, findings)


def _check_run(folder: Path, probe_set: ProbeSet, args: Namespace, findings: Findings) -> None:
    # What is None yet is set by Megatron's validation.
    model = {name: value for name, value in vars(args).items() if value is not None}
    n_refused = len(findings.refused)
    findings.attempt(RunWriter(folder).check, probe_set, model)
    if len(findings.refused) == n_refused:
        is_new = not (folder / "tokscale/run.json").exists()
        what = "is new" if is_new else "holds a run of this probe set and model"
        findings.passed.append(f"run directory {folder / 'tokscale'} {what}")


def _vocab_size(args: Namespace, findings: Findings) -> int | None:
    """Size of the job's vocabulary without padding; None if this machine cannot tell."""
    if args.vocab_size:
        return int(args.vocab_size)
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer

    try:
        return int(build_tokenizer(args).vocab_size)
    except Exception as error:  # a tokenizer may need files or a network that are elsewhere
        findings.unchecked.append(
            f"the vocabulary: the tokenizer cannot be built here ({type(error).__name__})"
        )
        return None


def _check_plan(config: TokscaleConfig, path: str, args: Namespace, findings: Findings) -> None:
    refusals = plan_refusals(args)
    findings.refused += refusals
    if config.tokscale_replan is not None:
        findings.attempt(parse_interval, config.tokscale_replan)
    if not config.tokscale_probe_set:  # else the probe has said so
        findings.attempt(run_directory, config, args)
    plan = findings.attempt(Plan.load, Path(path))
    if plan is None:
        return
    misfits = plan_misfits(plan, path, args.seq_length)
    findings.refused += misfits
    if not refusals and not misfits:
        findings.passed.append(f"plan {path} can be followed")
        _check_planned_data(plan, config.tokscale_scores, args, findings)


def _check_planned_data(
    plan: Plan, scores: str | None, args: Namespace, findings: Findings
) -> None:
    """Hold the plan against the job's data, as far as it can be read on this machine."""
    try:
        portions = DataSource.of(args).portions("train")
    except TokscaleError as error:
        findings.unchecked.append(f"whether the job's datasets are those of the plan: {error}")
        return
    identities = [identity_of(portion.tokens) for portion in portions]
    order = findings.attempt(match_datasets, plan, identities, plan.seq_length)
    if order is None:
        return
    n_refused = len(findings.refused)
    # Of a plan that no job has followed yet every dataset that is drawn from is there.
    chosen = [None if place is None else portions[place] for place in order]
    for dataset, portion in enumerate(chosen):
        if portion is not None and plan.cuts[dataset] is not None:
            prefix, documents = portion.tokens.prefix, portion.sequences
            findings.attempt(scores_of_plan, plan, dataset, prefix, documents, scores)
    sizes_D = [
        0 if part is None else max(part.n_tokens - 1, 0) // plan.seq_length for part in chosen
    ]
    n_samples = args.train_samples or (args.train_iters or 0) * (args.global_batch_size or 0)
    strata = Strata(plan, sizes_D, [None] * len(sizes_D))
    findings.attempt(strata.check, plan, n_samples)
    if len(findings.refused) == n_refused:
        findings.passed.append(
            f"the job's datasets are those of the plan, and {n_samples} samples repeat no stratum "
            "more often than it allows"
        )
