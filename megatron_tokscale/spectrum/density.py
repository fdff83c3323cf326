"""The learning-time spectrum: density of events over x. An event counts once, or by its drop.

Shapes: N tokens, E transitions, K probe steps, G grid points, C bins.
"""

from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import ArrayLike

from megatron_tokscale.core.arrays import Floats, Integers, Mask
from megatron_tokscale.fit import SigmoidFits, Transitions

GRID_POINTS = 256  # points of x; the kernel, about a probe spacing wide, spans several of them
_BINS = 2048  # bins over the probed range: much narrower than the error of a midpoint


@dataclass(frozen=True)
class Bins:
    """2,048 bins of x over the probed range.

    Attributes:
        edges: their edges.
        x_C: their centres.
    """

    edges: Floats
    x_C: Floats

    @classmethod
    def over(cls, x_K: Floats) -> Self:
        """Return the bins between the first and the last finite probe."""
        edges = np.linspace(*finite_range(x_K), _BINS + 1)
        return cls(edges, (edges[1:] + edges[:-1]) / 2)

    def index(self, x_E: Floats) -> Integers:
        """Return the bin of each x inside the range."""
        return np.searchsorted(self.edges[1:-1], x_E, side="right")


def events_of(fits: SigmoidFits) -> Transitions:
    """Return the learning events of the fitted tokens that miss no loss.

    An event is a falling transition with a trusted midpoint: the transition of a falling token, or
    either one of a two-step token if it falls. A rising, gradual or flat token has no event, and
    neither has a token whose midpoint is at a bound; but all these tokens count in every mean.
    """
    moves = fits.transitions
    return moves.rows(moves.placed_E & (moves.drop_E > 0) & fits.complete_N[moves.token_E])


@dataclass(frozen=True)
class LearningTimeSpectrum:
    """Densities of learning times, smoothed with a Gaussian kernel (our choice).

    Attributes:
        x_G: grid of x.
        density_G: density of the events' midpoints per unit of x. It integrates to one, except for
            the part of the kernel beyond the ends of the range.
        drop_weighted_G: rho(x) of docs/references.md 1.4 in nats per unit of x: each event counts
            by its drop, divided by the number of all fitted tokens.
        bandwidth: standard deviation of the kernel: the median spacing of the probes, which is the
            error of a midpoint without a fit.
        n_events: events counted.
        n_tokens: fitted tokens.
    """

    x_G: Floats
    density_G: Floats
    drop_weighted_G: Floats
    bandwidth: float
    n_events: int
    n_tokens: int

    @classmethod
    def from_fits(
        cls,
        fits: SigmoidFits,
        tokens_N: Mask | None = None,
        x_G: ArrayLike | None = None,
    ) -> Self:
        """Return the spectrum of all fitted tokens, or of those in the mask `tokens_N`."""
        counted_N = fits.complete_N if tokens_N is None else fits.complete_N & tokens_N
        events = events_of(fits)
        events = events.rows(counted_N[events.token_E])
        bins = Bins.over(fits.x_K)
        count_C, _ = np.histogram(events.midpoint_E, bins.edges)
        drop_C, _ = np.histogram(events.midpoint_E, bins.edges, weights=events.drop_E)
        n_tokens = int(counted_N.sum())
        share = 1 / max(n_tokens, 1)
        return cls.from_bins(
            fits.x_K, np.asarray(count_C * share), np.asarray(drop_C * share), n_tokens, x_G
        )

    @classmethod
    def from_bins(
        cls,
        x_K: Floats,
        count_C: Floats,
        drop_C: Floats,
        n_tokens: int,
        x_G: ArrayLike | None = None,
    ) -> Self:
        """Return the spectrum of events and drops per token in `Bins`; leading axes are kept."""
        grid_G = default_grid(x_K) if x_G is None else np.asarray(x_G, dtype=np.float64)
        bandwidth = float(np.median(np.diff(x_K[np.isfinite(x_K)])))
        z_CG = (grid_G - Bins.over(x_K).x_C[:, None]) / bandwidth
        kernel_CG = np.exp(-0.5 * z_CG**2) / (bandwidth * np.sqrt(2 * np.pi))
        events = count_C.sum(axis=-1, keepdims=True)
        return cls(
            x_G=grid_G,
            density_G=count_C @ kernel_CG / np.maximum(events, 1e-300),
            drop_weighted_G=drop_C @ kernel_CG,
            bandwidth=bandwidth,
            n_events=round(float(events.flat[0]) * n_tokens),
            n_tokens=n_tokens,
        )


def finite_range(x_K: Floats) -> tuple[float, float]:
    """Return the first and the last finite x."""
    finite = x_K[np.isfinite(x_K)]
    return float(finite[0]), float(finite[-1])


def default_grid(x_K: Floats) -> Floats:
    """Return a uniform grid over the probed range."""
    return np.linspace(*finite_range(x_K), GRID_POINTS)
