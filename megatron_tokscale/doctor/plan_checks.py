"""The doctor's checks of a job's data plan, a function for each finding.

Shapes: J packings of the plan.
"""

from argparse import Namespace
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_tokscale.core.arrays import Integers32
from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.core.files import is_there
from megatron_tokscale.core.writable import unwritable
from megatron_tokscale.corpus.bin_idx import Portion
from megatron_tokscale.corpus.source import DEFAULT_SPLIT, DataSource
from megatron_tokscale.data import Plan, match_datasets, with_decisions
from megatron_tokscale.data.document_strata import (
    documents_of_packings,
    documents_of_strata,
    load_documents,
    packing_sizes,
)
from megatron_tokscale.data.history import resume
from megatron_tokscale.data.match import check_documents, check_skipped_order
from megatron_tokscale.data.plan_scores import scores_of_plan
from megatron_tokscale.data.prepare import check_draws
from megatron_tokscale.data.record import DatasetRecord, check_order, load_records, record_path
from megatron_tokscale.data.scores import identity_of
from megatron_tokscale.doctor.findings import Findings, error_of, known_arguments
from megatron_tokscale.store import RunPaths
from megatron_tokscale.training.history.start import start_of
from megatron_tokscale.training.settings import JobPlanSettings, JobSettings
from megatron_tokscale.training.support import (
    PARTS_UNKNOWN,
    plan_misfits,
    plan_refusals,
    replan_misfits,
)


def check_plan(
    plan: JobPlanSettings,
    settings: JobSettings,
    run: Path | None,
    args: Namespace,
    findings: Findings,
) -> None:
    """Note the findings on a job's data plan.

    Args:
        plan: settings of the plan.
        settings: settings of the job.
        run: the run directory; None if it is refused.
        args: Megatron's arguments, not validated by it.
        findings: takes the findings.
    """
    refusals = plan_refusals(known_arguments(args, findings))
    findings.refused += refusals
    findings.attempt(lambda: plan.replan_interval)
    given = findings.attempt(lambda: Plan.load(plan.path))
    if given is None:
        return
    if plan.steps_between_decisions is not None:
        findings.refused += replan_misfits(given, str(plan.path))
    misfits = _check_sequence_length(given, plan.path, args, findings)
    if run is None:
        return
    if reason := unwritable(RunPaths(run).folder, "a"):
        findings.refused.append(f"the plan cannot be kept in {run / 'tokscale'}: {reason}")
    followed = _check_past(given, plan, settings, args, findings)
    if followed is None or refusals or misfits:
        return
    findings.passed.append(f"plan {plan.path} can be followed")
    try:
        portions = DataSource.from_flags(args).portions("train")
    except TokscaleError as error:
        findings.unchecked.append(f"whether the job's datasets are those of the plan: {error}")
        return
    if not followed.plan.documents:
        findings.unchecked.append(PARTS_UNKNOWN)
    _check_data(followed, portions, plan, settings, args, findings)


@dataclass(frozen=True)
class _Followed:
    """The plan that the job would follow, and the samples consumed when it starts."""

    plan: Plan
    consumed: int


def _check_sequence_length(
    given: Plan, path: Path, args: Namespace, findings: Findings
) -> list[str]:
    """Compare the plan's sequence length with the job's; return the refusals."""
    if args.seq_length is None:
        findings.unchecked.append(
            f"the sequence length: no --seq-length is given, the plan's is {given.seq_length}"
        )
        return []
    misfits = plan_misfits(given, str(path), args.seq_length)
    findings.refused += misfits
    return misfits


def _check_past(
    given: Plan,
    plan: JobPlanSettings,
    settings: JobSettings,
    args: Namespace,
    findings: Findings,
) -> _Followed | None:
    """Compare a plan with the run's past; return the plan that the job would follow."""
    start = start_of(args)
    if start is None:
        findings.unchecked.append(
            f"where the job resumes, and so whether plan {given.fingerprint} keeps the run's past: "
            f"the checkpoint in {args.load} cannot be read here"
        )
        return None
    run, accept = settings.run, plan.overrides
    settled = findings.attempt(
        lambda: resume(given, run, start.consumed, start.step, accept=accept)
    )
    path = record_path(run)
    if is_there(path) and (error := error_of(lambda: load_records(path))):
        if start.consumed:
            findings.refused.append(error)
        else:
            # A probe's run starts anew at step 0, and sets the record aside.
            where = findings.unchecked if settings.probe else findings.refused
            where.append(f"the plan cannot be kept in {path.parent}: {error}")
    return None if settled is None else _Followed(with_decisions(*settled), start.consumed)


def _check_data(
    followed: _Followed,
    portions: Sequence[Portion],
    plan: JobPlanSettings,
    settings: JobSettings,
    args: Namespace,
    findings: Findings,
) -> None:
    """Compare the plan with the headers of the job's training data."""
    n_refused, consumed = len(findings.refused), followed.consumed
    found, seq_length = [identity_of(row.tokens) for row in portions], followed.plan.seq_length
    order = findings.attempt(lambda: match_datasets(followed.plan, found, seq_length, consumed))
    if order is None:
        return
    bounds = [(row.sequences.start, row.sequences.stop) for row in portions]
    findings.attempt(lambda: check_documents(followed.plan, order, bounds))
    record = record_path(settings.run)
    if consumed and error_of(lambda: load_records(record)) is None:
        findings.attempt(lambda: check_order(record, _records(portions, args)))
    if followed.plan.skips:
        orders = [row.order for row in _records(portions, args)]
        orders_D = [None if place is None else orders[place] for place in order]
        findings.attempt(lambda: check_skipped_order(followed.plan, orders_D))
    # A plan that no job has followed yet must find every dataset that it draws from.
    chosen = [None if place is None else portions[place] for place in order]
    _check_scores(followed.plan, chosen, plan, settings, findings)
    _check_cache(settings.plan_cache, findings)
    if (sizes := _packed_sizes(followed.plan, chosen, plan, settings, findings)) is not None:
        _check_epochs(followed, sizes, args, findings, n_refused)


