"""The quantization model of Michaud et al., compared with a run."""

from dataclasses import dataclass
from typing import Final

from megatron_tokscale.results.estimate import Estimate, Undefined
from megatron_tokscale.results.verdict import Claim, ClaimTest

CLAIM: Final = Claim.about("learning time = onset + E / unigram frequency", 1.0, 0.1)
"""Claim on the exponent b of the frequency (the margin is our choice)."""


@dataclass(frozen=True)
class FrequencyExponent:
    """Learning time = onset + exposures * frequency^-b.

    Attributes:
        b: the exponent, with a 95% profile interval that counts the groups as independent.
        onset: time that all groups share, in the unit of the learning times; 0 where the data show
            none.
        exposures: E, the exposures of a group that the model needs if b is 1, for frequencies per
            unit of time; in general a time times a frequency to the power of b.
        b_without_onset: the slope of ln(time) on ln(frequency) with its sign turned, by unweighted
            least squares with Student's t: lower than b where there is an onset.
        r2: R^2 of the log times, weighted as in the fit.
        n_groups: number of fitted groups.
        n_censored: number of groups left out because they, or commoner groups, were not learned.
    """

    b: Estimate
    onset: float
    exposures: float
    b_without_onset: Estimate
    r2: float
    n_groups: int
    n_censored: int

    @property
    def test(self) -> ClaimTest:
        """The test of `CLAIM`."""
        return ClaimTest.of(CLAIM, self.b)


@dataclass(frozen=True)
class QuantaExponents:
    """Exponents of L - L_inf that one alpha implies, by the axis along which a model is scaled.

    Attributes:
        alpha: the quanta's frequencies fall as k^-(alpha + 1).
        parameters: alpha_N, in the number of parameters.
        data: alpha_D, in the tokens of a set read for many epochs.
        steps: alpha_S, in the steps of a single epoch.
    """

    alpha: float
    parameters: float
    data: float
    steps: float


@dataclass(frozen=True)
class MonogenicShare:
    """Share of the tokens that fall from plateau to plateau in one step.

    Attributes:
        share: share of the run's tokens.
        null_share: share under the null model: the same tokens, each following the mean curve.
        n_tokens: number of tokens.
    """

    share: float
    null_share: float
    n_tokens: int


@dataclass(frozen=True)
class QuantaResult:
    """Three predictions of the quantization model, compared with a run.

    Attributes:
        frequency: learning time against frequency.
        implied: exponents of the axes, from the loss's exponent along the run.
        monogenic: share of the tokens that fall in one step.
    """

    frequency: FrequencyExponent | Undefined
    implied: QuantaExponents | Undefined
    monogenic: MonogenicShare | Undefined
