"""Loss deceleration (Mircea et al.): a power law of the step that breaks to a slower one."""

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import ArrayLike

from megatron_tokscale.core.arrays import Floats
from megatron_tokscale.results.estimate import Estimate
from megatron_tokscale.results.verdict import Claim, ClaimTest

CLAIM: Final = Claim("the loss falls at half its first rate or less at the end", most=0.5)
"""Claim on `Deceleration.rate_ratio` (the half is our choice; the ratio of a power law is 1)."""


@dataclass(frozen=True)
class Deceleration:
    """A power law of the step that breaks to a slower one, with 95% intervals.

    Attributes:
        break_loss: L_d = b d1^-c0, the loss where the two power laws meet, in nats.
        break_step: t_d = d1, in steps.
        late_rate: r_d = c0 + c1, the exponent after the break.
        early_rate: c0, the exponent before the break.
        break_width: f1, in units of ln step.
        final_loss: L_T = L_d (T / t_d)^-r_d at the last probe T, in nats.
        rate_ratio: mean exponent over the last third of the fitted steps, in ln step, over that of
            the first third; 100 where the loss does not fall at first.
        delta_bic: BIC of a straight line in ln L over ln step minus BIC of the broken law, both for
            the number of effective points; below 0 the line is the better description.
        autocorrelation: lag-1 correlation of the residuals, corrected for the fit's bias.
        r2: R^2 of the log losses.
        n_points: number of probes fitted.
        from_step: first fitted step.
        to_step: last fitted step, T.
    """

    break_loss: Estimate
    break_step: Estimate
    late_rate: Estimate
    early_rate: float
    break_width: float
    final_loss: Estimate
    rate_ratio: Estimate
    delta_bic: float
    autocorrelation: float
    r2: float
    n_points: int
    from_step: float
    to_step: float

    @property
    def test(self) -> ClaimTest:
        """The test of `CLAIM`. A power law with a floor passes it as well."""
        return ClaimTest.of(CLAIM, self.rate_ratio)

    def predict(self, step: ArrayLike) -> Floats:
        """Return the law's loss at `step`, in nats."""
        break_x, late_rate = np.log(self.break_step.value), self.late_rate.value
        x = np.log(np.asarray(step, dtype=np.float64))
        bend = self.break_width * np.logaddexp(0, (x - break_x) / self.break_width)
        level = np.log(self.break_loss.value) - self.early_rate * (x - break_x)
        return np.asarray(np.exp(level - (late_rate - self.early_rate) * bend))
