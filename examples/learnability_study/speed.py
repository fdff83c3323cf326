"""How much sooner a run gets to where the baseline ends, and what three seeds say about it.

Shapes: K probes, D datasets, S seeds.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import t

from megatron_tokscale.core.arrays import Floats, Integers
from megatron_tokscale.store import Run


@dataclass(frozen=True, eq=False)
class Curve:
    """Validation losses of a run in nats: the mean of each dataset's watched tokens."""

    step_K: Integers
    loss_DK: Floats

    @staticmethod
    def of(run: Run) -> "Curve":
        probe_set = run.probe_set
        loss_NK = run.read_losses().astype(np.float64)
        datasets = range(len(probe_set.datasets))
        loss_DK = np.stack([loss_NK[probe_set.dataset_N == d].mean(axis=0) for d in datasets])
        return Curve(run.step_K, loss_DK)

    def blend_K(self, weight_D: Sequence[float]) -> Floats:
        """The datasets' losses by their weights, smoothed."""
        return smooth(np.average(self.loss_DK, axis=0, weights=weight_D))

    def at(self, step: int) -> Floats:
        """Smoothed losses of the datasets at a step."""
        return np.array([np.interp(step, self.step_K, smooth(loss_K)) for loss_K in self.loss_DK])


def smooth(loss_K: Floats) -> Floats:
    """Running median of three; the ends stay as they are."""
    inner_K = np.median([loss_K[:-2], loss_K[1:-1], loss_K[2:]], axis=0)
    return np.concatenate([loss_K[:1], inner_K, loss_K[-1:]])


def steps_to_reach(step_K: Integers, loss_K: Floats, target: float) -> float:
    """Where the loss first is `target`, on straight lines between probes; NaN: never in the run."""
    there_K = loss_K <= target
    if not there_K.any():
        return math.nan
    k = int(there_K.argmax())
    if k == 0:
        return float(step_K[0])
    share = (loss_K[k - 1] - target) / (loss_K[k - 1] - loss_K[k])
    return float(step_K[k - 1] + share * (step_K[k] - step_K[k - 1]))


def faster(steps: float, baseline_steps: int) -> float:
    """'X% faster': 100 (1 - steps / the baseline's steps)."""
    return 100 * (1 - steps / baseline_steps)


def interval(values_S: Sequence[float]) -> tuple[float, float]:
    """Mean over seeds, and half of its 95% interval by Student's t with S - 1 degrees of freedom.

    The half is NaN for one seed.
    """
    n = len(values_S)
    if n < 2:
        return float(np.mean(values_S)), math.nan
    half = t.ppf(0.975, n - 1) * np.std(values_S, ddof=1) / math.sqrt(n)
    return float(np.mean(values_S)), float(half)


def describe(values_S: Sequence[float], digits: int = 1) -> str:
    """`mean [low, high]`."""
    if not len(values_S):
        return "-"
    mean, half = interval(values_S)
    if math.isnan(half):
        return f"{mean:.{digits}f}"
    return f"{mean:.{digits}f} [{mean - half:.{digits}f}, {mean + half:.{digits}f}]"


def describe_censored(values_S: Sequence[float], least: float) -> str:
    """As `describe`; where a seed never arrived (NaN), a bound with `least` in its place."""
    if not np.isnan(values_S).any():
        return describe(values_S)
    return f"at most {np.nan_to_num(values_S, nan=least).mean():.1f}"


def describe_difference(method_S: Sequence[float], control_S: Sequence[float], least: float) -> str:
    """Paired differences over seeds; a bound where one side never arrived, none where both."""
    method, control = np.array(method_S), np.array(control_S)
    difference_S = np.nan_to_num(method, nan=least) - np.nan_to_num(control, nan=least)
    late_method, late_control = np.isnan(method).any(), np.isnan(control).any()
    if late_method and late_control:
        return "-"
    if late_method or late_control:
        return f"at {'most' if late_method else 'least'} {difference_S.mean():.1f}"
    return describe(difference_S)
