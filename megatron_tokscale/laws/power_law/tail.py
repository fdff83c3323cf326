"""Exponent of the tail of the drop-weighted spectrum, compared with the exponent of the loss.

If rho(x) ~ exp(-a x) in x = ln t then L - E ~ t^-a (docs/references.md 1.4). Shapes: R resamples
of the documents (the first is the data as they are), C bins of x, U values of a times the tail's
length.
"""

import math

import numpy as np
from numpy.typing import ArrayLike

from megatron_tokscale.core.arrays import Floats
from megatron_tokscale.core.errors import TokscaleError, UndefinedError
from megatron_tokscale.laws.estimates import Z_95, symmetric_estimate
from megatron_tokscale.laws.inputs import Inputs
from megatron_tokscale.results.estimate import Estimate
from megatron_tokscale.results.laws import LossPowerLaw, TailExponent, TailMinusLaw

_STEEPEST = 200.0  # greatest solution for a times the tail's length
_STEPS = 40_001  # entries in the table of solutions, 0.01 apart
_DECADE = math.log(10)  # least length of a tail, in ln(time); our choice
_ROUNDING = 1e-6  # of that length
_LEAST_BINS = 8  # our choice: with fewer the slope depends on the bins' edges


def tail_exponent(
    x_C: ArrayLike, drop_RC: ArrayLike, *, from_x: float, to_x: float
) -> TailExponent:
    """Fit a truncated exponential by maximum likelihood, each event weighted by its drop.

    Let m be the drop-weighted mean of x - from_x over the tail, and h = to_x - from_x. The exponent
    a solves m = 1/a - h/(e^(a h) - 1): Hill's estimator for a tail with two ends. The histogram
    needs no smoothing.

    Args:
        x_C: centres of uniform bins of x, natural logarithm of time.
        drop_RC: drop of the events in each bin.
        from_x: start of the tail.
        to_x: end of the tail. Transitions that end after the run are censored, so the spectrum is
            too low near the end of the run: give an earlier end.

    Raises:
        TokscaleError: the arguments do not fit together.
        UndefinedError: drops are negative or not finite, or hardly any events are in the tail.
    """
    x, drop_RC = np.asarray(x_C, dtype=np.float64), np.asarray(drop_RC, dtype=np.float64)
    if x.ndim != 1 or drop_RC.ndim != 2 or drop_RC.shape[1:] != x.shape:
        raise TokscaleError(
            f"drops of shape {drop_RC.shape} do not match {x.shape} bins; expected a row per "
            "resample and a column per bin"
        )
    if not (np.isfinite(drop_RC[0]) & (drop_RC[0] >= 0)).all():
        raise UndefinedError("drops of the spectrum are negative or not finite; fit the run again")
    inside_C = (x >= from_x) & (x <= to_x)
    inside_RC = drop_RC[:, inside_C]
    if inside_C.sum() < _LEAST_BINS or (inside_RC[0] > 0).sum() < 2:
        raise UndefinedError(
            f"hardly any learning times lie from x = {from_x:.3g} to {to_x:.3g}, so there is no "
            "tail; start it earlier"
        )
    half_bin = (x[1] - x[0]) / 2
    low, high = x[inside_C][0] - half_bin, x[inside_C][-1] + half_bin
    with np.errstate(invalid="ignore"):
        mean_R = inside_RC @ (x[inside_C] - low) / inside_RC.sum(axis=1)
    exponent_R = _exponent_of_mean(mean_R / (high - low)) / (high - low)
    return TailExponent(
        exponent=Estimate.from_resamples(exponent_R),
        exponent_R=tuple(exponent_R.tolist()),
        from_x=float(low),
        to_x=float(high),
        share=float(inside_RC[0].sum() / drop_RC[0].sum()),
    )


def measure_tail(inputs: Inputs, start: float | None) -> TailExponent:
    """Return the exponent of a run's tail, up to `inputs.margin` before the last probe.

    Args:
        inputs: arrays of the run's spectrum.
        start: time at which the tail starts; by default a decade before its end.

    Raises:
        UndefinedError: the tail is shorter than a decade of time, or as in `tail_exponent`.
    """
    last = inputs.last_x - inputs.margin
    first = last - _DECADE - _ROUNDING if start is None else math.log(start)
    first = max(first, inputs.first_x)
    if last - first < _DECADE - _ROUNDING:
        raise UndefinedError(
            f"the tail of the spectrum is {max(last - first, 0) / _DECADE:.2g} decades of time "
            "long; expected 1 or more, as a shorter one shows no exponent; train for longer or "
            "start the tail earlier"
        )
    return tail_exponent(inputs.x_C, inputs.drop_RC, from_x=first, to_x=last)


def compare_tail(tail: TailExponent, law: LossPowerLaw) -> TailMinusLaw:
    """Return the tail's exponent minus the loss's exponent, paired by resample of the documents.

    Resamples of documents do not show the scatter of the probes about the law. The standard error
    from that scatter is added in quadrature.

    Args:
        tail: tail of the spectrum.
        law: power law of the loss of the same tokens, from the start of the tail on.

    Raises:
        UndefinedError: there are no resamples.
    """
    difference_R = np.subtract(tail.exponent_R, law.exponent_R)
    drawn_R = difference_R[1:][np.isfinite(difference_R[1:])]
    if len(drawn_R) < 2:
        raise UndefinedError(
            "the difference of the exponents has no interval without resamples of the documents; "
            "watch tokens of two documents or more"
        )
    se = float(np.hypot(drawn_R.std(ddof=1), law.law.exponent_se))
    return TailMinusLaw(symmetric_estimate(float(difference_R[0]), Z_95 * se), se, law)


def _exponent_of_mean(mean_R: Floats) -> Floats:
    """Return u with mean = 1/u - 1/(e^u - 1), interpolated in a fine table.

    The mean falls from one to zero as u rises.
    """
    u_U = np.linspace(-_STEEPEST, _STEEPEST, _STEPS)
    near = np.abs(u_U) < 1e-3
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        mean_U = np.where(near, 0.5 - u_U / 12, 1 / u_U - 1 / np.expm1(u_U))
    return np.interp(-mean_R, -mean_U, u_U)
