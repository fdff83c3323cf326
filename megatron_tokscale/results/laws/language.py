"""The data exponent from the statistics of the language (Cagnetta et al.), compared with a run."""

from dataclasses import dataclass
from typing import Final

from megatron_tokscale.core.arrays import Interval
from megatron_tokscale.results.estimate import Estimate, Undefined
from megatron_tokscale.results.verdict import Claim, ClaimTest

CLAIM: Final = Claim.about("data exponent is gamma / (2 beta)", 0.0, 0.05)
"""Claim on the predicted minus the measured exponent (the margin is our choice: a third of the
published exponents)."""


@dataclass(frozen=True)
class ContextExponent:
    """L_n = floor + scale * n^-gamma over a window of context lengths n, with 95% intervals.

    Attributes:
        gamma: the exponent; its interval is percentiles of the bootstrap.
        se: standard error of gamma.
        floor: H_inf, in nats.
        scale: scale of the law, in nats.
        r2: R^2 of ln(L_n - floor).
        width: range of gamma over floors with R^2 within 0.001 of the best.
        n_points: number of context lengths fitted.
        from_context: shortest fitted context, in tokens.
        to_context: longest fitted context, in tokens.
    """

    gamma: Estimate
    se: float
    floor: Estimate
    scale: float
    r2: float
    width: float
    n_points: int
    from_context: float
    to_context: float


@dataclass(frozen=True)
class CorrelationExponent:
    """||C(n)|| = const * n^-beta from lag 1 to the end of the signal, with 95% intervals.

    Attributes:
        beta: the exponent; its interval is from `se` and Student's t for the effective number of
            documents.
        se: standard error of beta, from the documents and from the scatter about the line, in
            quadrature. Noise that the lags do not share is in both, so it counts twice.
        document_se: standard error from the documents alone (infinitesimal jackknife).
        lag_se: standard error from a bootstrap over lags, as the authors report it.
        lag_interval: percentiles of that bootstrap.
        r2: R^2 of the log norms.
        to_lag: last fitted lag.
        n_lags: number of lags fitted.
        n_documents: effective number of documents: one over the sum of the squares of their shares
            of the tokens.
        n_tokens: number of tokens read.
        centred: whether the mean over permutations within documents was subtracted from the
            correlations, instead of the product of the marginals.
    """

    beta: Estimate
    se: float
    document_se: float
    lag_se: float
    lag_interval: Interval
    r2: float
    to_lag: int
    n_lags: int
    n_documents: float
    n_tokens: int
    centred: bool


@dataclass(frozen=True)
class DataExponent:
    """Exponent alpha_D of the loss in the training tokens, predicted from the language alone.

    Attributes:
        exponent: gamma / (2 beta), with a normal 95% interval.
        se: standard error of the exponent (docs/references.md 2.1, Eq. 56).
    """

    exponent: Estimate
    se: float


@dataclass(frozen=True)
class ExponentComparison:
    """A predicted exponent minus a measured one.

    Attributes:
        measured: name of the measured exponent.
        difference: predicted minus measured, with a normal 95% interval; the two exponents count
            as independent.
    """

    measured: str
    difference: Estimate

    @property
    def test(self) -> ClaimTest:
        """The test of `CLAIM`."""
        return ClaimTest.of(CLAIM, self.difference)


@dataclass(frozen=True)
class CagnettaResult:
    """The data exponent that the language predicts, and its comparison with a measured exponent.

    Attributes:
        gamma: exponent of the losses by context.
        beta: exponent of the token correlations of the training data.
        predicted: gamma / (2 beta).
        comparison: the prediction minus the exponent over the runs, or along this one run.
    """

    gamma: ContextExponent | Undefined
    beta: CorrelationExponent | Undefined
    predicted: DataExponent | Undefined
    comparison: ExponentComparison | Undefined
