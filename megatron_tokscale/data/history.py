"""The plan that a run follows: on disk, under decisions, and when a job resumes.

Decisions change the plan while the run trains, and `data/take_over.py` lets another plan hold from
a sample on; neither touches the past. Plan and decisions are plain files, so every reader of them
gets the same plan:

    RUN/tokscale/plan.json      the plan that the job was started with, or that took over
    RUN/tokscale/replans.json   decisions made by --tokscale-replan-interval

Shapes: D datasets.
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Final

from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.core.files import (
    check_schema,
    check_seal,
    is_there,
    read_json,
    schema_version,
    sealed,
    write_json,
)
from megatron_tokscale.core.records import JSON, read_as, to_json
from megatron_tokscale.core.schemas import DECISIONS_SCHEMA
from megatron_tokscale.data.plan import Plan
from megatron_tokscale.data.plan_parts import Decision, Skip, Stage
from megatron_tokscale.data.record import load_records, record_path
from megatron_tokscale.data.take_over import skips_from, take_over
from megatron_tokscale.store import RunPaths

_KIND: Final = "tokscale-replans"


def with_decisions(plan: Plan, decisions: Sequence[Decision]) -> Plan:
    """Return the plan under decisions, in the order in which they were made.

    From its start on a decision's weights hold, also in later stages of the plan. A decision
    without weights within the datasets leaves those that hold.

    Raises:
        TokscaleError: a decision does not fit the plan.
    """
    for decision in decisions:
        before = [stage for stage in plan.stages if stage.start < decision.start]
        after = [stage for stage in plan.stages if stage.start >= decision.start]
        if not after or after[0].start > decision.start:
            after = [replace(before[-1], start=decision.start), *after]
        plan = replace(
            plan,
            stages=(*before, *(_decided(stage, decision) for stage in after)),
            decisions=(*plan.decisions, decision),
        )
    return plan


def _decided(stage: Stage, decision: Decision) -> Stage:
    """Return a stage with the weights of a decision."""
    within = stage.within if decision.within is None else decision.within
    return replace(stage, weights=decision.weights, within=within)


def save_run_plan(plan: Plan, decisions: Sequence[Decision], run: Path) -> None:
    """Write a plan and the decisions made under it into a run directory.

    The plan is replaced last: until then the decisions of the plan before stay beside those of the
    new one, so that a job killed in between leaves one of the two whole.

    Raises:
        OSError: the directory cannot be written.
    """
    save_decisions(plan, decisions, run)
    plan.save(RunPaths(run).plan)


def save_decisions(plan: Plan, decisions: Sequence[Decision], run: Path) -> None:
    """Write the decisions made under a plan into a run directory.

    Raises:
        OSError: the directory cannot be written.
    """
    path = RunPaths(run).decisions
    by_plan = {plan.fingerprint: decisions}
    if is_there(path) and RunPaths(run).plan.exists():
        with suppress(TokscaleError):  # no run can resume from files that cannot be read
            before, known = load_run_plan(run)
            by_plan = {before.fingerprint: known, **by_plan}
    content: dict[str, JSON] = {
        "kind": _KIND,
        "schema_version": DECISIONS_SCHEMA,
        "decisions": to_json(by_plan),
    }
    write_json(path, sealed(content))


def skips_of_run(run: Path) -> tuple[Skip, ...]:
    """Return the skips of the plan that the run has followed so far; none without a plan.

    Raises:
        TokscaleError: its plan is damaged.
    """
    path = RunPaths(run).plan
    return Plan.load(path).skips if is_there(path) else ()


def load_run_plan(run: Path) -> tuple[Plan, list[Decision]]:
    """Read the plan in a run directory, and the decisions made under it.

    Raises:
        TokscaleError: a file is missing or damaged.
    """
    plan = Plan.load(RunPaths(run).plan)
    path = RunPaths(run).decisions
    if not is_there(path):
        return plan, []
    content = read_json(path)
    check_schema(path, schema_version(path, content), DECISIONS_SCHEMA)
    by_plan = content.get("decisions")
    is_of_plan = isinstance(by_plan, Mapping) and plan.fingerprint in by_plan
    if content.get("kind") != _KIND or not is_of_plan:
        raise TokscaleError(
            f"{path} is not of the plan beside it; expected decisions under plan "
            f"{plan.fingerprint}; restore either file"
        )
    decisions = read_as(
        dict[str, list[Decision]], content["decisions"], path, "restore or remove it"
    )
    check_seal(path, content)
    return plan, decisions[plan.fingerprint]


def followed_plan(run: Path) -> Plan:
    """Return the plan that a run follows, under all its decisions.

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


def first_unplanned_sample(run: Path, until: int | None = None) -> int | None:
    """Return the sample from which on a run has no longer followed its plan; None if it does.

    Args:
        run: the run directory.
        until: only samples before this one count.

    Raises:
        TokscaleError: the run's record of its data is damaged.
    """
    path = record_path(run)
    if not is_there(path):
        return None
    last = [each for each in load_records(path) if until is None or each.start < until][-1]
    return None if last.kind == "plan" else last.start


def resume(
    plan: Plan, run: Path, consumed: int, step: int, *, accept: bool
) -> tuple[Plan, list[Decision]]:
    """Return the plan and decisions that a job follows when it starts or resumes in `run`.

    Decisions that were made after `step` are dropped: the job will make them again.

    Args:
        plan: the plan that the job is started with.
        run: the run directory.
        consumed: samples consumed by `step`.
        step: optimizer steps completed.
        accept: whether `plan` may take over from another past, from here on.

    Raises:
        TokscaleError: the run has another past, or has left its plan, and `plan` may not or cannot
            take over.
    """
    if not consumed:
        return plan, []
    path = RunPaths(run).plan
    if not is_there(path):
        if not accept:
            raise TokscaleError(
                f"no plan is known for the {consumed} samples that the job has consumed, so "
                f"samples could come twice; expected one in {path}; let the plan hold from here on "
                "all the same with --tokscale-override-plan"
            )
        return plan, []
    unplanned = first_unplanned_sample(run, consumed)
    if unplanned is not None and not accept:
        raise TokscaleError(
            f"the samples {unplanned} to {consumed - 1} were drawn without the plan, so samples "
            "could come twice; resume from a checkpoint before them, or let the plan hold from "
            "here on all the same with --tokscale-override-plan"
        )
    known, decisions = load_run_plan(run)
    decisions = [decision for decision in decisions if decision.step <= step]

    # The job resumes under the plan that it was started with before.
    started_with = known.accepted[-1].plan if known.accepted else known.fingerprint
    if started_with == plan.fingerprint:
        return replace(known, max_epochs=plan.max_epochs), decisions

    # The plan is another, but orders the past in the same way.
    past = with_decisions(known, decisions)
    if past.fingerprint_until(consumed) == plan.fingerprint_until(consumed):
        return plan, []

    skips_from(past, plan, consumed)  # a skip of the past has a message of its own
    if not accept:
        raise TokscaleError(
            f"the job has consumed {consumed} samples under plan {past.fingerprint} ({path}), and "
            f"plan {plan.fingerprint} orders them otherwise; resume with that plan, or let this "
            "one hold from here on with --tokscale-override-plan"
        )
    return take_over(past, plan, consumed), []
