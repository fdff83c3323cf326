"""The learning-time spectrum: the density of learning times over x, plain and weighted by drop.

Shapes: N tokens, E transitions, G grid points, C bins.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from megatron_tokscale.fit import SigmoidFits

GRID_POINTS = 256
_BINS = 4096

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Events:
    """The learning events of a set of tokens, in bins of x.

    An event is a falling transition whose midpoint can be trusted: that of a falling token, or
    either of a two-step token that falls. Forgetting, gradual and flat tokens are no events, nor is
    a midpoint at a bound; they stay in the number of tokens that a mean is over.

    Attributes:
        x_C: centres of the bins.
        count_C: events per bin.
        drop_C: sum of the events' drops per bin, in nats.
        n_tokens: fitted tokens, with an event or without.
        common_width: drop-weighted median of the events' widths w; NaN if there are none.
    """

    x_C: Array
    count_C: Array
    drop_C: Array
    n_tokens: int
    common_width: float

    @staticmethod
    def of(fits: SigmoidFits, tokens_N: NDArray[np.bool_] | None = None) -> "Events":
        """Collect the events of all fitted tokens, or of those in the mask `tokens_N`."""
        fitted_N = fits.complete_N
        if tokens_N is not None:
            fitted_N &= tokens_N
        moves = fits.transitions
        counted_E = moves.placed_E & (moves.drop_E > 0) & fitted_N[moves.token_E]
        midpoint_E, drop_E = moves.midpoint_E[counted_E], moves.drop_E[counted_E]
        low, high = finite_range(fits.x_K)
        edges = np.linspace(low, high, _BINS + 1)
        count_C, _ = np.histogram(midpoint_E, edges)
        drop_C, _ = np.histogram(midpoint_E, edges, weights=drop_E)
        width = weighted_quantile(moves.width_E[counted_E], drop_E, 0.5)
        return Events(
            (edges[1:] + edges[:-1]) / 2,
            count_C.astype(np.float64),
            drop_C,
            int(fitted_N.sum()),
            float(width),
        )


@dataclass(frozen=True)
class LearningTimeSpectrum:
    """Densities of learning times, smoothed with a Gaussian kernel (our choice).

    Attributes:
        x_G: grid of x.
        density_G: density of the events' midpoints per unit of x; integrates to one, but for what
            the kernel carries over the ends of the range.
        drop_weighted_G: rho(x) of papers.md 1.4 in nats per unit of x: each event counts by its
            drop, over the number of all fitted tokens.
        bandwidth: standard deviation of the kernel: the median spacing of the probes, which
            is as well as they resolve a midpoint without a fit.
        n_events: events counted.
        n_tokens: fitted tokens.
    """

    x_G: Array
    density_G: Array
    drop_weighted_G: Array
    bandwidth: float
    n_events: int
    n_tokens: int

    @staticmethod
    def of(
        fits: SigmoidFits,
        tokens_N: NDArray[np.bool_] | None = None,
        x_G: ArrayLike | None = None,
    ) -> "LearningTimeSpectrum":
        """The spectrum of all fitted tokens, or of those in the mask `tokens_N`."""
        events = Events.of(fits, tokens_N)
        grid_G = default_grid(fits.x_K) if x_G is None else np.asarray(x_G, dtype=np.float64)
        bandwidth = float(np.median(np.diff(fits.x_K[np.isfinite(fits.x_K)])))
        z_GC = (grid_G[:, None] - events.x_C) / bandwidth
        kernel_GC = np.exp(-0.5 * z_GC**2) / (bandwidth * np.sqrt(2 * np.pi))
        n_events = int(events.count_C.sum())
        return LearningTimeSpectrum(
            x_G=grid_G,
            density_G=kernel_GC @ events.count_C / max(n_events, 1),
            drop_weighted_G=kernel_GC @ events.drop_C / max(events.n_tokens, 1),
            bandwidth=bandwidth,
            n_events=n_events,
            n_tokens=events.n_tokens,
        )


def finite_range(x_K: Array) -> tuple[float, float]:
    """The first and the last finite x."""
    finite = x_K[np.isfinite(x_K)]
    return float(finite[0]), float(finite[-1])


def default_grid(x_K: Array) -> Array:
    """A uniform grid over the probed range."""
    return np.linspace(*finite_range(x_K), GRID_POINTS)


def weighted_quantile(value_E: Array, weight_E: Array, share: ArrayLike) -> Array:
    """The smallest values that at least `share` of the weight does not exceed; NaN if empty."""
    shares = np.asarray(share, dtype=np.float64)
    if not len(value_E) or weight_E.sum() <= 0:
        return np.full(shares.shape, np.nan)
    order = np.argsort(value_E)
    below_E = np.cumsum(weight_E[order]) / weight_E.sum()
    index = np.searchsorted(below_E, shares - 1e-12)
    return np.asarray(value_E[order][np.minimum(index, len(value_E) - 1)], dtype=np.float64)
