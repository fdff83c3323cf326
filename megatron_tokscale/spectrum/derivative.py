"""The slope -dL/dx of a mean loss curve, with a bandwidth that follows from the curve's noise.

A mean over many tokens has two kinds of noise: the tokens' own, which the mean makes small, and
the noise that all tokens of a probe share (a lucky or unlucky state of the weights), which no
number of tokens makes smaller. The curve is smoothed by a smoothing spline whose smoothness and
noise come from the curve itself by REML (`core.smoothing`), so probes that are dense in x do not
turn their noise into slope. The estimate is linear in the losses: a model's curve, the curves of
resamples and those of groups are smoothed by the same operator.

Shapes: K probe steps, J distinct x among them, G grid points, R resamples.
"""

from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import ArrayLike

from megatron_tokscale.core.arrays import Floats, Mask
from megatron_tokscale.core.errors import UndefinedError
from megatron_tokscale.core.smoothing import LEAST_POINTS, SmoothingSpline


@dataclass(frozen=True)
class SlopeEstimator:
    """A linear estimator of -dL/dx, made for the noise of one mean loss curve.

    Attributes:
        used_K: mask of the probes that count: those after step 0 and inside the scored range.
        loss_K: the mean loss that the estimator was made from, in nats.
        spline: the smoothing spline over the probes that count.
    """

    used_K: Mask
    loss_K: Floats
    spline: SmoothingSpline

    @classmethod
    def from_curve(
        cls,
        x_K: ArrayLike,
        mean_loss_K: ArrayLike,
        *,
        from_x: float = -np.inf,
        to_x: float = np.inf,
    ) -> Self:
        """Make the estimator of a mean loss curve from its probes with `from_x` <= x <= `to_x`.

        Step 0 (x = -inf) is left out: it has no place on the axis. Several probes may have the same
        x, as runs of the same size on an axis have.

        Args:
            x_K: natural logarithm of time, or of another size, in any order.
            mean_loss_K: mean loss in nats; probes where it is not finite are left out.
            from_x: start of the range.
            to_x: its end.

        Raises:
            UndefinedError: fewer than four probes in the range.
        """
        x_K = np.asarray(x_K, dtype=np.float64)
        loss_K = np.asarray(mean_loss_K, dtype=np.float64)
        used_K = np.isfinite(x_K) & np.isfinite(loss_K) & (x_K >= from_x) & (x_K <= to_x)
        distinct = len(np.unique(x_K[used_K]))
        if distinct < LEAST_POINTS:
            raise UndefinedError(
                f"{distinct} probes after step 0 in the range are too few for a slope; expected at "
                f"least {LEAST_POINTS} probes; train on, or probe more often "
                "(--tokscale-probe-schedule)"
            )
        return cls(used_K, loss_K, SmoothingSpline.from_values(x_K[used_K], loss_K[used_K]))

    def weights(self, x_G: ArrayLike) -> Floats:
        """Return the matrix from losses at the K probes to -dL/dx at `x_G`.

        Probes that do not count have weight zero. Apply it to losses by `weights @ loss_K`, with
        zero in the place of a loss that is not finite.
        """
        weights_GK = np.zeros((len(np.asarray(x_G)), len(self.used_K)))
        weights_GK[:, self.used_K] = -self.spline.slope_weights(x_G)
        return weights_GK

    def slopes(self, loss_RK: Floats, x_G: ArrayLike) -> Floats:
        """Return -dL/dx of each row of losses, in nats per unit of x."""
        return np.asarray(loss_RK[:, self.used_K] @ -self.spline.slope_weights(x_G).T)

    def error(self, x_G: ArrayLike) -> Floats:
        """Return the standard error of -dL/dx for noise of the curve's size.

        It includes the bias of the smoothing, on average over the range; for smooth curves it is
        rather too large (benchmarks/results/slope_noise.md).
        """
        return self.spline.slope_error(x_G)

    def residuals(self, loss_RK: Floats) -> Floats:
        """Return the departures of each row from its smooth curve, at the probes that count."""
        used_RK = loss_RK[:, self.used_K]
        weights_KK = self.spline.weights(self.spline.x_J[self.spline.group_K])
        return np.asarray(used_RK - used_RK @ weights_KK.T)

    def own_noise_variance(self, loss_RK: Floats) -> float:
        """Return the part of the noise variance that the choice of documents explains.

        Resamples of the documents have the same shared noise and other noise of tokens. So the
        variance of their residuals over the resamples is that of the tokens' own noise in the mean.
        It is NaN for fewer than two finite resamples.

        Args:
            loss_RK: mean losses of the data as they are, then of resamples of the documents.
        """
        drawn_RK = loss_RK[1:][np.isfinite(loss_RK[1:][:, self.used_K]).all(axis=1)]
        if len(drawn_RK) < 2:
            return float("nan")
        square = float(self.residuals(drawn_RK).var(axis=0, ddof=1).sum())
        return square / self._residual_freedom

    @property
    def lag_one_correlation(self) -> float:
        """Correlation of neighbouring residuals beyond that of independent noise; 0 expected."""
        return self.spline.lag_one_correlation(self.loss_K[self.used_K])

    @property
    def _residual_freedom(self) -> float:
        """Sum of the squared residuals of independent noise of variance one."""
        weights_KK = self.spline.weights(self.spline.x_J[self.spline.group_K])
        return float(((np.eye(len(weights_KK)) - weights_KK) ** 2).sum())
