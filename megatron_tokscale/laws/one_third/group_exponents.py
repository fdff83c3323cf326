"""Exponents of the groups' power laws, with intervals from profiles of their squared errors.

Shapes: K probe steps, G groups, Q exponents of a grid.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import numpy as np
from scipy.stats import chi2
from scipy.stats import t as student_t

from megatron_tokscale.core.arrays import Floats, Interval
from megatron_tokscale.core.serial_correlation import (
    LEAST_FREEDOM,
    NO_ERROR,
    GroupNoise,
    effective_points,
    serial_correlation,
)
from megatron_tokscale.laws.one_third.group_fit import (
    GroupFit,
    GroupLosses,
    GroupModel,
    grid_errors,
)
from megatron_tokscale.results.laws import GroupExponents


def group_exponents(
    losses: GroupLosses, models: Mapping[str, GroupModel], fits: Mapping[str, GroupFit]
) -> GroupExponents:
    """Return the exponents of the groups and the common one, with profile intervals."""
    own, common = fits["own slopes"], fits["one slope"]
    n_groups, n_probes = own.residual_RGK.shape[1:]
    log_exponent_Q = models["own slopes"].common_Q
    # Profile the squared error over the exponent, for each group alone.
    error_GQ = grid_errors(models["own slopes"], losses.x_K, losses.loss_RGK)[0, :, 0]
    best_G = (own.residual_RGK[0] ** 2).sum(axis=1)
    effective_G = effective_points(n_probes, serial_correlation(own.residual_RGK[0], 3))
    profiles = [
        _Profile.from_errors(log_exponent_Q, error_Q, log_best, best, effective - 3)
        for error_Q, log_best, best, effective in zip(
            error_GQ, own.common_RG[0], best_G, effective_G, strict=True
        )
    ]
    # The same for all groups together, whose errors are correlated.
    noise = GroupNoise.from_residuals(common.residual_RGK[0], 2 + 1 / n_groups)
    together = _Profile.from_errors(
        log_exponent_Q,
        losses.weight_G @ error_GQ,
        float(common.common_RG[0, 0]),
        losses.error(common) * n_probes,
        noise.n_effective * (1 - (2 * n_groups + 1) / (n_groups * n_probes)),
    )
    heterogeneity = _heterogeneity(profiles, log_exponent_Q)
    return GroupExponents(
        common=float(np.exp(together.log_best)),
        common_interval=together.interval(),
        exponent_G=tuple(np.exp(own.common_RG[0]).tolist()),
        se_G=tuple(profile.se() for profile in profiles),
        interval_G2=tuple(profile.interval() for profile in profiles),
        heterogeneity=heterogeneity,
        heterogeneity_p=float(chi2.sf(heterogeneity, n_groups - 1)),
    )


@dataclass(frozen=True)
class _Profile:
    """Profile z(ln alpha): signed distance of an exponent from the best, in standard errors.

    Attributes:
        log_best: logarithm of the best exponent.
        freedom: effective degrees of freedom of the errors.
        log_exponent_Q: logarithms of the exponents of the grid, and of the best, ascending.
        z_Q: the distance at each of them, ascending.
    """

    log_best: float
    freedom: float
    log_exponent_Q: Floats
    z_Q: Floats

    @classmethod
    def from_errors(
        cls, log_exponent_Q: Floats, error_Q: Floats, log_best: float, best: float, freedom: float
    ) -> Self:
        """Return z = +-sqrt(freedom (error / best - 1)), made monotone, with the best on the grid.

        Args:
            log_exponent_Q: logarithms of the exponents of the grid.
            error_Q: sum of squared errors at each.
            log_best: logarithm of the best exponent.
            best: sum of squared errors there.
            freedom: effective degrees of freedom of the errors.
        """
        freedom = max(freedom, LEAST_FREEDOM)
        excess_Q = np.maximum(error_Q / max(best, NO_ERROR) - 1, 0)
        z_Q = np.sign(log_exponent_Q - log_best) * np.sqrt(freedom * excess_Q)
        above_Q = np.maximum.accumulate(np.maximum(z_Q, 0))
        below_Q = np.minimum.accumulate(np.minimum(z_Q, 0)[::-1])[::-1]
        place = np.searchsorted(log_exponent_Q, log_best)
        return cls(
            log_best,
            freedom,
            np.insert(log_exponent_Q, place, log_best),
            np.insert(above_Q + below_Q, place, 0),
        )

    def at(self, log_exponent: Floats) -> Floats:
        """Return z at exponents, linear between the exponents of the grid."""
        return np.interp(log_exponent, self.log_exponent_Q, self.z_Q)

    def between(self, reach: float) -> Interval:
        """Return the range of exponents within `reach` standard errors of the best.

        Where the grid ends before, the end of the range is open: 0 or infinity.
        """
        low, high = np.exp(
            np.interp([-reach, reach], self.z_Q, self.log_exponent_Q, left=-np.inf, right=np.inf)
        ).tolist()
        return low, high

    def interval(self) -> Interval:
        """Return the 95% interval, by Student's t."""
        return self.between(float(student_t.ppf(0.975, self.freedom)))

    def se(self) -> float:
        """Return half the width of the interval of one standard error."""
        low, high = self.between(1.0)
        return (high - low) / 2


def _heterogeneity(profiles: list[_Profile], log_exponent_Q: Floats) -> float:
    """Return Cochran's Q: the least sum of the groups' z^2 over one common exponent.

    The errors are estimated, which makes z^2 too large by freedom / (freedom - 2), the variance of
    Student's t. Each z^2 is divided by that factor.
    """
    fine = np.linspace(log_exponent_Q[0], log_exponent_Q[-1], 50 * len(log_exponent_Q))
    deflation = [1 - 2 / max(profile.freedom, 2 * LEAST_FREEDOM) for profile in profiles]
    squares = [
        share * profile.at(fine) ** 2 for share, profile in zip(deflation, profiles, strict=True)
    ]
    return float(np.sum(squares, axis=0).min())
