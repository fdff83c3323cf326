"""`tail_exponent`: how fast the drop-weighted learning-time spectrum falls towards late times.

If rho(x) ~ exp(-a x) in x = ln t then L - E ~ t^-a (papers.md 1.4). Shapes: G grid points.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import t as student_t

from megatron_tokscale.errors import TokscaleError

MIN_INDEPENDENT = 4.0
_PARAMETERS = 2

Array = NDArray[np.float64]


@dataclass(frozen=True)
class TailExponent:
    """rho(x) = const * exp(-exponent * x) between two x, with a 95% interval.

    Attributes:
        exponent: a; negative if the spectrum rises.
        se: its standard error, with the kernel's correlation of the grid points.
        interval: 95% interval, Student's t over the independent points.
        r2: weighted, of ln rho.
        from_x: start of the tail.
        to_x: end of the tail.
        n_independent: kernel widths in the tail, as equivalent independent points.
    """

    exponent: float
    se: float
    interval: tuple[float, float]
    r2: float
    from_x: float
    to_x: float
    n_independent: float


def tail_exponent(
    x_G: ArrayLike,
    drop_weighted_G: ArrayLike,
    *,
    from_x: float,
    to_x: float | None = None,
    bandwidth: float = 0.0,
) -> TailExponent:
    """Weighted regression of ln rho on x over a tail.

    Weights are rho itself, the inverse variance of ln rho up to a factor if tokens come
    independently. The spread about the line gives the error (sandwich), in which grid points within
    reach of the smoothing kernel count as correlated (autocorrelation exp(-(dx)^2 / 4 h^2)).

    Args:
        x_G: uniform grid of x, natural logarithm of time.
        drop_weighted_G: the drop-weighted spectrum there, in nats per unit of x.
        from_x: start of the tail.
        to_x: end of the tail; by default of the grid. Near the end of a run a spectrum is cut off
            by what the run did not see: stop before.
        bandwidth: standard deviation h of the Gaussian kernel the spectrum was smoothed with.

    Raises:
        TokscaleError: a spectrum that is not finite or negative, or too little of it in the tail.
    """
    x, rho = np.asarray(x_G, dtype=np.float64), np.asarray(drop_weighted_G, dtype=np.float64)
    end = float(x[-1]) if to_x is None else to_x
    if x.ndim != 1 or x.shape != rho.shape or not (np.isfinite(rho) & (rho >= 0)).all():
        raise TokscaleError("a spectrum needs one finite density, not negative, per grid point")
    tail_G = (x >= from_x) & (x <= end) & (rho > 0)
    x, rho = x[tail_G], rho[tail_G]
    n_independent = _independent_points(x, bandwidth)
    if n_independent < MIN_INDEPENDENT:
        raise TokscaleError(
            f"the spectrum from x = {from_x:.3g} to {end:.3g} has {n_independent:.1f} independent "
            f"points, a tail needs {MIN_INDEPENDENT:g}; start it earlier"
        )
    slope, se, r2 = _regress(x, np.log(rho), rho, bandwidth)
    reach = se * float(student_t.ppf(0.975, n_independent - _PARAMETERS))
    return TailExponent(
        exponent=-slope,
        se=se,
        interval=(-slope - reach, -slope + reach),
        r2=r2,
        from_x=float(x[0]),
        to_x=float(x[-1]),
        n_independent=n_independent,
    )


def _independent_points(x_G: Array, bandwidth: float) -> float:
    """Grid points, or the range over the kernel's correlation length 2 sqrt(pi) h if that is less.

    The integral of exp(-d^2 / 4 h^2) is 2 sqrt(pi) h.
    """
    if len(x_G) < 2 or bandwidth == 0:
        return float(len(x_G))
    return float(min(len(x_G), 1 + (x_G[-1] - x_G[0]) / (2 * np.sqrt(np.pi) * bandwidth)))


def _regress(
    x_G: Array, log_rho_G: Array, weight_G: Array, bandwidth: float
) -> tuple[float, float, float]:
    """Slope, its standard error, and R^2 of a weighted line."""
    w_G = weight_G / weight_G.sum()
    centred_G = x_G - w_G @ x_G
    reach = w_G @ centred_G**2
    slope = float(w_G @ (centred_G * log_rho_G) / reach)
    residual_G = log_rho_G - w_G @ log_rho_G - slope * centred_G
    score_G = w_G * centred_G * residual_G
    near_GG = np.exp(-((x_G[:, None] - x_G) ** 2) / (4 * max(bandwidth, 1e-9) ** 2))
    n = _independent_points(x_G, bandwidth)
    variance = float(score_G @ near_GG @ score_G / reach**2) * n / (n - _PARAMETERS)
    spread = w_G @ (log_rho_G - w_G @ log_rho_G) ** 2
    r2 = 1 - w_G @ residual_G**2 / spread if spread > 0 else 0.0
    return slope, math.sqrt(max(variance, 0.0)), float(r2)
