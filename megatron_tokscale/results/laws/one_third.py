"""The one-third law of Liu et al., and its test by groups of tokens.

tau is the summed learning rate. Shapes: G groups, B blocks of probes.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import ArrayLike

from megatron_tokscale.core.arrays import Floats, Interval
from megatron_tokscale.core.serial_correlation import GroupNoise
from megatron_tokscale.results.estimate import Estimate, Undefined
from megatron_tokscale.results.verdict import Claim, ClaimTest

ONE_THIRD: Final = 1 / 3  # the exponent that Liu et al. derive for a softmax
CLAIM: Final = Claim.about("loss exponent in the summed learning rate is 1/3", ONE_THIRD, 0.05)
"""Claim on the exponent (the margin is our choice: two standard errors of Liu et al.'s fits)."""
GROUP_CLAIM: Final = Claim(
    "groups by frequency share one slope, and do not drop each at its own time", most=0.0
)
"""Claim on `GroupTest.difference`."""


@dataclass(frozen=True)
class OneThirdLaw:
    """L(tau) = floor + scale * tau^-exponent, in nats, by least squares on log losses.

    Attributes:
        floor: L_0, at most the last loss.
        scale: c, in nats times the unit of tau to the power of the exponent.
        exponent: alpha, which does not depend on the unit of tau; its interval counts neighbouring
            residuals as correlated.
        exponent_se: standard error as Liu et al. compute it: it counts residuals as independent.
        r2: R^2 of the log losses.
        r2_one_third: R^2 with the exponent held at 1/3.
        autocorrelation: lag-1 correlation of the residuals, corrected for the fit's bias.
        n_points: number of probes fitted.
        from_lr_sum: first fitted tau.
        to_lr_sum: last fitted tau.
    """

    floor: float
    scale: float
    exponent: Estimate
    exponent_se: float
    r2: float
    r2_one_third: float
    autocorrelation: float
    n_points: int
    from_lr_sum: float
    to_lr_sum: float

    @property
    def test(self) -> ClaimTest:
        """The test of `CLAIM`."""
        return ClaimTest.of(CLAIM, self.exponent)

    def predict(self, lr_sum: ArrayLike) -> Floats:
        """Return the law's loss at `lr_sum`, in nats."""
        tau = np.asarray(lr_sum, dtype=np.float64)
        return np.asarray(self.floor + self.scale * tau**-self.exponent.value)


@dataclass(frozen=True)
class ModelScore:
    """Score of one model of all groups; errors are mean squares of relative residuals.

    Attributes:
        n_parameters: number of fitted parameters, over all groups.
        error: error at all probes, fitted to all.
        held_out_error: error at probes that the fit did not see, mean over blocks.
        held_out_error_B: held-out error of each block.
        bic: Bayesian information criterion, n ln(error) + n_parameters ln(n) for n effective
            points; lower is better.
    """

    n_parameters: int
    error: float
    held_out_error: float
    held_out_error_B: tuple[float, ...]
    bic: float


@dataclass(frozen=True)
class GroupExponents:
    """Exponents of power laws with floors, common and by group, with 95% profile intervals.

    An interval is open, from 0 or to infinity, where the losses give no bound; JSON has null there.

    Attributes:
        common: alpha of "one slope".
        common_interval: its interval, with the correlations of probes and of groups.
        exponent_G: alpha_g of "own slopes".
        se_G: half of the one-sigma profile interval.
        interval_G2: interval of each alpha_g.
        heterogeneity: Cochran's Q: the sum over groups of the squared distance to one exponent, in
            standard errors, along the group's profile.
        heterogeneity_p: p-value of Q, by chi-squared with G - 1 degrees of freedom. Near 0, one
            exponent does not describe all groups.
    """

    common: float
    common_interval: Interval
    exponent_G: tuple[float, ...]
    se_G: tuple[float, ...]
    interval_G2: tuple[Interval, ...]
    heterogeneity: float
    heterogeneity_p: float


@dataclass(frozen=True)
class GroupDrops:
    """Sigmoids of "own times", which share one width.

    Attributes:
        midpoint_G: e^c_g, in the unit of tau.
        width: w, in units of ln tau; 10-90% of a drop takes 4.394 w.
        floor_G: f_g, in nats.
        drop_G: A_g, in nats.
    """

    midpoint_G: tuple[float, ...]
    width: float
    floor_G: tuple[float, ...]
    drop_G: tuple[float, ...]


@dataclass(frozen=True)
class GroupTest:
    """Test of one slope in ln tau for all groups against drops at the groups' own times.

    Attributes:
        models: scores by name; of a group g at x = ln tau
            "one third": floor_g + scale_g tau^-1/3,
            "one slope": floor_g + scale_g tau^-alpha,
            "own slopes": floor_g + scale_g tau^-alpha_g,
            "own times": floor_g + drop_g / (1 + exp((x - c_g) / w)),
            "own times and widths": the same with w_g.
        difference: held-out error of "one slope" minus that of "own times", with an interval over
            the blocks of probes, Student's t.
        resample_interval: 95% interval of the difference over the resamples; None without
            resamples.
        exponents: exponents of "one slope" and "own slopes".
        drops: sigmoids of "own times".
        noise: correlations of the noise.
        n_points: number of probes fitted.
        from_lr_sum: first fitted tau.
        to_lr_sum: last fitted tau.
    """

    models: dict[str, ModelScore]
    difference: Estimate
    resample_interval: Interval | None
    exponents: GroupExponents
    drops: GroupDrops
    noise: GroupNoise
    n_points: int
    from_lr_sum: float
    to_lr_sum: float

    @property
    def test(self) -> ClaimTest:
        """The test of `GROUP_CLAIM`, by the widest of the difference's intervals.

        It fails where each group drops at its own time.
        """
        low, high = self.difference.low, self.difference.high
        if self.resample_interval is not None:
            low = min(low, self.resample_interval[0])
            high = max(high, self.resample_interval[1])
        return ClaimTest.of(GROUP_CLAIM, Estimate(self.difference.value, low, high))


@dataclass(frozen=True)
class OneThirdResult:
    """The one-third law of a run, and its test by groups of token frequency.

    Attributes:
        law: the fitted law.
        frequency_groups: the test, or why it is undefined.
    """

    law: OneThirdLaw
    frequency_groups: GroupTest | Undefined
