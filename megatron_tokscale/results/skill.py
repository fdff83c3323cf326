"""Skill of learning times in predicting which groups of tokens fall, beside the rivals' skill."""

from dataclasses import dataclass

from megatron_tokscale.results.estimate import Estimate, Undefined
from megatron_tokscale.results.verdict import ClaimTest


@dataclass(frozen=True)
class GroupSkill:
    """Skills for one grouping of the tokens: share of the between-group variance explained.

    Attributes:
        groups: number of groups.
        events: skill of the learning events.
        permuted: skill of the null model: learning times permuted over tokens of about the same
            drop.
        full: skill of the class models of all tokens.
        source: skill of the other run's measured curves; None where there is no other run.
        own: skill of the run's own learning events; None where they were not tested.
        gain_over_permuted: skill of the learning events minus that of the null model.
        p_value: share of the permutations with at least the skill of the learning events; NaN if it
            is not defined.
    """

    groups: int
    events: Estimate
    permuted: Estimate
    full: Estimate
    source: Estimate | None
    own: Estimate | None
    gain_over_permuted: Estimate
    p_value: float


@dataclass(frozen=True)
class GroupTest(GroupSkill):
    """Skills for one grouping of the tokens, and the test of the gain over permuted times.

    Attributes:
        test: the test; None for a grouping that worlds without steps predict as well.
    """

    test: ClaimTest | None


type GroupTests = dict[str, GroupTest] | Undefined
"""Tests by grouping of the tokens, or the reason why the losses cannot be aligned."""
