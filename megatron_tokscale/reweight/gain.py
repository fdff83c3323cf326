"""The gain that a plan can have at most, before it is trained.

To first order in the quantization model a training under a plan needs exp(-S) of the steps, S the
covariance over the pool's tokens of the weight of a token's document, averaged over the training
and relative to its base weight, with the document's own fall relative to the mean fall. So it saves
1 - exp(-S) of the training, which is what its reference may cost. The derivation is in
docs/references.md 10.1. Where losses flatten as they fall, saturation lowers the gain.

Shapes: D datasets, Z strata.
"""

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
from scipy.stats import nct, t

from megatron_tokscale.core.arrays import Floats
from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.core.records import from_json, to_json
from megatron_tokscale.data import Plan
from megatron_tokscale.reweight.by_score import falls
from megatron_tokscale.reweight.cutting import CutDataset

MIN_SPREAD: Final = 0.1
"""Least CV² of falls for which a plan is advised. Our choice: in simulations the best weights of
all gain 0.4 to 0.9 of CV², and a plan about half of that: 2 to 4% here."""

SD_POINTS: Final = 2.2
"""Standard deviation over seeds of a paired difference in percent of the training, where none is
given: that of three seeds of the study against its keyed plain blend
(benchmarks/results/learnability_study.md)."""

POWER: Final = 0.8  # of the test that is to see the gain; the usual choice
LEVEL: Final = 0.05  # of the same, two-sided
MAX_SEEDS: Final = 10_000  # above which a number of seeds is not worth stating; our choice

_KEY: Final = "gain"  # of the plan's provenance settings


@dataclass(frozen=True)
class GainSettings:
    """Settings of the estimate.

    Attributes:
        parameters: parameters of the model to train; None: as many as the reference run's.
        sd_points: standard deviation over seeds of the paired difference, in percent of training.

    Raises:
        TokscaleError: on construction, if these are out of range.
    """

    parameters: int | None = None
    sd_points: float = SD_POINTS

    def __post_init__(self) -> None:
        if self.parameters is not None and self.parameters < 1:
            raise TokscaleError(
                f"the number of parameters is {self.parameters}; expected 1 or more; give another "
                "--parameters"
            )
        if not 0 < self.sd_points <= 100:
            raise TokscaleError(
                f"the standard deviation over seeds is {self.sd_points:g}; expected a percentage "
                "above 0 and at most 100; give another --seed-sd"
            )


@dataclass(frozen=True)
class Gain:
    """The gain of a plan at most, and its cost.

    Attributes:
        spread: CV² of falls: variance of the relative fall over the documents of the pool, free of
            noise; None where the reference run's scores do not tell.
        watched: reliability of the falls of documents with a score of their own: the share of their
            variance that is no noise; None likewise.
        predicted: the same of predicted falls.
        reliability: the same over all tokens of the pool.
        kept: share of `spread` that lies between the strata, as far as the scores tell them apart.
        covariance: S; the training needs exp(-S) of the steps.
        cost: compute of the reference run and of its scores, as a share of the training's; None
            where the scores do not tell.
        parameters: parameters of the model to train that `cost` is for; None likewise.
        is_reference_size: whether these are the reference run's own, as none were given.
        sd_points: standard deviation over seeds of a paired difference, in percent.
        seeds: paired seeds that see a gain of `at_most` with 80% power; None if there is no gain.
        is_control: whether the plan is a control, which is not meant to gain.
    """

    spread: float | None
    watched: float | None
    predicted: float | None
    reliability: float | None
    kept: float | None
    covariance: float
    cost: float | None
    parameters: int | None
    is_reference_size: bool
    sd_points: float
    seeds: int | None
    is_control: bool = False

    @property
    def at_most(self) -> float:
        """Gain at most, as a share of the training: 1 - exp(-S), not below 0."""
        return _gain(self.covariance)

    @property
    def advice(self) -> list[str]:
        """Return reasons against the plan; none for a control."""
        if self.is_control:
            return []
        reasons = []
        if self.cost is not None and self.cost > self.at_most:
            reasons.append(
                f"it can gain {self.at_most:.1%} at most and its reference costs {self.cost:.1%}"
            )
        if self.spread is not None and self.spread < MIN_SPREAD:
            reasons.append(
                f"the documents differ little in what they teach: CV² {self.spread:.2f}, expected "
                f"{MIN_SPREAD:g} or more"
            )
        return reasons


