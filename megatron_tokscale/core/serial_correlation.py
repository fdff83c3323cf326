"""Serial correlation of residuals, and the number of independent residuals that they are worth.

Shapes: K probe steps, G groups.
"""

from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import ArrayLike

from megatron_tokscale.core.arrays import Floats

LEAST_FREEDOM = 2.0
"""Least degrees of freedom of a residual variance; our choice, so that few points that agree by
chance give no tiny error."""
NO_ERROR = 1e-24
"""Relative squared error of a fit that is exact but for rounding in double precision."""
_MAX_CORRELATION = 0.9  # our choice: at it, 30 points are worth 1.6 independent ones
_ROUNDING = 1e-8  # root mean square of residuals that are only rounding errors; our choice


def serial_correlation(residual_GK: Floats, n_parameters: float) -> Floats:
    """Return the lag-1 correlation along the last axis, in [0, 0.9].

    The correlation is corrected for the `n_parameters` of the fit that left the residuals.

    A smooth parameter takes one slow mode out of the residuals, which lowers their lag-1
    correlation by about 1/K; estimating it lowers it by (1 + 3 rho)/K more (Kendall 1954).
    """
    centred_GK = residual_GK - residual_GK.mean(axis=-1, keepdims=True)
    n = centred_GK.shape[-1]
    square_G = (centred_GK**2).sum(axis=-1)
    product_G = (centred_GK[..., 1:] * centred_GK[..., :-1]).sum(axis=-1)
    raw_G = np.where(square_G > n * _ROUNDING**2, product_G / np.maximum(square_G, 1e-300), -1)
    corrected_G = (n * raw_G + n_parameters) / max(n - n_parameters - 1, 1)
    return np.asarray(np.clip(corrected_G, 0, _MAX_CORRELATION))


def effective_points(n_points: int, correlation: ArrayLike) -> Floats:
    """Return the number of independent residuals worth n correlated: n (1 - rho)/(1 + rho)."""
    rho = np.asarray(correlation, dtype=np.float64)
    return np.asarray(n_points * (1 - rho) / (1 + rho))


@dataclass(frozen=True)
class GroupNoise:
    """Correlations of the errors between neighbouring probes and between groups.

    Attributes:
        autocorrelation: lag-1 correlation over probes, corrected for the fit's bias.
        group_correlation: mean correlation of two groups.
        n_effective: number of independent losses that all fitted losses are worth.
    """

    autocorrelation: float
    group_correlation: float
    n_effective: float

    @classmethod
    def from_residuals(cls, residual_GK: Floats, n_parameters: float) -> Self:
        """Estimate the noise from the residuals of a fit with `n_parameters` per group.

        The noise is taken for an autoregression of order one over probes.
        """
        n_groups, n_probes = residual_GK.shape
        scaled_GK = residual_GK - residual_GK.mean(axis=1, keepdims=True)
        scaled_GK /= np.maximum(scaled_GK.std(axis=1, keepdims=True), np.sqrt(NO_ERROR))
        rho = float(serial_correlation(scaled_GK, n_parameters).mean())
        alike = (scaled_GK.sum(axis=0).var() / n_groups - 1) / (n_groups - 1)
        alike = float(np.clip(alike, 0, 1))
        groups = n_groups / (1 + (n_groups - 1) * alike)
        return cls(rho, alike, groups * float(effective_points(n_probes, rho)))
