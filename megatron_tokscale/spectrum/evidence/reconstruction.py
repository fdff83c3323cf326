"""The slope -dL/dx reconstructed from the fits, in three ways, beside the measured slope.

- full: the mean over tokens of the slope of each token's class: a bump for a falling token, two for
  a two-step token, a negative one for a rising token; a constant slope after the onset for a
  gradual token; zero for a flat token.
- kernel: drops and times: every learning event keeps its drop and midpoint, and has the mean kernel
  of the events of its period (`Resampled.curves`).
- spectrum: times only: all events from the start of the scored range on have the same (mean) drop,
  and the mean kernel of their period.

(docs/references.md 1.4; for the events see `events_of`.) A measured slope is smoothed. For a
fair comparison each model is turned into a mean loss at the probes, and the same linear estimator
is applied to it (`SlopeEstimator`). On the tokens that were fitted, agreement of "full" is nearly
algebra and no evidence (docs/architecture.md 6).

The measured slope has noise that no model can predict. The ceiling is the R^2 that a perfect model
would reach: with the linear estimator D and noise of variance s^2 at every probe, a perfect model
misses by tr(D s^2 D^T) on average, while the squares of the measured slope around its mean already
contain the noise and need no correction for it. No R^2 is given where the ceiling is below one
half: noise has more of the slope's variance than the slope has. Nor is one given where the mean
losses do not differ from a straight line: by chance the noise alone then often looks like a slope
that varies, and its ceiling is too high.

Shapes: N tokens, K probe steps, J distinct x among them, G grid points, R resamples of the
documents (the first is the data as they are).
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from megatron_tokscale.core.arrays import Floats
from megatron_tokscale.fit import SigmoidFits
from megatron_tokscale.results.estimate import Estimate, Undefined
from megatron_tokscale.results.evidence import FallsByPart, ReconstructionScore, SlopeNoise
from megatron_tokscale.results.verdict import LEVEL
from megatron_tokscale.spectrum.density import GRID_POINTS
from megatron_tokscale.spectrum.derivative import SlopeEstimator
from megatron_tokscale.spectrum.sums import DocumentSums

NAMES = ("full", "kernel", "spectrum")
"""The reconstructions."""
LEAST_CEILING = 0.5
"""Ceiling below which the slope counts as not measured: the noise then has more of its variance
than the true slope has, so that a good and a bad model score alike (our choice)."""
_WITH_LEVEL = ("full",)  # reconstructions whose loss is known, and not only up to a constant
_PARTS = 8  # parts of the range of x: enough to see where a reconstruction misses (our choice)


@dataclass(frozen=True)
class Reconstruction:
    """One reconstruction beside the measured slope.

    Attributes:
        derivative_RG: -dL/dx in nats per unit of x, smoothed as the measured slope is.
        r2_R: share of the measured slope's variance over the grid that the reconstruction explains;
            negative if a constant explains more.
        loss_error_R: root mean square over the probes of its mean loss minus the measured one, in
            nats.
    """

    derivative_RG: Floats
    r2_R: Floats
    loss_error_R: Floats

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
    """The measured slope of each resample, and every reconstruction of it by name.

    Attributes:
        x_G: grid of the slope.
        measured_RG: -dL/dx of each resample, in nats per unit of x.
        by_name: the reconstructions.
        estimator: the estimator of all slopes, made from the data as they are.
        noise: the noise of the measured mean loss, and the ceiling.
    """

    x_G: Floats
    measured_RG: Floats
    by_name: dict[str, Reconstruction]
    estimator: SlopeEstimator
    noise: SlopeNoise

    @property
    def measured_G(self) -> Floats:
        """The measured slope of the data as they are."""
        return np.asarray(self.measured_RG[0])

    def scores(self) -> dict[str, ReconstructionScore]:
        """Return R^2, its ceiling and the error of the loss of every reconstruction."""
        return {name: self._score(each) for name, each in self.by_name.items()}

    def _score(self, each: Reconstruction) -> ReconstructionScore:
        reason = why_not_measured(self.noise)
        r2 = Estimate.from_resamples(each.r2_R, most=1) if reason is None else Undefined(reason)
        error = Estimate.from_resamples(each.loss_error_R, least=0)
        return ReconstructionScore(r2, self.noise.ceiling, error)

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
    fits: SigmoidFits, mean_loss_K: ArrayLike, *, x_G: ArrayLike | None = None
) -> Comparison:
    """Reconstruct the slope of a mean loss from fits.

    There is one row, R = 1: without documents there are no intervals.

    Args:
        fits: fits of the tokens.
        mean_loss_K: mean loss at the fits' probes in nats, of the same tokens or of others.
        x_G: grid of the slope; by default 256 points over the probes.

    Raises:
        UndefinedError: there are fewer than four probes, or no token is fitted at all probes.
    """
    no_losses_NK = np.zeros((len(fits), len(fits.x_K)), np.float32)
    block = (fits, no_losses_NK, np.zeros(len(fits), np.int32))
    sums = DocumentSums.from_blocks(fits.x_K, [block], 1, from_x=-np.inf)
    model = sums.resampled(fits.x_K, np.ones((1, 1)), from_x=-np.inf)
    loss_RK = np.asarray(mean_loss_K, dtype=np.float64)[None]
    return compare(fits.x_K, model.curves(), loss_RK, x_G)


def compare(
    x_K: Floats,
    curve_RK: dict[str, Floats],
    loss_RK: Floats,
    x_G: ArrayLike | None = None,
    *,
    from_x: float = -np.inf,
    to_x: float = np.inf,
    estimator: SlopeEstimator | None = None,
) -> Comparison:
    """Compare the slopes of model curves, by name, with the slope of `loss_RK`.

    All rows of all curves are smoothed by one estimator.

    Args:
        x_K: natural logarithm of time at the probes.
        curve_RK: mean losses of the models, by name.
        loss_RK: measured mean losses: the data as they are, then resamples of the documents.
        x_G: grid of the slope; by default 256 points over the probes that count.
        from_x: only probes with `from_x` <= x <= `to_x` count.
        to_x: see `from_x`.
        estimator: estimator of the slope; by default that of the first row of `loss_RK`.

    Raises:
        UndefinedError: fewer than four probes in the range.
    """
    if estimator is None:
        estimator = SlopeEstimator.from_curve(x_K, loss_RK[0], from_x=from_x, to_x=to_x)
    x_J = estimator.spline.x_J
    grid_G = np.linspace(x_J[0], x_J[-1], GRID_POINTS) if x_G is None else np.asarray(x_G, float)
    measured_RG = estimator.slopes(loss_RK, grid_G)
    by_name = {}
    for name, model_RK in curve_RK.items():
        derivative_RG = estimator.slopes(model_RK, grid_G)
        error_R = _loss_error((model_RK - loss_RK)[:, estimator.used_K], name in _WITH_LEVEL)
        by_name[name] = Reconstruction(
            derivative_RG, r_squared(measured_RG, derivative_RG), error_R
        )
    noise = slope_noise(estimator, loss_RK, grid_G)
    return Comparison(grid_G, measured_RG, by_name, estimator, noise)


def slope_noise(estimator: SlopeEstimator, loss_RK: Floats, x_G: Floats) -> SlopeNoise:
    """Return the noise of a mean loss curve, its parts, and the ceiling of R^2 of its slope.

    Args:
        estimator: the estimator of the curve's slope, made from the first row.
        loss_RK: mean losses of the data as they are, then of resamples of the documents.
        x_G: uniform grid of the slope.
    """
    spline = estimator.spline
    own_variance = estimator.own_noise_variance(loss_RK)
    ends = np.array([spline.noise, *spline.noise_interval])
    shared = np.sqrt(np.maximum(ends**2 - np.nan_to_num(own_variance), 0))
    weights_GK = estimator.weights(x_G)
    slope_G = weights_GK @ np.where(estimator.used_K, loss_RK[0], 0.0)
    miss = float((weights_GK**2).sum()) / max(
        float(((slope_G - slope_G.mean()) ** 2).sum()), 1e-300
    )
    low, high = (1 - end**2 * miss for end in reversed(spline.noise_interval))
    ceiling = float(np.clip(1 - spline.noise_variance * miss, low, high))
    return SlopeNoise(
        probes=int(estimator.used_K.sum()),
        freedom=spline.freedom,
        noise=_estimate(ends),
        own=float(np.sqrt(own_variance)),
        shared=_estimate(shared),
        lag_one_correlation=estimator.lag_one_correlation,
        ceiling=Estimate(ceiling, low, high, ceiling),
        straight_p_value=spline.straight_p_value,
    )


def _estimate(ends: Floats) -> Estimate:
    """Return an estimate from its value, its lower and its upper end."""
    value, low, high = ends.tolist()
    return Estimate(value, low, high, value)


def why_not_measured(noise: SlopeNoise) -> str | None:
    """Return why R^2 of the slope says nothing, or None if it says something."""
    at = f"on noise of {noise.noise.value:.2g} nats at {noise.probes} probes"
    if noise.ceiling.value < LEAST_CEILING:
        ceiling = noise.ceiling.value
        return (
            f"the slope cannot be measured: {at} a perfect model would reach an R^2 "
            f"{f'of {ceiling:.2f}' if ceiling >= 0 else 'below 0'}; at least {LEAST_CEILING} is "
            "needed"
        )
    if noise.straight_p_value > LEVEL:
        return (
            f"the slope cannot be measured: {at} the mean loss is not told from a straight line "
            f"in x (p = {noise.straight_p_value:.2f}; at most {LEVEL} is needed)"
        )
    return None


def _loss_error(miss_RK: Floats, with_level: bool) -> Floats:
    """Return the root mean square of each row, less its mean if the level is not known."""
    level_R1 = 0.0 if with_level else miss_RK.mean(axis=1, keepdims=True)
    return np.asarray(np.sqrt(((miss_RK - level_R1) ** 2).mean(axis=1)))


def r_squared(measured_RG: Floats, derivative_RG: Floats) -> Floats:
    """Return R^2 over a uniform grid for each row; NaN where it is not defined."""
    miss_RG = measured_RG - derivative_RG
    around_RG = measured_RG - measured_RG.mean(axis=-1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(1 - (miss_RG**2).sum(axis=-1) / (around_RG**2).sum(axis=-1))