def gain_of(
    plan: Plan, datasets: Sequence[CutDataset], settings: GainSettings | None = None
) -> Gain | None:
    """Return the gain of a plan over its datasets' strata; None if the scores have no falls."""
    if any(dataset.fall_Z is None for dataset in datasets) or not datasets:
        return None
    settings = settings or GainSettings()
    base_Z, weight_Z = base_weights(plan), mean_weights(plan)
    relative_Z = relative_falls(base_Z, falls(datasets))
    if relative_Z is None:
        return None
    covariance = first_order(base_Z, weight_Z, relative_Z)
    base_D = np.bincount(plan.dataset_Z, base_Z)
    spread, watched, predicted, over_all = _spread_and_reliability(datasets, base_D)
    between = float(base_Z @ (relative_Z - 1) ** 2)
    cost, parameters = _reference_cost(plan, datasets, settings)
    return Gain(
        spread=spread,
        watched=watched,
        predicted=predicted,
        reliability=over_all,
        kept=min(between / spread, 1.0) if spread else None,
        covariance=covariance,
        cost=cost,
        parameters=parameters,
        is_reference_size=settings.parameters is None,
        sd_points=settings.sd_points,
        seeds=seeds_needed(100 * _gain(covariance), settings.sd_points),
        is_control=plan.provenance.control is not None,
    )


def _gain(covariance: float) -> float:
    return max(-math.expm1(-covariance), 0.0)


def base_weights(plan: Plan) -> Floats:
    """Return the weight of each stratum without the plan; they sum to one."""
    base_D = np.array(plan.replanning.base_weights or plan.segments[0].weights)
    return np.asarray((base_D / base_D.sum())[plan.dataset_Z] * plan.share_Z)


def mean_weights(plan: Plan) -> Floats:
    """Return the weight of each stratum, averaged over the training; they sum to one."""
    n_samples = plan.replanning.train_samples
    assert n_samples is not None, "plans of policies hold the length of the training"
    return np.asarray(plan.target_Z(n_samples) / n_samples)


def relative_falls(base_Z: Floats, fall_Z: Floats) -> Floats | None:
    """Return each stratum's fall over the mean of the pool; None if the mean is not above 0."""
    mean = float(base_Z @ fall_Z)
    return fall_Z / mean if mean > 0 else None


def first_order(base_Z: Floats, weight_Z: Floats, relative_Z: Floats) -> float:
    """Return S, the first order in the quantization model of how far a training is ahead in ln t.

    Args:
        base_Z: base weights of the strata, summing to one.
        weight_Z: weights of the plan, averaged over the training, summing to one.
        relative_Z: relative falls, of mean 1 under the base weights.
    """
    return float((weight_Z - base_Z) @ relative_Z)


def reference_cost(
    parameters: float, tokens: float, reference: float, reference_tokens: float, scored: float
) -> float:
    """Return the compute of a reference run and its scores, as a share of a training's.

    A training takes 6 FLOPs per parameter and token, a forward pass 2, and scores take two forward
    passes over the scored tokens (docs/references.md 10.3).

    Args:
        parameters: parameters of the model to train.
        tokens: tokens of its training.
        reference: parameters of the reference run's model.
        reference_tokens: tokens of its training.
        scored: tokens that it scored.
    """
    return (reference * reference_tokens + 2 / 3 * reference * scored) / (parameters * tokens)


def seeds_needed(gain_points: float, sd_points: float = SD_POINTS) -> int | None:
    """Return the least number of paired seeds whose t test sees a gain with 80% power.

    The test is two-sided at 5%; power by the noncentral t distribution.

    Args:
        gain_points: the gain in percent.
        sd_points: standard deviation over seeds of the paired difference, in percent.

    Returns:
        the number, at least 2; None for no gain, or for more than 10,000 seeds.
    """
    if gain_points <= 0:
        return None
    effect = gain_points / sd_points
    numbers = range(2, MAX_SEEDS + 1)
    place = bisect_left(numbers, POWER, key=lambda seeds: _power(seeds, effect))
    return numbers[place] if place < len(numbers) else None


def _power(seeds: int, effect: float) -> float:
    """Return the power of a two-sided paired t test at 5%, of an effect in standard deviations."""
    bound = t.ppf(1 - LEVEL / 2, seeds - 1)
    shift = effect * math.sqrt(seeds)
    return float(nct.sf(bound, seeds - 1, shift) + nct.cdf(-bound, seeds - 1, shift))


