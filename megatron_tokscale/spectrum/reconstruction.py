"""-dL/dx put together from the fits, three ways, against the measured one.

- full: the mean over tokens of the model of each token's class: its own bump, two bumps for
  two-step tokens, a negative one for rising tokens, a constant after the onset for gradual ones,
  none for flat ones.
- kernel: the drop-weighted spectrum with one common kernel: every learning event keeps its drop and
  midpoint, all have the same width.
- spectrum: learning times alone: all events have the same (mean) drop and the same width.

(papers.md 1.4; which tokens are events: `Events`.) A measured derivative is smoothed. For a fair
comparison each model is turned into a mean loss at the probes, and the very same linear estimator
is applied to it. On the tokens that were fitted, "full" is nearly algebra: it is no evidence
(design.md 6).

Shapes: N tokens, K probe steps, G grid points, C bins.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import expit

from megatron_tokscale.fit import SigmoidFits, TokenClass
from megatron_tokscale.spectrum.density import Array, Events, default_grid
from megatron_tokscale.spectrum.derivative import derivative_weights, measured_derivative

NAMES = ("full", "kernel", "spectrum")
_VALUES_PER_BLOCK = 2**21


@dataclass(frozen=True)
class Reconstruction:
    """One reconstruction beside the measured derivative.

    Attributes:
        derivative_G: -dL/dx in nats per unit of x, smoothed as the measured one is.
        r2: share of the measured derivative's variance over the grid that it explains; negative if
            a constant does better.
        relative_l1: integral of |measured - derivative| over that of |measured|.
    """

    derivative_G: Array
    r2: float
    relative_l1: float


@dataclass(frozen=True)
class Comparison:
    """The measured derivative, its standard error, and every reconstruction of it by name."""

    x_G: Array
    measured_G: Array
    measured_se_G: Array
    by_name: dict[str, Reconstruction]


def reconstruct(
    fits: SigmoidFits,
    mean_loss_K: ArrayLike,
    *,
    tokens_N: NDArray[np.bool_] | None = None,
    x_G: ArrayLike | None = None,
) -> Comparison:
    """Reconstruct the derivative of `mean_loss_K` from fits (all of them, or the mask `tokens_N`).

    `mean_loss_K` (nats, at the fits' probes) may be of the same tokens or of others.

    Raises:
        TokscaleError: fewer than seven finite probes.
    """
    grid_G = default_grid(fits.x_K) if x_G is None else np.asarray(x_G, dtype=np.float64)
    measured_G, error_G = measured_derivative(fits.x_K, mean_loss_K, grid_G)
    weights_GK = derivative_weights(fits.x_K, grid_G)
    by_name = {}
    for name, loss_K in model_curves(fits, tokens_N).items():
        derivative_G = weights_GK @ loss_K
        by_name[name] = Reconstruction(derivative_G, *agreement(measured_G, derivative_G))
    return Comparison(grid_G, measured_G, error_G, by_name)


def model_curves(fits: SigmoidFits, tokens_N: NDArray[np.bool_] | None = None) -> dict[str, Array]:
    """Mean loss at the probes by each reconstruction, up to a constant for all but "full"."""
    events = Events.of(fits, tokens_N)
    total = max(events.n_tokens, 1)
    curves = {"full": _mean_prediction(fits, tokens_N)}
    if not events.count_C.any():
        return curves | dict.fromkeys(("kernel", "spectrum"), np.zeros(len(fits.x_K)))
    s_KC = expit((events.x_C - fits.x_K[:, None]) / events.common_width)
    mean_drop = events.drop_C.sum() / events.count_C.sum()
    return curves | {
        "kernel": s_KC @ events.drop_C / total,
        "spectrum": s_KC @ events.count_C * mean_drop / total,
    }


def full_derivative(
    fits: SigmoidFits, x_G: ArrayLike, tokens_N: NDArray[np.bool_] | None = None
) -> Array:
    """The exact, unsmoothed -dL/dx of the class models at `x_G`, in nats per unit of x."""
    x_G = np.asarray(x_G, dtype=np.float64)
    total_G = np.zeros(len(x_G))
    n_tokens = 0
    for part in _fitted_blocks(fits, tokens_N, len(x_G)):
        moves = part.transitions
        s_EG = expit((moves.midpoint_E[:, None] - x_G) / moves.width_E[:, None])
        total_G += (moves.drop_E / moves.width_E) @ (s_EG * (1 - s_EG))
        gradual = part.is_class(TokenClass.GRADUAL)
        total_G -= part.slope_N[gradual].astype(np.float64) @ (x_G > part.onset_N[gradual, None])
        n_tokens += len(part)
    return total_G / max(n_tokens, 1)


def agreement(measured_G: Array, derivative_G: Array) -> tuple[float, float]:
    """R^2 and relative L1 error over a uniform grid."""
    miss_G = measured_G - derivative_G
    around_mean = ((measured_G - measured_G.mean()) ** 2).sum()
    r2 = 1 - (miss_G**2).sum() / around_mean if around_mean else np.nan
    size = np.abs(measured_G).sum()
    return float(r2), float(np.abs(miss_G).sum() / size if size else np.nan)


def _mean_prediction(fits: SigmoidFits, tokens_N: NDArray[np.bool_] | None) -> Array:
    total_K, n_tokens = np.zeros(len(fits.x_K)), 0
    for part in _fitted_blocks(fits, tokens_N, len(fits.x_K)):
        total_K += part.predict(fits.x_K).sum(axis=0)
        n_tokens += len(part)
    return total_K / max(n_tokens, 1)


def _fitted_blocks(
    fits: SigmoidFits, tokens_N: NDArray[np.bool_] | None, n_points: int
) -> Iterator[SigmoidFits]:
    """The fitted tokens by blocks."""
    fitted_N = fits.complete_N
    index_N = np.flatnonzero(fitted_N if tokens_N is None else fitted_N & tokens_N)
    block = max(_VALUES_PER_BLOCK // n_points, 1)
    for start in range(0, len(index_N), block):
        yield fits.rows(index_N[start : start + block])
