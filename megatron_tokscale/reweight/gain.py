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
from dataclasses import dataclass
from typing import Final

import numpy as np
from scipy.stats import nct, t

from megatron_tokscale.core.arrays import Floats
from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.data import Plan
from megatron_tokscale.data.scores import Reliability
from megatron_tokscale.results.gain import Gain, ScoreQuality, TargetShift
from megatron_tokscale.reweight.by_score import falls, target_scores
from megatron_tokscale.reweight.cutting import CutDataset

SD_POINTS: Final = 2.5
"""Standard deviation over seeds of a paired difference in percent of the training, where none is
given: that of policy `fall` against the plain blend in six seeds of the study
(benchmarks/results/learnability_study.md)."""

POWER: Final = 0.8  # of the test that is to see the gain; the usual choice
LEVEL: Final = 0.05  # of the same, two-sided
MAX_SEEDS: Final = 10_000  # above which a number of seeds is not worth stating; our choice
_FALL_PASSES: Final = 2  # of scores that do not say how many: one at a quarter, one at the end


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
    spread = _spread(datasets, np.bincount(plan.dataset_Z, base_Z))
    between = float(base_Z @ (relative_Z - 1) ** 2)
    covariance = first_order(base_Z, weight_Z, relative_Z)
    return Gain(
        scores=_quality(plan, datasets, "fall", settings),
        spread=spread,
        kept=min(between / spread, 1.0) if spread else None,
        covariance=covariance,
        sd_points=settings.sd_points,
        seeds=seeds_needed(-100 * math.expm1(-covariance), settings.sd_points),
        is_control=plan.provenance.control is not None,
    )


def target_shift(
    plan: Plan, datasets: Sequence[CutDataset], settings: GainSettings | None = None
) -> TargetShift | None:
    """Return how far a plan moves the mean target score; None if the scores have none.

    A target score is the difference of two losses, no speed of learning, so that the gain on the
    target does not follow from it. Nor does it follow from falls, which are of the pool.
    """
    if any(dataset.target_Z is None for dataset in datasets):
        return None
    target_Z = target_scores(datasets)
    return TargetShift(
        scores=_quality(plan, datasets, "target", settings or GainSettings()),
        pool=float(base_weights(plan) @ target_Z),
        plan=float(mean_weights(plan) @ target_Z),
    )


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
    parameters: float,
    tokens: float,
    reference: float,
    reference_tokens: float,
    scored: float,
    passes: int,
) -> float:
    """Return the compute of a reference run and its scores, as a share of a training's.

    A training takes 6 FLOPs per parameter and token, a forward pass 2 (docs/references.md 10.3).

    Args:
        parameters: parameters of the model to train.
        tokens: tokens of its training.
        reference: parameters of the reference run's model.
        reference_tokens: tokens of its training.
        scored: tokens that it scored.
        passes: forward passes over the scored tokens, one for each probe.
    """
    spent = reference * (reference_tokens + passes / 3 * scored)
    return spent / (parameters * tokens)


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


def _spread(datasets: Sequence[CutDataset], base_D: Floats) -> float | None:
    """Return CV² of falls, whose variance is that within datasets and between their means."""
    found = _measured(datasets, "fall")
    if found is None:
        return None
    mean_D = np.array([row.mean for row in found])
    variance_D = np.array([row.signal_variance for row in found])
    mean = float(base_D @ mean_D)
    total = float(base_D @ (variance_D + (mean_D - mean) ** 2))
    return total / mean**2 if mean > 0 else None


def _measured(datasets: Sequence[CutDataset], score: str) -> list[Reliability] | None:
    """Return the reliability of a score in each dataset; None if the scores of one do not tell."""
    rows = [dataset.details.reliability.get(score) for dataset in datasets]
    found = [row for row in rows if row is not None]
    return found if len(found) == len(rows) else None


def _quality(
    plan: Plan, datasets: Sequence[CutDataset], score: str, settings: GainSettings
) -> ScoreQuality:
    """Return the reliability of watched, predicted and all scores, and their reference's cost."""
    watched = predicted = over_all = None
    if (found := _measured(datasets, score)) is not None:
        base_D = np.bincount(plan.dataset_Z, base_weights(plan))
        own_D = np.array([dataset.watched_share for dataset in datasets])
        watched = _mean_reliability([row.watched for row in found], base_D * own_D)
        predicted = _mean_reliability([row.predicted for row in found], base_D * (1 - own_D))
        share = float(base_D @ own_D)
        over_all = _mean_reliability([watched, predicted], np.array([share, 1 - share]))
    cost, parameters = _reference_cost(plan, datasets, settings)
    is_reference_size = settings.parameters is None
    return ScoreQuality(watched, predicted, over_all, cost, parameters, is_reference_size)


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
    passes = _FALL_PASSES if details.probes is None else details.probes
    cost = reference_cost(parameters, tokens, reference, reference_tokens, scored, passes)
    return cost, parameters
