"""How a plan changes under a run: weights decided while it trains, and another plan accepted.

Neither touches the past. What a run follows is the plan in its directory, with the decisions made
since; both are plain files, and the plan that follows from them is the same wherever it is asked
for.

    RUN/tokscale/plan.json      the plan that was given, or accepted
    RUN/tokscale/replans.json   decisions made by --tokscale-replan-interval

Shapes: D datasets.
"""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Final

from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.core.files import (
    check_schema,
    check_seal,
    is_there,
    read_json,
    sealed,
    write_json,
)
from megatron_tokscale.core.schemas import DECISIONS_SCHEMA
from megatron_tokscale.data.plan import Acceptance, DatasetIdentity, Decision, Plan, Stage
from megatron_tokscale.data.record import load_records, record_path
from megatron_tokscale.store import RunPaths

_KIND: Final = "tokscale-replans"


def with_decisions(plan: Plan, decisions: Sequence[Decision]) -> Plan:
    """The plan under decisions, in the order in which they were made.

    From its start on a decision's weights hold for the datasets, also in later stages of the plan;
    the plan's weights within the datasets stay.

    Raises:
        TokscaleError: a decision does not fit the plan.
    """
    for decision in decisions:
        before = [stage for stage in plan.stages if stage.start < decision.start]
        at = Stage(decision.start, decision.weights, before[-1].within)
        later = [
            replace(stage, weights=decision.weights)
            for stage in plan.stages
            if stage.start >= decision.start
        ]
        first = [] if later and later[0].start == decision.start else [at]
        plan = replace(
            plan,
            stages=(*before, *first, *later),
            decisions=(*plan.decisions, decision),
        )
    return plan


def save_run_plan(plan: Plan, decisions: Sequence[Decision], run: Path) -> None:
    """Write what a run follows into its directory.

    The plan is replaced last: until then the decisions that belong to the one before stay beside
    those of the new one, so that a job killed in between leaves either whole.

    Raises:
        OSError: the directory cannot be written.
    """
    save_decisions(plan, decisions, run)
    plan.save(RunPaths(run).plan)


def save_decisions(plan: Plan, decisions: Sequence[Decision], run: Path) -> None:
    """Write the decisions made under a plan beside it.

    Raises:
        OSError: the directory cannot be written.
    """
    path = RunPaths(run).decisions
    rows = {plan.fingerprint: [asdict(decision) for decision in decisions]}
    if is_there(path) and RunPaths(run).plan.exists():
        with suppress(TokscaleError):  # what cannot be read is of no run that can go on
            before, known = load_run_plan(run)
            rows = {before.fingerprint: [asdict(decision) for decision in known], **rows}
    content: dict[str, Any] = {"kind": _KIND, "schema_version": DECISIONS_SCHEMA, "decisions": rows}
    write_json(path, sealed(content))


def load_run_plan(run: Path) -> tuple[Plan, list[Decision]]:
    """Read what a run follows: its plan, and the decisions made since.

    Raises:
        TokscaleError: there is none, or it is damaged.
    """
    plan = Plan.load(RunPaths(run).plan)
    path = RunPaths(run).decisions
    if not is_there(path):
        return plan, []
    content: dict[str, Any] = read_json(path)
    try:
        check_schema(path, int(content["schema_version"]), DECISIONS_SCHEMA)
        if content["kind"] != _KIND or plan.fingerprint not in content["decisions"]:
            raise TokscaleError(f"{path} is not of the plan beside it; restore either")
        rows = content["decisions"][plan.fingerprint]
        decisions = [Decision.from_json(row) for row in rows]
    except (KeyError, TypeError, ValueError) as error:
        raise TokscaleError(f"{path} is damaged ({error!r}); restore or remove it") from error
    check_seal(path, content)
    return plan, decisions


def followed(run: Path) -> Plan:
    """The plan that a run follows, decisions and all.

    Raises:
        TokscaleError: the run follows no plan, or its plan is damaged.
    """
    path = RunPaths(run).plan
    if not is_there(path):
        raise TokscaleError(
            f"{run} follows no plan: {path} is not there; name a plan file, or a run that was "
            "trained with --tokscale-plan"
        )
    return with_decisions(*load_run_plan(run))


def left_at(run: Path) -> int | None:
    """Return the consumed samples from which on a run has no longer followed its plan, if any.

    Raises:
        TokscaleError: the run's record of its data is damaged.
    """
    path = record_path(run)
    if not is_there(path):
        return None
    last = load_records(path)[-1]
    return None if last.kind == "plan" else last.start


def resume(
    given: Plan, run: Path, consumed: int, step: int, *, accept: bool
) -> tuple[Plan, list[Decision]]:
    """Return the plan and decisions that a job follows when it starts or resumes in `run`.

    Decisions that were made after the step from which it goes on are dropped: they will be made
    again.

    Args:
        given: the plan that the job is given.
        consumed: samples consumed by `step`.
        step: optimizer steps completed.
        accept: whether `given` may replace a plan with another past, from here on.

    Raises:
        TokscaleError: the run has another past, and that is not accepted or cannot go on so.
    """
    if not consumed:
        return given, []
    if not is_there(RunPaths(run).plan):
        if not accept:
            raise TokscaleError(
                f"no plan is known for the {consumed} samples that the job has consumed (none in "
                f"{RunPaths(run).folder}), so samples could come twice; --tokscale-override-plan "
                "lets the plan hold from here on all the same"
            )
        return given, []
    known, decisions = load_run_plan(run)
    decisions = [decision for decision in decisions if decision.step <= step]
    known_as = known.accepted[-1].plan if known.accepted else known.fingerprint
    if known_as == given.fingerprint:
        return replace(known, max_epochs=given.max_epochs), decisions
    past = with_decisions(known, decisions)
    if past.fingerprint_until(consumed) == given.fingerprint_until(consumed):
        return given, []
    if not accept:
        raise TokscaleError(
            f"the job has consumed {consumed} samples under plan {past.fingerprint} "
            f"({RunPaths(run).plan}), and plan {given.fingerprint} orders them otherwise; "
            "resume with that plan, or let this one hold from here on with --tokscale-override-plan"
        )
    return accepted(past, given, consumed), []