def _check_scores(
    followed: Plan,
    chosen: Sequence[Portion | None],
    plan: JobPlanSettings,
    settings: JobSettings,
    findings: Findings,
) -> None:
    """Look for the document scores that cut the datasets into strata."""
    cache = settings.plan_cache
    for number, portion in enumerate(chosen):
        if portion is None or (cut := followed.cuts[number]) is None:
            continue
        error = _scores_error(followed, number, portion, plan)
        if error is None:
            continue
        if cut.unit == "documents" and _cached_documents(followed, number, portion, cache):
            findings.passed.append(
                f"the strata of {portion.name} are in {cache} already, so the job needs no scores"
            )
        elif cut.unit == "samples" and any(cache.glob("tokscale-*-ranked.npy")):
            findings.unchecked.append(f"whether the strata are in {cache} already; else: {error}")
        else:
            findings.refused.append(" ".join(error.split()))


def _scores_error(
    followed: Plan, number: int, portion: Portion, plan: JobPlanSettings
) -> str | None:
    """Return the message on scores that the plan cannot use; None if it can."""
    prefix, documents = portion.tokens.prefix, portion.sequences
    return error_of(lambda: scores_of_plan(followed, number, prefix, documents, plan.scores_dir))


def trained_documents(
    followed: Plan, number: int, portion: Portion, plan: JobPlanSettings, cache: Path
) -> list[Integers32]:
    """Return the documents that each stratum of a dataset trains on: from the cache, or by scores.

    Raises:
        TokscaleError: they are not in the cache, and the scores cannot be used.
    """
    if found := _cached_documents(followed, number, portion, cache):
        return found
    part, tokens = portion.sequences, portion.tokens
    scores = scores_of_plan(followed, number, tokens.prefix, part, plan.scores_dir)
    return documents_of_strata(followed, number, scores, (part.start, part.stop), tokens.lengths)


def _cached_documents(
    followed: Plan, number: int, portion: Portion, cache: Path
) -> list[Integers32]:
    """Return the documents of each stratum that a job has written; none if no job has."""
    with suppress(TokscaleError):
        bounds = portion.sequences.start, portion.sequences.stop
        return load_documents(followed, number, bounds, cache)
    return []


def _packed_sizes(
    followed: Plan,
    chosen: Sequence[Portion | None],
    plan: JobPlanSettings,
    settings: JobSettings,
    findings: Findings,
) -> list[int] | None:
    """Return the samples of each packing of a plan; None where the documents are not known."""

    def divided(number: int) -> list[Integers32]:
        portion = chosen[number]
        assert portion is not None, "only datasets that are drawn from are divided"
        return trained_documents(followed, number, portion, plan, settings.plan_cache)

    parts = [None if row is None else (row.sequences.start, row.sequences.stop) for row in chosen]
    try:
        documents = documents_of_packings(followed, parts, divided)
    except TokscaleError as error:
        findings.unchecked.append(f"how often each stratum of documents is repeated: {error}")
        return None
    lengths = [None if row is None else row.tokens.lengths for row in chosen]
    return packing_sizes(followed, lengths, documents)


def _check_cache(cache: Path, findings: Findings) -> None:
    """Note whether the plan's files can be made."""
    if reason := unwritable(cache, "a"):
        findings.unchecked.append(
            f"whether the plan's index is in the data cache {cache}, which cannot be written: "
            f"{reason}"
        )


def _check_epochs(
    followed: _Followed,
    sizes_J: Sequence[int],
    args: Namespace,
    findings: Findings,
    n_refused: int,
) -> None:
    """Compare the samples that the job draws with those that the datasets have.

    Args:
        followed: the plan.
        sizes_J: samples of each packing of the plan; 0 for one that is not drawn from.
        args: Megatron's arguments.
        findings: takes the finding.
        n_refused: refusals before the checks of the data.
    """
    n_samples = train_samples(args)
    if n_samples is None:
        findings.unchecked.append(
            "how often each stratum is repeated: the samples of the job are not known from "
            "--train-samples, nor from --train-iters with --global-batch-size"
        )
        return
    plan = followed.plan
    findings.attempt(lambda: check_draws(plan, sizes_J, n_samples, followed.consumed))
    if len(findings.refused) == n_refused:
        findings.passed.append(
            f"the job's datasets are those of the plan, and {n_samples} samples repeat no stratum "
            "more often than it allows"
        )


def _records(portions: Sequence[Portion], args: Namespace) -> list[DatasetRecord]:
    """Return records of the job's datasets that hold only prefix and order."""
    is_split = any((args.data_path, args.data_args_path))
    split = (args.split or DEFAULT_SPLIT) if is_split else None
    order = DatasetRecord.order_of(args.seed, split)
    return [replace(DatasetRecord.unused(row.tokens.prefix), order=order) for row in portions]


def train_samples(args: Namespace) -> int | None:
    """Return the samples of the whole job; None where only Megatron's validation computes them."""
    if getattr(args, "phase_transition_iterations", None):
        return None
    if args.train_samples:
        return int(args.train_samples)
    if args.train_iters and args.global_batch_size:
        return int(args.train_iters) * int(args.global_batch_size)
    return None
