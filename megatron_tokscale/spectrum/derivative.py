"""The slope -dL/dx of a mean loss curve, measured by local quadratic regression (our choice).

At every grid point a parabola is fitted to the finite probes around it, weighted by the tricube
kernel (Cleveland 1979); the slope of the loss is the parabola's slope there. The kernel reaches as
far as the seventh nearest probe (the farthest, if there are fewer), and at least a twentieth of the
probed range. The estimate is linear in the losses, so that a model's curve can be smoothed in the
same way: `derivative_weights`.

Shapes: K probe steps, G grid points.
"""

import numpy as np
from numpy.typing import ArrayLike

from megatron_tokscale.core.arrays import Floats
from megatron_tokscale.core.errors import UndefinedError

_NEIGHBOURS = 7  # probes per parabola of three parameters; more would smooth more (our choice)
_LEAST_PROBES = 4  # a parabola through three of them leaves no residual
_LEAST_REACH = 1 / 20  # least reach as a share of the probed range, for dense probes (our choice)
_BEYOND = 1.01  # the kernel ends just beyond the farthest neighbour, to give it some weight


def measured_derivative(
    x_K: ArrayLike, mean_loss_K: ArrayLike, x_G: ArrayLike
) -> tuple[Floats, Floats]:
    """Return -dL/dx in nats per unit of x at `x_G`, and its standard error.

    Step 0 (x = -inf) is left out: it has no place on the axis. The error covers the noise that all
    tokens of a probe share. Its variance is estimated from the residuals of the local fit, and
    taken as the same at all probes. The error does not cover the sampling of tokens and the bias of
    the smoothing.

    Raises:
        UndefinedError: fewer than four finite probes.
    """
    x_K = np.asarray(x_K, dtype=np.float64)
    loss_K = np.asarray(mean_loss_K, dtype=np.float64)
    slope_GK = derivative_weights(x_K, x_G)
    finite = np.isfinite(x_K)
    value_KK = _local_weights(x_K[finite], x_K[finite], order=0)
    residual_K = loss_K[finite] - value_KK @ loss_K[finite]
    freedom = finite.sum() - 2 * np.trace(value_KK) + (value_KK**2).sum()
    variance = (residual_K**2).sum() / max(freedom, 1.0)
    error_G = np.sqrt(variance * (slope_GK**2).sum(axis=1))
    return slope_GK @ np.where(finite, loss_K, 0.0), error_G


def derivative_weights(x_K: ArrayLike, x_G: ArrayLike) -> Floats:
    """Return the matrix that turns losses at `x_K` into -dL/dx at `x_G`; step 0 has weight zero.

    Raises:
        UndefinedError: fewer than four finite probes.
    """
    x_K = np.asarray(x_K, dtype=np.float64)
    finite = np.isfinite(x_K)
    if finite.sum() < _LEAST_PROBES:
        raise UndefinedError(
            f"{finite.sum()} probes after step 0 are too few for a slope; expected at least "
            f"{_LEAST_PROBES} probes; train on, or probe more often (--tokscale-probe-schedule)"
        )
    weights_GK = np.zeros((len(np.asarray(x_G)), len(x_K)))
    weights_GK[:, finite] = -_local_weights(x_K[finite], np.asarray(x_G, np.float64), order=1)
    return weights_GK


def _local_weights(x_K: Floats, x_G: Floats, order: int) -> Floats:
    """Return the weights of a coefficient of the local parabola around each grid point.

    `order` is the power of the coefficient: 0 for the value at the point, 1 for the slope.
    """
    offset_GK = x_K - x_G[:, None]
    distance_GK = np.abs(offset_GK)
    neighbours = min(_NEIGHBOURS, len(x_K))
    nearest_G = np.partition(distance_GK, neighbours - 1, axis=1)[:, neighbours - 1]
    reach_G = np.maximum(nearest_G * _BEYOND, _LEAST_REACH * np.ptp(x_K))
    kernel_GK = np.clip(1 - (distance_GK / reach_G[:, None]) ** 3, 0, None) ** 3
    unit_GK = offset_GK / reach_G[:, None]
    powers_GPK = np.stack([np.ones_like(unit_GK), unit_GK, unit_GK**2], axis=1)
    weighted_GPK = powers_GPK * kernel_GK[:, None, :]
    normal_GPP = weighted_GPK @ powers_GPK.transpose(0, 2, 1)
    solution_GPK = np.linalg.solve(normal_GPP, weighted_GPK)
    return np.asarray(solution_GPK[:, order] / reach_G[:, None] ** order)
