"""Speed of an arm against the uniform arm, paired by seed.

A run's loss near step T is a quadratic in u = ln(t / T), fitted to its probes in [0.6 T, T]. The
difference of two runs' values at T, over the slope of the uniform arm, is a shift in ln t: an arm
whose loss is lower by D nats is "X% faster" with X = 100 (1 - exp(-D / slope)). The slope is the
mean over the seeds of the uniform arm. A fit to ten probes or more has less noise than the first
probe that reaches a target; the first passage stands beside it as a check. Intervals over seeds
take the slope as known: its error scales all arms alike.

Shapes: K probes, S seeds.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np
from scipy.stats import t as student_t

from megatron_tokscale.core.arrays import Floats, Integers
from megatron_tokscale.core.errors import TokscaleError

FITTED_FROM: Final = 0.6
"""Start of the fitted range, as a share of T. Our choice: the last 40% of the steps are half an
e-fold, in which a loss curve is a quadratic to within the noise of a probe."""
_LEAST_PROBES: Final = 4  # one more than the parameters of a quadratic


class AtEnd(NamedTuple):
    """A run's loss at T in nats, and its slope -dL/d ln t there."""

    loss: float
    slope: float


def at_end(step_K: Integers, loss_K: Floats, end: int) -> AtEnd:
    """Return the loss and the slope at step `end` of the quadratic in ln t over [0.6 end, end].

    Raises:
        TokscaleError: fewer than four probes lie in that range.
    """
    fitted_K = (step_K >= FITTED_FROM * end) & (step_K <= end)
    if fitted_K.sum() < _LEAST_PROBES:
        raise TokscaleError(
            f"{fitted_K.sum()} probes lie in the last 40% of {end} steps; expected "
            f"{_LEAST_PROBES} or more; probe more often"
        )
    u_K = np.log(step_K[fitted_K] / end)
    _, slope, loss = np.polyfit(u_K, loss_K[fitted_K], 2)
    return AtEnd(float(loss), -float(slope))


def first_passage(step_K: Integers, loss_K: Floats, target: float) -> float:
    """Return the step at which the smoothed loss first is `target`; NaN if it never is.

    The loss is the running median of three probes, on straight lines between them.
    """
    loss_K = smooth(loss_K)
    reached_K = loss_K <= target
    if not reached_K.any():
        return math.nan
    k = int(reached_K.argmax())
    if k == 0:
        return float(step_K[0])
    share = (loss_K[k - 1] - target) / (loss_K[k - 1] - loss_K[k])
    return float(step_K[k - 1] + share * (step_K[k] - step_K[k - 1]))


def smooth(loss_K: Floats) -> Floats:
    """Return the running median of three; the ends stay as they are."""
    inner_K = np.median([loss_K[:-2], loss_K[1:-1], loss_K[2:]], axis=0)
    return np.concatenate([loss_K[:1], inner_K, loss_K[-1:]])


def percent_faster(log_factor: float) -> float:
    """Return "X% faster" of a training that needs exp(-log_factor) of the steps."""
    return 100 * (1 - math.exp(-log_factor))


@dataclass(frozen=True, eq=False)
class Curve:
    """Validation loss of a run in nats at its probes."""

    step_K: Integers
    loss_K: Floats


@dataclass(frozen=True)
class Speed:
    """An arm against the uniform arm, seed by seed.

    Attributes:
        difference_S: loss at T less that of the uniform arm, in nats.
        faster_S: "X% faster" by the difference over the pooled slope.
        passage_S: "X% faster" by first passage; NaN where the run never arrives.
    """

    difference_S: list[float]
    faster_S: list[float]
    passage_S: list[float]


def compare(arm_S: Sequence[Curve], uniform_S: Sequence[Curve], end: int, slope: float) -> Speed:
    """Compare the curves of an arm with those of the uniform arm, paired by seed.

    Args:
        arm_S: curves of the arm.
        uniform_S: curves of the uniform arm for the same seeds.
        end: T in steps.
        slope: pooled slope of the uniform arm at T (`pooled_slope`).
    """
    speed = Speed([], [], [])
    for arm, uniform in zip(arm_S, uniform_S, strict=True):
        target = at_end(uniform.step_K, uniform.loss_K, end).loss
        difference = at_end(arm.step_K, arm.loss_K, end).loss - target
        steps = first_passage(arm.step_K, arm.loss_K, target)
        speed.difference_S.append(difference)
        speed.faster_S.append(percent_faster(-difference / slope))
        speed.passage_S.append(100 * (1 - steps / end))
    return speed


def pooled_slope(uniform_S: Sequence[Curve], end: int) -> float:
    """Return the mean over seeds of the uniform arm's slope at T, in nats per unit of ln t."""
    return float(np.mean([at_end(curve.step_K, curve.loss_K, end).slope for curve in uniform_S]))


def interval(values_S: Sequence[float]) -> tuple[float, float]:
    """Return the mean over seeds and half the width of its 95% interval.

    The interval is by Student's t with S - 1 degrees of freedom; one seed has a width of NaN.
    """
    n = len(values_S)
    if n < 2:
        return float(np.mean(values_S)), math.nan
    half = student_t.ppf(0.975, n - 1) * np.std(values_S, ddof=1) / math.sqrt(n)
    return float(np.mean(values_S)), float(half)


def describe(values_S: Sequence[float], digits: int = 1) -> str:
    """Format values over seeds as `mean [low, high]`."""
    if not len(values_S):
        return "-"
    mean, half = interval(values_S)
    if math.isnan(half):
        return f"{mean:.{digits}f}"
    return f"{mean:.{digits}f} [{mean - half:.{digits}f}, {mean + half:.{digits}f}]"


def describe_passage(values_S: Sequence[float], least: float) -> str:
    """Format as `describe`; if a seed never arrived (NaN), format a bound, with `least` for it.

    Args:
        values_S: "X% faster" by first passage.
        least: value of a run that arrives at its very last step.
    """
    if not np.isnan(values_S).any():
        return describe(values_S)
    return f"at most {np.nan_to_num(values_S, nan=least).mean():.1f}"