def _spread_and_reliability(
    datasets: Sequence[CutDataset], base_D: Floats
) -> tuple[float | None, float | None, float | None, float | None]:
    """Return CV² of falls, and the reliability of watched, predicted and all documents' falls.

    The variance of the pool is that within datasets and that between their means.
    """
    rows = [dataset.details.reliability.get("fall") for dataset in datasets]
    found = [row for row in rows if row is not None]
    if len(found) < len(rows):
        return None, None, None, None
    mean_D = np.array([row.mean for row in found])
    variance_D = np.array([row.signal_variance for row in found])
    mean = float(base_D @ mean_D)
    total = float(base_D @ (variance_D + (mean_D - mean) ** 2))
    spread = total / mean**2 if mean > 0 else None
    own_D = np.array([dataset.watched_share for dataset in datasets])
    watched = _mean_reliability([row.watched for row in found], base_D * own_D)
    predicted = _mean_reliability([row.predicted for row in found], base_D * (1 - own_D))
    share = float(base_D @ own_D)
    over_all = _mean_reliability([watched, predicted], np.array([share, 1 - share]))
    return spread, watched, predicted, over_all


def _mean_reliability(values: Sequence[float | None], weight_D: Floats) -> float | None:
    """Return the mean of a reliability over datasets with weight; None if one lacks it."""
    rows = [(w, value) for w, value in zip(weight_D.tolist(), values, strict=True) if w > 0]
    known = [(w, value) for w, value in rows if value is not None]
    if not rows or len(known) < len(rows):
        return None
    return float(sum(w * value for w, value in known) / sum(w for w, _ in known))


def _reference_cost(
    plan: Plan, datasets: Sequence[CutDataset], settings: GainSettings
) -> tuple[float | None, int | None]:
    """Return the cost of the reference run, and the parameters that it is relative to."""
    details = datasets[0].details
    reference, reference_tokens = details.reference_parameters, details.reference_tokens
    if reference is None or reference_tokens is None:
        return None, settings.parameters
    parameters = settings.parameters or reference
    n_samples = plan.replanning.train_samples
    assert n_samples is not None, "plans of policies hold the length of the training"
    scored = sum(dataset.scored_tokens for dataset in datasets)
    tokens = n_samples * plan.seq_length
    return reference_cost(parameters, tokens, reference, reference_tokens, scored), parameters


def with_gain(plan: Plan, gain: Gain) -> Plan:
    """Return a plan whose provenance holds its gain."""
    settings = {**plan.provenance.settings, _KEY: to_json(gain)}
    return replace(plan, provenance=replace(plan.provenance, settings=settings))


def gain_in(plan: Plan) -> Gain | None:
    """Return the gain that a plan's provenance holds; None if it holds none that can be read."""
    content = plan.provenance.settings.get(_KEY)
    try:
        return None if content is None else from_json(Gain, content)
    except ValueError:  # provenance is for people: an edited one is no error
        return None


def describe_gain(gain: Gain) -> list[str]:
    """Return lines of text on the gain, for a terminal."""
    lines = ["what it can gain, to first order:"]
    lines += [f"  {name:<20}{text}" for name, text in gain_rows(gain)]
    if gain.advice:
        lines.append("advice: do not train this plan:")
        lines += [f"  {reason}" for reason in gain.advice]
    return lines


def gain_rows(gain: Gain) -> list[tuple[str, str]]:
    """Return the numbers of a gain in words, with their names."""
    return [
        *_spread_rows(gain),
        (
            "gain",
            f"at most {gain.at_most:.1%} (weights and falls have covariance {gain.covariance:.4f})",
        ),
        ("reference's cost", _cost(gain)),
        ("seeds to see it", _seeds(gain)),
    ]


def _spread_rows(gain: Gain) -> list[tuple[str, str]]:
    """Return the rows on the scores; one, where they do not tell how reliable they are."""
    if gain.spread is None:
        return [("spread of falls", "unknown: the scores do not say how reliable they are")]
    parts = f"{_number(gain.watched)} where watched, {_number(gain.predicted)} where predicted"
    return [
        ("spread of falls", f"CV² {gain.spread:.3f}, free of noise"),
        ("reliability", f"{_number(gain.reliability)} of all scores ({parts})"),
        ("kept by the strata", f"{_number(gain.kept, '.0%')} of that spread"),
    ]


def _number(value: float | None, form: str = ".2f") -> str:
    return "unknown" if value is None else format(value, form)


def _cost(gain: Gain) -> str:
    if gain.cost is None:
        return "unknown: the scores do not say what their reference run took"
    if gain.is_reference_size:
        size = "its own size; give --parameters"
    else:
        size = f"{gain.parameters:,} parameters"
    return f"{gain.cost:.1%} of a training of {size}"


def _seeds(gain: Gain) -> str:
    setting = f"paired, 80% power, two-sided 5%, sd of {gain.sd_points:g} points between seeds"
    if gain.seeds is None:
        return f"no number of them ({setting})"
    return f"{gain.seeds:,} ({setting})"
