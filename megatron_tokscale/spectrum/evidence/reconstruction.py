"""The slope -dL/dx reconstructed from the fits, in three ways, beside the measured slope.

- full: the mean over tokens of the slope of each token's class: a bump for a falling token, two for
  a two-step token, a negative one for a rising token; a constant slope after the onset for a
  gradual token; zero for a flat token.
- kernel: the drop-weighted spectrum with one common kernel: every learning event keeps its drop and
  midpoint, and all have the same width.
- spectrum: learning times alone: all events have the same (mean) drop and the same width.

(docs/references.md 1.4; for the events see `events_of`.) A measured slope is smoothed. For a
fair comparison each model is turned into a mean loss at the probes, and the same linear estimator
is applied to it. On the tokens that were fitted, agreement of "full" is nearly algebra and no
evidence (docs/architecture.md 6).

Shapes: N tokens, K probe steps, G grid points, R resamples of the documents (the first is the data
as they are).
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from megatron_tokscale.core.arrays import Floats, Mask
from megatron_tokscale.fit import SigmoidFits
from megatron_tokscale.results.estimate import Estimate
from megatron_tokscale.results.evidence import FallsByPart
from megatron_tokscale.spectrum.density import default_grid
from megatron_tokscale.spectrum.derivative import derivative_weights
from megatron_tokscale.spectrum.sums import DocumentSums

NAMES = ("full", "kernel", "spectrum")
"""The reconstructions."""
_PARTS = 8  # parts of the range of x: enough to see where a reconstruction misses (our choice)


@dataclass(frozen=True)
class Reconstruction:
    """One reconstruction beside the measured slope.

    Attributes:
        derivative_RG: -dL/dx in nats per unit of x, smoothed as the measured slope is.
        r2_R: share of the measured slope's variance over the grid that the reconstruction explains;
            negative if a constant explains more.
    """

    derivative_RG: Floats
    r2_R: Floats

    @property
    def derivative_G(self) -> Floats:
        """The slope of the data as they are."""
        return np.asarray(self.derivative_RG[0])

    @property
    def r2(self) -> float:
        """R^2 of the data as they are."""
        return float(self.r2_R[0])


@dataclass(frozen=True)
class Comparison:
    """The measured slope of each resample, and every reconstruction of it by name."""

    x_G: Floats
    measured_RG: Floats
    by_name: dict[str, Reconstruction]

    @property
    def measured_G(self) -> Floats:
        """The measured slope of the data as they are."""
        return np.asarray(self.measured_RG[0])

    def r2(self) -> dict[str, Estimate]:
        """Return R^2 of every reconstruction with its interval."""
        return {
            name: Estimate.from_resamples(each.r2_R, most=1) for name, each in self.by_name.items()
        }

    def falls(self) -> FallsByPart:
        """Return the fall in nats within each eighth of the range, measured and reconstructed."""
        edges = np.linspace(self.x_G[0], self.x_G[-1], _PARTS + 1)
        return FallsByPart(
            edges=tuple(edges.tolist()),
            measured=self._falls_between(edges, self.measured_G),
            by_name={
                name: self._falls_between(edges, each.derivative_G)
                for name, each in self.by_name.items()
            },
        )

    def _falls_between(self, edges: Floats, slope_G: Floats) -> tuple[float, ...]:
        """Return the integrals of a slope between neighbouring edges, by the trapezoidal rule."""
        fallen_G = np.cumsum((slope_G[1:] + slope_G[:-1]) / 2 * np.diff(self.x_G))
        at_edges = np.interp(edges, self.x_G, np.concatenate([[0.0], fallen_G]))
        return tuple(np.diff(at_edges).tolist())


def reconstruct(
    fits: SigmoidFits,
    mean_loss_K: ArrayLike,
    *,
    tokens_N: Mask | None = None,
    x_G: ArrayLike | None = None,
) -> Comparison:
    """Reconstruct the slope of a mean loss from fits.

    There is one row, R = 1: without documents there are no intervals.

    Args:
        fits: fits of the tokens.
        mean_loss_K: mean loss at the fits' probes in nats, of the same tokens or of others.
        tokens_N: mask of the tokens to reconstruct from; by default all.
        x_G: grid of the slope; by default 256 points over the probed range.

    Raises:
        UndefinedError: fewer than four finite probes, or no token is fitted at all probes.
    """
    fits = fits if tokens_N is None else fits.rows(tokens_N)
    no_losses_NK = np.zeros((len(fits), len(fits.x_K)), np.float32)
    block = (fits, no_losses_NK, np.zeros(len(fits), np.int32))
    model = DocumentSums.from_blocks(fits.x_K, [block], 1).resampled(fits.x_K, np.ones((1, 1)))
    loss_RK = np.asarray(mean_loss_K, dtype=np.float64)[None]
    return compare(fits.x_K, model.curves(), loss_RK, x_G)


def compare(
    x_K: Floats, curve_RK: dict[str, Floats], loss_RK: Floats, x_G: ArrayLike | None = None
) -> Comparison:
    """Compare the slopes of model curves, by name, with the slope of `loss_RK`."""
    grid_G = default_grid(x_K) if x_G is None else np.asarray(x_G, dtype=np.float64)
    weights_KG = derivative_weights(x_K, grid_G).T
    measured_RG = loss_RK @ weights_KG
    derivatives = {name: curve_RK @ weights_KG for name, curve_RK in curve_RK.items()}
    by_name = {
        name: Reconstruction(derivative_RG, r_squared(measured_RG, derivative_RG))
        for name, derivative_RG in derivatives.items()
    }
    return Comparison(grid_G, measured_RG, by_name)


def r_squared(measured_RG: Floats, derivative_RG: Floats) -> Floats:
    """Return R^2 over a uniform grid for each row; NaN where it is not defined."""
    miss_RG = measured_RG - derivative_RG
    around_RG = measured_RG - measured_RG.mean(axis=-1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(1 - (miss_RG**2).sum(axis=-1) / (around_RG**2).sum(axis=-1))
