"""A plan that leaves named samples and documents of a run out, from a sample on.

Shapes: Z strata.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

import megatron_tokscale
from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.core.files import is_there
from megatron_tokscale.data import Plan, Skip, followed_plan, with_decisions
from megatron_tokscale.data.history import load_run_plan
from megatron_tokscale.data.index import count_strata, load_or_compute_index
from megatron_tokscale.data.record import PlanRecord
from megatron_tokscale.data.skips import SkippedDraws
from megatron_tokscale.data.strata import Strata
from megatron_tokscale.data.take_over import take_over
from megatron_tokscale.reweight.planning import check_new_plan
from megatron_tokscale.store import Identity, RunPaths
from megatron_tokscale.trace.drawn import planned_samples
from megatron_tokscale.trace.named import Named
from megatron_tokscale.trace.orders import PlanOrder
from megatron_tokscale.trace.trace import Span, Trace, open_index


class LeftOut(NamedTuple):
    """A plan without some samples.

    Attributes:
        plan: the plan.
        start: the first sample of the job from which on they are left out.
        n_samples: samples that are left out.
        n_replaced: samples of the job, until its planned end, that get others in their place.
    """

    plan: Plan
    start: int
    n_samples: int
    n_replaced: int


def leave_out(
    run: Path, named: Named, out: Path, *, plan: Plan | None = None, start: int | None = None
) -> LeftOut:
    """Make a plan without named samples and documents, and write it to `out`.

    Every sample that holds a token of a named document is left out. The places of those left out
    get the next samples of their strata that the training would not have drawn.

    Args:
        run: a run that follows a plan, with the record of its data.
        named: the samples and documents.
        out: the plan's file; an existing one is not overwritten.
        plan: the plan to change; None for the one that the run follows.
        start: first sample of the job from which on they are left out; None for the first sample
            that is named.

    Raises:
        TokscaleError: the run follows no plan, the names are not of its data, or the plan cannot
            be followed without them.
    """
    check_new_plan(out)
    _check_run(run, named)
    trace, followed = Trace.open(run), followed_plan(run)
    given, decisions = load_run_plan(run)
    span, order = _planned_span(run, trace)
    numbers_of = _by_stratum(order.strata, _numbers(trace, span, named))
    start = _start(named, start)
    # A job that resumes before a later decision makes it again.
    kept = [decision for decision in decisions if decision.start <= start]
    changed = plan or with_decisions(given, kept)

    # The order that a job with the changed plan has, from the run's first sample to its last.
    is_continued = changed.fingerprint_until(start) == followed.fingerprint_until(start)
    whole = changed if is_continued else take_over(followed, changed, start)
    assert isinstance(span.record.order, PlanRecord)
    n_samples = max(span.record.order.n_samples, planned_samples(run, trace))
    if not start < n_samples:
        raise TokscaleError(
            f"samples are to be left out from sample {start} on, the training ends with "
            f"{n_samples}; expected an earlier start; give --from-sample"
        )
    index = load_or_compute_index(whole, n_samples, Path(span.record.order.cache_dir))

    # The skips, with the counts of draws that freeze the rule.
    first_Z, end_Z = (
        count_strata(index.stratum_N[:stop], whole.n_strata) for stop in (start, None)
    )
    added = []
    for stratum, numbers in sorted(_without_known(changed, numbers_of).items()):
        z = next((z for z, row in enumerate(whole.strata) if row.name == stratum), None)
        if z is not None:
            counts = int(first_Z[z]), int(end_Z[z])
            flags = _flags(span, followed, stratum)
            added.append(Skip(start, stratum, tuple(numbers), *counts, flags))
    if not added:
        raise TokscaleError("the plan leaves these samples out already; expected others")
    made = _with_skips(changed, added, named)

    # The checks of a job: strata that are not empty, and the limit on epochs.
    _check_left(order.strata, made, named.file)
    final = made if is_continued else take_over(followed, made, start)
    of_run = replace(followed, skips=final.skips)
    strata = Strata(of_run, order.strata.sizes_J, order.strata.ranked_J)
    strata.make_skips()
    if final.packings == followed.packings:
        strata.check(final, n_samples, start)
    made.save(out)
    return LeftOut(
        made, start, sum(len(skip.samples) for skip in added), _n_replaced(strata, added)
    )


def _check_run(run: Path, named: Named) -> None:
    """Refuse a run without a plan, and names that are of another run.

    Raises:
        TokscaleError: naming the run.
    """
    paths = RunPaths(run)
    if not is_there(paths.plan):
        raise TokscaleError(
            f"{run} follows no plan ({paths.plan} is not there); expected a run that was trained "
            "with --tokscale-plan: samples can be left out of a plan, not of Megatron's own blend"
        )
    if named.run_id and is_there(paths.identity):
        run_id = Identity.load(paths.identity).run_id
        if run_id != named.run_id:
            raise TokscaleError(
                f"the samples to leave out are of run {named.run_id}, {run} is run {run_id}; "
                "expected the same; name that run"
            )


def _planned_span(run: Path, trace: Trace) -> tuple[Span, PlanOrder]:
    """Return the run's last span, which follows its plan.

    Raises:
        TokscaleError: the run has left its plan.
    """
    span = trace.spans[-1]
    if not isinstance(span.order, PlanOrder):
        raise TokscaleError(
            f"from sample {span.start} on {run} has not followed its plan; expected a run that "
            "follows it; resume it with --tokscale-plan first"
        )
    return span, span.order


def _start(named: Named, start: int | None) -> int:
    """Return the sample from which on the samples are left out.

    Raises:
        TokscaleError: only documents are named, and no start is given.
    """
    if start is not None:
        return start
    if not named.samples:
        raise TokscaleError(
            "documents are to be left out from an unknown sample on; expected the samples that the "
            "job has consumed where it resumes; give --from-sample"
        )
    return named.samples[0]


def _numbers(trace: Trace, span: Span, named: Named) -> dict[int, set[int]]:
    """Return the samples of each packing that are named, or that hold a named document.

    Raises:
        TokscaleError: the run has no such sample or document, or trains on no part of it.
    """
    found: dict[int, set[int]] = defaultdict(set)
    for k in named.samples:
        trace.sample(k)  # refuses a sample that the run does not have
        if k < span.start:
            raise TokscaleError(
                f"sample {k} was not drawn by the plan, which the run follows from sample "
                f"{span.start} on; expected a later one; name its documents instead"
            )
        origin = span.origin(k)
        found[origin.dataset].add(origin.number)
    for dataset, document in named.documents:
        trace.document(dataset, document, until=0)  # refuses what the run does not have
        prefix, n_before = trace.prefix(dataset), sum(map(len, found.values()))
        holding = {
            j: open_index(row).holding(document)
            for j, row in enumerate(span.record.datasets)
            if row.prefix == prefix and row.size
        }
        for j, numbers in holding.items():
            found[j].update(numbers.tolist())
        if not any(len(numbers) for numbers in holding.values()):
            raise TokscaleError(
                f"no training sample of the run holds document {document} of {dataset} "
                f"({n_before} samples are named so far); expected a document of its training part; "
                "leave it out of the file"
            )
    return found


def _by_stratum(strata: Strata, found: dict[int, set[int]]) -> dict[str, list[int]]:
    """Return the samples of each stratum from those of each packing; both ascend."""
    by_stratum = {}
    for packing, numbers in found.items():
        wanted = np.array(sorted(numbers), np.int64)
        for z in strata.plan.packings[packing].strata:
            own = wanted[np.isin(wanted, strata.numbers(z))]
            if len(own):
                by_stratum[strata.plan.strata[z].name] = own.tolist()
    return by_stratum


def _without_known(plan: Plan, numbers_of: dict[str, list[int]]) -> dict[str, list[int]]:
    """Return the samples of each stratum that the plan does not leave out already."""
    known = {(skip.stratum, number) for skip in plan.skips for number in skip.samples}
    left = {
        stratum: [number for number in numbers if (stratum, number) not in known]
        for stratum, numbers in numbers_of.items()
    }
    return {stratum: numbers for stratum, numbers in left.items() if numbers}


def _flags(span: Span, plan: Plan, stratum: str) -> str:
    """Return the flags that, with the documents, number the samples of a stratum."""
    for row, packing in zip(span.record.datasets, plan.packings, strict=True):
        if stratum in {plan.strata[z].name for z in packing.strata}:
            return row.order
    return ""


def _with_skips(plan: Plan, added: Sequence[Skip], named: Named) -> Plan:
    """Return the plan with more skips, and with their names in its provenance."""
    words = [*map(str, named.samples), *(f"{name}:{number}" for name, number in named.documents)]
    settings = {**plan.provenance.settings, "left_out": words}
    return replace(
        plan,
        skips=tuple(sorted([*plan.skips, *added], key=lambda skip: skip.start)),
        provenance=replace(
            plan.provenance, settings=settings, version=megatron_tokscale.__version__
        ),
    )


def _check_left(strata: Strata, plan: Plan, file: str) -> None:
    """Refuse a plan that leaves out every sample of a stratum.

    Raises:
        TokscaleError: naming the stratum and the file that names the samples.
    """
    for stratum, size in zip(strata.plan.strata, strata.size_Z.tolist(), strict=True):
        skips = [skip for skip in plan.skips if skip.stratum == stratum.name]
        if skips and len({number for skip in skips for number in skip.samples}) == size:
            raise TokscaleError(
                f"stratum {stratum.name!r} has none of its {size} samples left without those of "
                f"{file}{' and of earlier skips' if len(skips) > 1 else ''}; expected one or more; "
                "name fewer of its samples and documents"
            )


def _n_replaced(strata: Strata, added: Sequence[Skip]) -> int:
    """Return the draws until the planned end that skips replace."""
    total = 0
    for z in range(strata.plan.n_strata):
        draws = strata.drawn(z)
        while isinstance(draws, SkippedDraws):
            total += draws.n_replaced if draws.skip in added else 0
            draws = draws.before
    return total
