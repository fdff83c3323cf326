"""Statistics of the study: how much sooner a run reaches the baseline's loss, over seeds.

Shapes: K probes, D datasets, S seeds.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from scipy.stats import t

from megatron_tokscale.core.arrays import Floats, Integers
from megatron_tokscale.store import Run


@dataclass(frozen=True, eq=False)
class Curve:
    """Validation losses of a run in nats: the mean of each dataset's watched tokens."""

    step_K: Integers
    loss_DK: Floats

    @classmethod
    def from_run(cls, run: Run) -> Self:
        """Read the curves of a run."""
        probe_set = run.probe_set
        loss_NK = run.read_losses().astype(np.float64)
        datasets = range(len(probe_set.datasets))
        loss_DK = np.stack([loss_NK[probe_set.dataset_N == d].mean(axis=0) for d in datasets])
        return cls(run.step_K, loss_DK)

    def blend_K(self, weight_D: Sequence[float]) -> Floats:
        """Return the weighted mean of the datasets' losses, smoothed."""
        return smooth(np.average(self.loss_DK, axis=0, weights=weight_D))

    def at(self, step: int) -> Floats:
        """Return the smoothed losses of the datasets at a step."""
        return np.array([np.interp(step, self.step_K, smooth(loss_K)) for loss_K in self.loss_DK])


def smooth(loss_K: Floats) -> Floats:
    """Return the running median of three; the ends stay as they are."""
    inner_K = np.median([loss_K[:-2], loss_K[1:-1], loss_K[2:]], axis=0)
    return np.concatenate([loss_K[:1], inner_K, loss_K[-1:]])


def steps_to_reach(step_K: Integers, loss_K: Floats, target: float) -> float:
    """Return the step at which the loss first is `target`, on straight lines between probes.

    NaN if the run never reaches it.
    """
    reached_K = loss_K <= target
    if not reached_K.any():
        return math.nan
    k = int(reached_K.argmax())
    if k == 0:
        return float(step_K[0])
    share = (loss_K[k - 1] - target) / (loss_K[k - 1] - loss_K[k])
    return float(step_K[k - 1] + share * (step_K[k] - step_K[k - 1]))


def faster(steps: float, baseline_steps: int) -> float:
    """Return "X% faster": 100 (1 - steps / the baseline's steps)."""
    return 100 * (1 - steps / baseline_steps)


def interval(values_S: Sequence[float]) -> tuple[float, float]:
    """Return the mean over seeds and half the width of its 95% interval.

    The interval is by Student's t with S - 1 degrees of freedom; one seed has a width of NaN.
    """
    n = len(values_S)
    if n < 2:
        return float(np.mean(values_S)), math.nan
    half = t.ppf(0.975, n - 1) * np.std(values_S, ddof=1) / math.sqrt(n)
    return float(np.mean(values_S)), float(half)


def describe(values_S: Sequence[float], digits: int = 1) -> str:
    """Format values over seeds as `mean [low, high]`."""
    if not len(values_S):
        return "-"
    mean, half = interval(values_S)
    if math.isnan(half):
        return f"{mean:.{digits}f}"
    return f"{mean:.{digits}f} [{mean - half:.{digits}f}, {mean + half:.{digits}f}]"


def describe_censored(values_S: Sequence[float], least: float) -> str:
    """Format as `describe`; if a seed never arrived (NaN), format a bound, with `least` for it."""
    if not np.isnan(values_S).any():
        return describe(values_S)
    return f"at most {np.nan_to_num(values_S, nan=least).mean():.1f}"


def describe_difference(method_S: Sequence[float], control_S: Sequence[float], least: float) -> str:
    """Format paired differences over seeds: a bound if one side never arrived, "-" if both."""
    method, control = np.array(method_S), np.array(control_S)
    difference_S = np.nan_to_num(method, nan=least) - np.nan_to_num(control, nan=least)
    late_method, late_control = np.isnan(method).any(), np.isnan(control).any()
    if late_method and late_control:
        return "-"
    if late_method or late_control:
        return f"at {'most' if late_method else 'least'} {difference_S.mean():.1f}"
    return describe(difference_S)
