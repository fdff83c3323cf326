"""The exponents of groups of tokens, by profiles of their squared errors.

Shapes: K probe steps, G groups, Q exponents of a grid.
"""

from collections.abc import Mapping
from dataclasses import dataclass

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
from megatron_tokscale.laws.one_third.group_fit import Fit, Losses, Model, grid_errors


@dataclass(frozen=True)
class GroupExponents:
    """The exponents of power laws with floors, common and by group, with 95% intervals.

    Attributes:
        common: alpha of "one slope".
        common_interval: profile interval with the correlations of probes and of groups.
        exponent_G: alpha_g of "own slopes".
        se_G: half of the one-sigma profile interval.
        interval_G2: profile intervals; from 0 or to inf where the losses do not tell.
        heterogeneity: Cochran's Q, the groups' squared distances from one exponent in standard
            errors, along their profiles.
        heterogeneity_p: its p-value, chi-squared of G - 1; near 0: one exponent is not enough.
    """

    common: float
    common_interval: Interval
    exponent_G: Floats
    se_G: Floats
    interval_G2: Floats
    heterogeneity: float
    heterogeneity_p: float


def group_exponents(
    given: Losses, models: Mapping[str, Model], fits: Mapping[str, Fit]
) -> GroupExponents:
    """Profiles of the squared error over the exponent, of each group and of all together."""
    own, common = fits["own slopes"], fits["one slope"]
    n_groups, n_probes = own.residual_RGK.shape[1:]
    log_exponent_Q = models["own slopes"].common_Q
    error_GQ = grid_errors(models["own slopes"], given.x_K, given.loss_RGK)[0, :, 0]
    best_G = (own.residual_RGK[0] ** 2).sum(axis=1)
    effective_G = effective_points(n_probes, serial_correlation(own.residual_RGK[0], 3))
    profiles = [
        _Profile.from_errors(log_exponent_Q, error_Q, log_best, best, effective - 3)
        for error_Q, log_best, best, effective in zip(
            error_GQ, own.common_RG[0], best_G, effective_G, strict=True
        )
    ]
    noise = GroupNoise.from_residuals(common.residual_RGK[0], 2 + 1 / n_groups)
    together = _Profile.from_errors(
        log_exponent_Q,
        given.weight_G @ error_GQ,
        float(common.common_RG[0, 0]),
        given.error(common) * n_probes,
        noise.n_effective * (1 - (2 * n_groups + 1) / (n_groups * n_probes)),
    )
    heterogeneity = _heterogeneity(profiles, log_exponent_Q)
    return GroupExponents(
        common=float(np.exp(together.log_best)),
        common_interval=together.interval(),
        exponent_G=np.exp(own.common_RG[0]),
        se_G=np.array([profile.se() for profile in profiles]),
        interval_G2=np.array([profile.interval() for profile in profiles]),
        heterogeneity=heterogeneity,
        heterogeneity_p=float(chi2.sf(heterogeneity, n_groups - 1)),
    )


@dataclass(frozen=True)
class _Profile:
    """How many standard errors, with a sign, each exponent lies from the best: z(ln alpha)."""

    log_best: float
    freedom: float
    log_exponent_Q: Floats
    z_Q: Floats

    @staticmethod
    def from_errors(
        log_exponent_Q: Floats, error_Q: Floats, log_best: float, best: float, freedom: float
    ) -> "_Profile":
        """Root of freedom (error / best - 1), made monotone; the best itself joins the grid."""
        freedom = max(freedom, LEAST_FREEDOM)
        excess_Q = np.maximum(error_Q / max(best, NO_ERROR) - 1, 0)
        z_Q = np.sign(log_exponent_Q - log_best) * np.sqrt(freedom * excess_Q)
        above_Q = np.maximum.accumulate(np.maximum(z_Q, 0))
        below_Q = np.minimum.accumulate(np.minimum(z_Q, 0)[::-1])[::-1]
        place = np.searchsorted(log_exponent_Q, log_best)
        return _Profile(
            log_best,
            freedom,
            np.insert(log_exponent_Q, place, log_best),
            np.insert(above_Q + below_Q, place, 0),
        )

    def at(self, log_exponent: Floats) -> Floats:
        """z there, linear between the exponents of the grid."""
        return np.interp(log_exponent, self.log_exponent_Q, self.z_Q)

    def between(self, reach: float) -> Interval:
        """Exponents within so many standard errors; from 0 or to inf if the grid does not tell."""
        low, high = np.exp(
            np.interp([-reach, reach], self.z_Q, self.log_exponent_Q, left=-np.inf, right=np.inf)
        ).tolist()
        return low, high

    def interval(self) -> Interval:
        """95% interval, Student's t."""
        return self.between(float(student_t.ppf(0.975, self.freedom)))

    def se(self) -> float:
        """Half the width of the interval of one standard error."""
        low, high = self.between(1.0)
        return (high - low) / 2


def _heterogeneity(profiles: list[_Profile], log_exponent_Q: Floats) -> float:
    """The least sum of the groups' z^2 over one exponent.

    An estimated error inflates z^2 by freedom / (freedom - 2), as it does Student's t squared.
    """
    fine = np.linspace(log_exponent_Q[0], log_exponent_Q[-1], 50 * len(log_exponent_Q))
    deflation = [1 - 2 / max(profile.freedom, 2 * LEAST_FREEDOM) for profile in profiles]
    squares = [
        share * profile.at(fine) ** 2 for share, profile in zip(deflation, profiles, strict=True)
    ]
    return float(np.sum(squares, axis=0).min())