def accepted(past: Plan, given: Plan, consumed: int) -> Plan:
    """The plan with the past of one plan and, from sample `consumed` on, the weights of another.

    Datasets may be added, or left out; the strata of those that stay must be the same, so that the
    counts carry over: no sample is lost or repeated.

    Raises:
        TokscaleError: the samples are of another length, or a dataset is cut otherwise.
    """
    if past.seq_length != given.seq_length:
        raise TokscaleError(
            f"the plan is for sequence length {given.seq_length}, the run's past for "
            f"{past.seq_length}; start a new run"
        )
    if any(len({*plan.datasets}) < len(plan.datasets) for plan in (past, given)):
        raise TokscaleError("a plan with twins among its datasets cannot be accepted by another")
    kept = {dataset: d for d, dataset in enumerate(past.datasets)}
    for d, dataset in enumerate(given.datasets):
        if dataset not in kept:
            continue
        if past.documents and given.documents:
            had, has = past.documents[kept[dataset]], given.documents[d]
            if had != has:
                raise TokscaleError(
                    f"the plan's training part of {dataset.name} is documents {has[0]} to {has[1]},"
                    f" the run's past had {had[0]} to {had[1]}, so samples could come twice; make "
                    "the plan with the --split of the run, or start a new run"
                )
        if _parts(given, d) != _parts(past, kept[dataset]):
            now, earlier = (
                plan.strata[plan.strata_of(number)[0]].name.partition("/")[0]
                for plan, number in ((given, d), (past, kept[dataset]))
            )
            if now != earlier:
                raise TokscaleError(
                    f"the plan calls {dataset.path} {now}, the run's past {earlier}; make the plan "
                    "with the datasets in the same order, added ones last, or start a new run"
                )
            raise TokscaleError(
                f"the plan cuts {dataset.name} into other strata than the run's past did, so its "
                "samples could come twice; make the plan with the same scores and quantiles, or "
                "start a new run"
            )
    added = [d for d, dataset in enumerate(given.datasets) if dataset not in kept]
    datasets = (*past.datasets, *(given.datasets[d] for d in added))
    strata = (
        *past.strata,
        *(
            replace(given.strata[z], dataset=datasets.index(given.datasets[d]))
            for d in added
            for z in given.strata_of(d)
        ),
    )

    names = {stratum.name for stratum in past.strata}
    if again := sorted(names & {stratum.name for stratum in strata[past.n_strata :]}):
        raise TokscaleError(
            f"the plan has other data under a name that the run's past knows, {again[0]}; give the "
            "files another name"
        )

    def translated(plan: Plan, stage: Stage, start: int) -> Stage:
        names = [stratum.name for stratum in plan.strata]
        shares = [stratum.share for stratum in plan.strata]
        within = dict(zip(names, stage.within or shares, strict=True))
        return Stage(
            start,
            _in_order(datasets, plan, stage.weights),
            tuple(within.get(stratum.name, stratum.share) for stratum in strata),
        )

    before = [stage for stage in past.stages if stage.start < consumed]
    present = [stage for stage in given.stages if stage.start <= consumed][-1]
    later = [stage for stage in given.stages if stage.start > consumed]
    how = given.replanning
    return Plan(
        datasets=datasets,
        strata=strata,
        stages=(
            *(translated(past, stage, stage.start) for stage in before),
            translated(given, present, consumed),
            *(translated(given, stage, stage.start) for stage in later),
        ),
        seq_length=past.seq_length,
        seed=past.seed,
        cuts=(*past.cuts, *(given.cuts[d] for d in added)),
        documents=(
            (*past.documents, *(given.documents[d] for d in added))
            if past.documents and given.documents
            else ()
        ),
        max_epochs=given.max_epochs,
        provenance=given.provenance,
        replanning=replace(
            how,
            base_weights=_in_order(datasets, given, how.base_weights),
            epoch_samples=_in_order(datasets, given, how.epoch_samples),
        ),
        accepted=(*past.accepted, Acceptance(consumed, past.fingerprint, given.fingerprint)),
    )


def _in_order[Number: (int, float)](
    datasets: Sequence[DatasetIdentity], plan: Plan, values: tuple[Number, ...]
) -> tuple[Number, ...]:
    """Return a plan's values for `datasets`, with 0 for a dataset that the plan does not have."""
    if not values:
        return ()
    known = dict(zip(plan.datasets, values, strict=True))
    return tuple(known.get(dataset, type(values[0])(0)) for dataset in datasets)


def _parts(plan: Plan, dataset: int) -> list[Any]:
    """What decides which samples of a dataset are in which stratum."""
    strata = [plan.strata[z] for z in plan.strata_of(dataset)]
    return [plan.cuts[dataset], [(stratum.name, stratum.share) for stratum in strata]]
