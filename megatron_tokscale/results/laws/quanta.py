"""The quantization model of Michaud et al., compared with a run."""

from dataclasses import dataclass

from megatron_tokscale.results.estimate import Estimate, Undefined


@dataclass(frozen=True)
class FrequencyExponent:
    """Learning time = const * frequency^-b, with 95% intervals.

    Attributes:
        b: the exponent by Theil and Sen: the median slope of all pairs of groups. Its interval is
            by ranks, and counts the groups as independent.
        b_ols: the exponent by least squares, with Student's t interval.
        se_ols: standard error of `b_ols`.
        r2: R^2 of the log times, least squares.
        n_groups: number of groups.
    """

    b: Estimate
    b_ols: Estimate
    se_ols: float
    r2: float
    n_groups: int


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
