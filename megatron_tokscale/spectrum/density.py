"""The learning-time spectrum: density of events over x. An event counts once, or by its drop.

Shapes: N tokens, E events, K probe steps, G grid points, C bins of x, P periods.
"""

import math
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import ArrayLike

from megatron_tokscale.core.arrays import Floats, Integers, Mask
from megatron_tokscale.fit import SigmoidFits
from megatron_tokscale.spectrum.events import events_of

GRID_POINTS = 256  # points of x; the kernel, about a probe spacing wide, spans several of them
_BINS = 2048  # bins over the probed range: much narrower than the error of a midpoint
_COARSE = 8  # bins in one for model curves: 256 over the probed range, narrower than any kernel
PERIODS = 9
"""Periods with a kernel of their own: before the scored range, and eighths from its start to the
last probe. In planted worlds with a unigram phase, drops and times with one kernel give an R^2 of
-0.6 to 0.5 in the scored range, and with eight 0.4 to 0.9 (our choice)."""


@dataclass(frozen=True)
class Bins:
    """Bins of x: 2,048 over the probed range, and more on both sides for midpoints beyond it.

    Attributes:
        edges: their edges.
        x_C: their centres.
        inside_C: mask of the bins of the probed range.
    """

    edges: Floats
    x_C: Floats
    inside_C: Mask

    @classmethod
    def over(cls, x_K: Floats) -> Self:
        """Return the bins from one probe spacing before the first finite probe to one after."""
        low, high = finite_range(x_K)
        width = (high - low) / _BINS
        beyond = _COARSE * math.ceil(probe_spacing(x_K) / width / _COARSE)
        edges = low + width * np.arange(-beyond, _BINS + beyond + 1)
        centre = np.arange(-beyond, _BINS + beyond)
        x_C = np.asarray((edges[1:] + edges[:-1]) / 2, dtype=np.float64)
        return cls(edges.astype(np.float64), x_C, (centre >= 0) & (centre < _BINS))

    def index(self, x_E: Floats) -> Integers:
        """Return the bin of each x; an x outside of all bins is in the first or the last."""
        return np.searchsorted(self.edges[1:-1], x_E, side="right")

    def coarse(self, value_RC: Floats) -> Floats:
        """Return sums of values over eight neighbouring bins each, along the last axis."""
        return np.asarray(value_RC.reshape(*value_RC.shape[:-1], -1, _COARSE).sum(axis=-1))

    @property
    def coarse_x(self) -> Floats:
        """Centres of the eightfold bins of `coarse`."""
        return self.coarse(self.x_C) / _COARSE

    def coarse_period(self, from_x: float) -> Integers:
        """Return the period of each eightfold bin: 0 before `from_x`, then equal parts from 1 on.

        The last period has all that lies behind the last probe too.
        """
        low, high = self.edges[:-1][self.inside_C][0], self.edges[1:][self.inside_C][-1]
        starts = np.linspace(max(from_x, low), high, PERIODS)[:-1]
        return np.searchsorted(starts, self.coarse_x, side="right")

    def period(self, bin_E: Integers, from_x: float) -> Integers:
        """Return the period of each event by its bin, see `coarse_period`."""
        return np.asarray(self.coarse_period(from_x)[bin_E // _COARSE])


@dataclass(frozen=True)
class LearningTimeSpectrum:
    """Densities of learning times in the probed range, smoothed with a Gaussian (our choice).

    Attributes:
        x_G: grid of x.
        density_G: density of the events' midpoints per unit of x. It integrates to one, except for
            the part of the kernel beyond the ends of the range.
        drop_weighted_G: rho(x) of docs/references.md 1.4 in nats per unit of x: each event counts
            by its drop, divided by the number of all fitted tokens.
        bandwidth: standard deviation of the kernel: the median spacing of the probes, which is the
            error of a midpoint without a fit.
        n_events: events in the probed range.
        n_tokens: fitted tokens.
    """

    x_G: Floats
    density_G: Floats
    drop_weighted_G: Floats
    bandwidth: float
    n_events: int
    n_tokens: int

    @classmethod
    def from_fits(cls, fits: SigmoidFits, x_G: ArrayLike | None = None) -> Self:
        """Return the spectrum of all fitted tokens."""
        counted_N = fits.complete_N
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
        bins = Bins.over(x_K)
        count_C, drop_C = count_C[..., bins.inside_C], drop_C[..., bins.inside_C]
        grid_G = default_grid(x_K) if x_G is None else np.asarray(x_G, dtype=np.float64)
        bandwidth = probe_spacing(x_K)
        z_CG = (grid_G - bins.x_C[bins.inside_C][:, None]) / bandwidth
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


def probe_spacing(x_K: Floats) -> float:
    """Return the median distance of neighbouring finite probes in x."""
    return float(np.median(np.diff(x_K[np.isfinite(x_K)])))


def finite_range(x_K: Floats) -> tuple[float, float]:
    """Return the first and the last finite x."""
    finite = x_K[np.isfinite(x_K)]
    return float(finite[0]), float(finite[-1])


def default_grid(x_K: Floats) -> Floats:
    """Return a uniform grid over the probed range."""
    return np.linspace(*finite_range(x_K), GRID_POINTS)
