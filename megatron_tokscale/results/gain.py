"""The gain of a plan by scores, as `plan build` prints it and the plan's provenance keeps it."""

import math
from dataclasses import dataclass, replace
from typing import Final

from megatron_tokscale.core.records import from_json, to_json
from megatron_tokscale.data import Plan

MIN_SPREAD: Final = 0.1
"""Least CV² of falls for which a plan is advised. Our choice: in simulations the best weights of
all gain 0.4 to 0.9 of CV², and a plan about half of that: 2 to 4% here."""


@dataclass(frozen=True)
class ScoreQuality:
    """The reliability of a plan's scores, and the cost of the reference run that made them.

    Attributes:
        watched: reliability of the scores of documents with a score of their own: the share of
            their variance that is no noise; None where the scores do not tell.
        predicted: the same of predicted scores.
        reliability: the same over all tokens of the pool.
        cost: compute of the reference run and of its probes, as a share of the training's; None
            where the scores do not tell.
        parameters: parameters of the model to train that `cost` is for; None likewise.
        is_reference_size: whether these are the reference run's own, as none were given.
    """

    watched: float | None
    predicted: float | None
    reliability: float | None
    cost: float | None
    parameters: int | None
    is_reference_size: bool


@dataclass(frozen=True)
class Gain:
    """The gain that a plan can have at most, by the falls of its documents.

    Attributes:
        scores: reliability and cost of the falls.
        spread: CV² of falls: variance of the relative fall over the documents of the pool, free of
            noise; None where the scores do not tell.
        kept: share of `spread` that lies between the strata, as far as the scores tell them apart.
        covariance: S; the training needs exp(-S) of the steps.
        sd_points: standard deviation over seeds of a paired difference, in percent.
        seeds: paired seeds that see a gain of `at_most` with 80% power; None if there is no gain.
        is_control: whether the plan is a control, which is not meant to gain.
    """

    scores: ScoreQuality
    spread: float | None
    kept: float | None
    covariance: float
    sd_points: float
    seeds: int | None
    is_control: bool = False

    @property
    def at_most(self) -> float:
        """Gain at most, as a share of the training: 1 - exp(-S), not below 0."""
        return max(-math.expm1(-self.covariance), 0.0)

    @property
    def advice(self) -> list[str]:
        """Return reasons against the plan; none for a control."""
        if self.is_control:
            return []
        reasons, cost = [], self.scores.cost
        if cost is not None and cost > self.at_most:
            reasons.append(
                f"it can gain {self.at_most:.1%} at most and its reference costs {cost:.1%}"
            )
        if self.spread is not None and self.spread < MIN_SPREAD:
            reasons.append(
                f"the documents differ little in what they teach: CV² {self.spread:.2f}, expected "
                f"{MIN_SPREAD:g} or more"
            )
        return reasons


@dataclass(frozen=True)
class TargetShift:
    """The shift of the mean target score under a plan, which is no gain.

    Attributes:
        scores: reliability and cost of the target scores.
        pool: mean target score under the base weights, in nats per token.
        plan: the same under the plan's weights, averaged over the training.
    """

    scores: ScoreQuality
    pool: float
    plan: float


_KEYS: Final = {Gain: "gain", TargetShift: "target_shift"}  # of the plan's provenance settings


def with_gain(plan: Plan, found: Gain | TargetShift) -> Plan:
    """Return a plan whose provenance holds what it can gain."""
    settings = {**plan.provenance.settings, _KEYS[type(found)]: to_json(found)}
    return replace(plan, provenance=replace(plan.provenance, settings=settings))


def gain_in[T: Gain | TargetShift](plan: Plan, kind: type[T]) -> T | None:
    """Return the gain, or the shift, that a plan holds; None if it holds none that can be read."""
    content = plan.provenance.settings.get(_KEYS[kind])
    try:
        return None if content is None else from_json(kind, content)
    except ValueError:  # provenance is for people: an edited one is no error
        return None
