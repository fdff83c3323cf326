"""The plan that a job follows, and the agreement of all ranks on it.

Rank 0 reads and writes the files of the run directory. The functions here are collective: every
rank of the job calls them together.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch

from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.core.records import from_json, to_json
from megatron_tokscale.data import Decision, Plan, with_decisions
from megatron_tokscale.data.history import load_run_plan, resume
from megatron_tokscale.training.events import TrainingState
from megatron_tokscale.training.ranks import first_of_all_ranks, from_rank_0, refuse_together


@dataclass(frozen=True)
class FollowedPlan:
    """A plan and the decisions made under it: the content of a run's plan.json and replans.json.

    Attributes:
        base: the plan that the run started with, or accepted later.
        decisions: decisions made since, in their order.
    """

    base: Plan
    decisions: tuple[Decision, ...] = ()

    @cached_property
    def plan(self) -> Plan:
        """The plan under its decisions: the order of the samples."""
        return with_decisions(self.base, self.decisions)

    def with_decision(self, decision: Decision) -> "FollowedPlan":
        """Return the plan under one more decision."""
        return FollowedPlan(self.base, (*self.decisions, decision))

    def to_text(self) -> str:
        """Return the plan and its decisions as JSON."""
        return json.dumps([to_json(self.base), to_json(self.decisions)])

    @classmethod
    def from_text(cls, text: str) -> "FollowedPlan":
        """Return the plan that `to_text` wrote."""
        base, decisions = json.loads(text)
        return cls(from_json(Plan, base), from_json(tuple[Decision, ...], decisions))


def agree_on_plan(given: Plan, run: Path, state: TrainingState, *, overrides: bool) -> FollowedPlan:
    """Return the plan and decisions that a job with the plan `given` follows in `run`.

    The other ranks receive it from rank 0, whose files their file system may not show yet.

    Args:
        given: the plan of --tokscale-plan.
        run: the run directory.
        state: state of the training at the job's start.
        overrides: `given` may replace a plan with another past.

    Raises:
        AgreedError: the run has another past; `overrides` is not set, or the plans do not combine.
    """

    def settle() -> str:
        consumed, step = state.consumed_samples, state.step
        base, decisions = resume(given, run, consumed, step, accept=overrides)
        return FollowedPlan(base, tuple(decisions)).to_text()

    return FollowedPlan.from_text(from_rank_0(settle))


def agree_on_decision(
    followed: FollowedPlan, decision: Decision, write: Callable[[FollowedPlan], str | None]
) -> FollowedPlan | str:
    """Return the plan under one more decision, or the reason to ignore the decision.

    Args:
        followed: the plan so far.
        decision: the same on every rank.
        write: writes the new plan, on rank 0; returns the reason for a failure.

    Raises:
        AgreedError: the ranks follow different plans.
    """
    new = followed.with_decision(decision)
    fingerprint = new.plan.fingerprint
    agreed = first_of_all_ranks(fingerprint)
    is_other = fingerprint != agreed
    refuse_together(
        f"this rank follows plan {fingerprint}; expected the first rank's, {agreed}; give all "
        "nodes the same plan and scores"
        if is_other
        else None
    )
    objection = write(new) if torch.distributed.get_rank() == 0 else None
    return first_of_all_ranks(objection) or new


def refuse_edits(followed: FollowedPlan, run: Path) -> None:
    """Stop the job if the plan in the run directory is not the one that it follows.

    Raises:
        AgreedError: the plan has changed.
    """
    refuse_together(_edit(followed, run) if torch.distributed.get_rank() == 0 else None)


def _edit(followed: FollowedPlan, run: Path) -> str | None:
    """Return the message on an edited plan; None if the plan on disk is the followed one."""
    try:
        base, decisions = load_run_plan(run)
        base = replace(base, provenance=followed.base.provenance)  # for people: not compared
        if FollowedPlan(base, tuple(decisions)) == followed:
            return None
        reason = "it has other content now"
    except (TokscaleError, OSError) as error:
        reason = str(error)
    return (
        f"the plan in {run / 'tokscale'} was changed under this job ({reason}); restore it, and "
        "give a new plan as --tokscale-plan, with --tokscale-override-plan"
    )
