"""`tail_exponent`: how fast the drop-weighted learning-time spectrum falls towards late times.

If rho(x) ~ exp(-a x) in x = ln t then L - E ~ t^-a (papers.md 1.4). Shapes: R resamples of the
documents (the first is the data as they are), C bins of x, U values of a times the tail's length.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from megatron_tokscale.core.arrays import Floats
from megatron_tokscale.core.errors import TokscaleError, UndefinedError

_STEEPEST = 200.0
_STEPS = 40_001
_LEAST_BINS = 8


@dataclass(frozen=True)
class TailExponent:
    """rho(x) = const * exp(-exponent * x) between two x.

    Attributes:
        exponent_R: a of each resample; negative where the spectrum rises, NaN where it is empty.
        from_x: start of the tail.
        to_x: end of the tail.
        share: of the drop of all events that is in the tail.
    """

    exponent_R: Floats
    from_x: float
    to_x: float
    share: float

    @property
    def exponent(self) -> float:
        """a of the data as they are."""
        return float(self.exponent_R[0])


def tail_exponent(
    x_C: ArrayLike, drop_RC: ArrayLike, *, from_x: float, to_x: float
) -> TailExponent:
    """Maximum likelihood of a truncated exponential, each event weighted by its drop.

    With m the drop-weighted mean of x - from_x over the tail and h = to_x - from_x, the exponent
    solves m = 1/a - h/(e^(a h) - 1): Hill's estimator with both ends cut. The spread of the
    resamples is that of events which come by documents; it needs no smoothing.

    Args:
        x_C: centres of uniform bins of x, natural logarithm of time.
        drop_RC: drop of the events in each bin.
        from_x: start of the tail.
        to_x: end of the tail. Near the end of a run a spectrum is cut off by what the run did not
            see: stop before.

    Raises:
        TokscaleError: the arguments do not fit together.
        UndefinedError: drops that are not finite or negative, or a tail without events.
    """
    x, drop_RC = np.asarray(x_C, dtype=np.float64), np.asarray(drop_RC, dtype=np.float64)
    if x.ndim != 1 or drop_RC.ndim != 2 or drop_RC.shape[1:] != x.shape:
        raise TokscaleError(f"drops of shape {drop_RC.shape} do not match {x.shape} bins")
    if not (np.isfinite(drop_RC[0]) & (drop_RC[0] >= 0)).all():
        raise UndefinedError("a spectrum needs finite drops that are not negative")
    inside_C = (x >= from_x) & (x <= to_x)
    inside_RC = drop_RC[:, inside_C]
    if inside_C.sum() < _LEAST_BINS or (inside_RC[0] > 0).sum() < 2:
        raise UndefinedError(
            f"no learning times to speak of from x = {from_x:.3g} to {to_x:.3g}: no tail; start "
            "it earlier"
        )
    half_bin = (x[1] - x[0]) / 2
    low, high = x[inside_C][0] - half_bin, x[inside_C][-1] + half_bin
    with np.errstate(invalid="ignore"):
        mean_R = inside_RC @ (x[inside_C] - low) / inside_RC.sum(axis=1)
    return TailExponent(
        exponent_R=_solve(mean_R / (high - low)) / (high - low),
        from_x=float(low),
        to_x=float(high),
        share=float(inside_RC[0].sum() / drop_RC[0].sum()),
    )


def _solve(mean_R: Floats) -> Floats:
    """u with mean = 1/u - 1/(e^u - 1), which falls from one to zero; linear in a fine table."""
    u_U = np.linspace(-_STEEPEST, _STEEPEST, _STEPS)
    near = np.abs(u_U) < 1e-3
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        mean_U = np.where(near, 0.5 - u_U / 12, 1 / u_U - 1 / np.expm1(u_U))
    return np.interp(-mean_R, -mean_U, u_U)
