"""Data exponent gamma / (2 beta) of Cagnetta et al. (docs/references.md 2), compared with a run.

gamma is measured on a run's losses by length of context, beta on the training data. Shapes: N
tokens.
"""

import math
from collections.abc import Sequence

import numpy as np

from megatron_tokscale.core.errors import UndefinedError
from megatron_tokscale.core.progress import Progress
from megatron_tokscale.corpus.bin_idx import Portion
from megatron_tokscale.laws.estimates import Z_95, defined, symmetric_estimate
from megatron_tokscale.laws.language.context_exponent import fit_context_exponent
from megatron_tokscale.laws.language.contexts import ContextBins
from megatron_tokscale.laws.language.correlations import (
    correlation_exponent,
    draw_documents,
    token_correlations,
)
from megatron_tokscale.results.estimate import Undefined, defined_or_reason
from megatron_tokscale.results.laws import (
    CagnettaResult,
    ChinchillaLaw,
    ContextExponent,
    CorrelationExponent,
    DataExponent,
    ExponentComparison,
    LossPowerLaw,
)
from megatron_tokscale.store import Run

_LAGS = tuple(range(1, 33)) + tuple(round(32 * 2 ** (i / 4)) for i in range(1, 11))
"""Lags of the correlations: every one to 32, then four per octave to 181; our choice: reach against
computing time."""


def data_exponent(gamma: float, gamma_se: float, beta: float, beta_se: float) -> DataExponent:
    """Return alpha_D = gamma / (2 beta), the exponent if all contexts in reach are learned fast.

    The formula and its error are Eq. 40 and Eq. 56 of docs/references.md 2.1.

    Args:
        gamma: exponent of the losses by context.
        gamma_se: standard error of gamma.
        beta: exponent of the token correlations by lag.
        beta_se: standard error of beta.

    Raises:
        UndefinedError: an exponent is not positive, or an error is negative.
    """
    if not (min(gamma, beta) > 0 and min(gamma_se, beta_se) >= 0):
        raise UndefinedError(
            f"gamma {gamma:g} +- {gamma_se:g} and beta {beta:g} +- {beta_se:g} predict no data "
            "exponent; expected exponents above 0 with their standard errors"
        )
    exponent = gamma / (2 * beta)
    se = math.hypot(gamma_se / (2 * beta), gamma * beta_se / (2 * beta**2))
    return DataExponent(symmetric_estimate(exponent, Z_95 * se), se)


def compare_exponents(
    predicted: DataExponent, exponent: float, se: float, name: str
) -> ExponentComparison:
    """Return the predicted minus the measured exponent; the two count as independent.

    Args:
        predicted: the prediction.
        exponent: the measured exponent.
        se: standard error of the measured exponent.
        name: name of the measured exponent.

    Raises:
        UndefinedError: an error is negative or not finite, or both are zero.
    """
    both_se = math.hypot(predicted.se, se)
    if not (min(predicted.se, se) >= 0 and 0 < both_se < math.inf):
        raise UndefinedError(
            f"exponents with standard errors {predicted.se:g} and {se:g} cannot be compared; "
            "expected finite errors, at least one above 0"
        )
    difference = predicted.exponent.value - exponent
    return ExponentComparison(name, symmetric_estimate(difference, Z_95 * both_se))


def measure_cagnetta(
    run: Run,
    portions: Sequence[Portion],
    overall: LossPowerLaw | Undefined,
    chinchilla: ChinchillaLaw | Undefined,
    *,
    n_resamples: int,
    seed: int,
    progress: Progress,
) -> CagnettaResult:
    """Predict the data exponent, and compare it with the measured one over runs or along this run.

    Args:
        run: the run.
        portions: training data; without any, beta is undefined.
        overall: power law of the run's mean loss.
        chinchilla: Chinchilla's law over the runs.
        n_resamples: number of bootstrap resamples of the documents.
        seed: seed of the resamples and of the documents that are drawn.
        progress: receiver of the lags whose correlations are done.
    """
    gamma = defined_or_reason(lambda: measure_contexts(run, n_resamples, seed))
    beta = defined_or_reason(lambda: measure_correlations(portions, seed, progress))
    predicted = defined_or_reason(lambda: _predict(gamma, beta))
    comparison = defined_or_reason(lambda: _compare(predicted, overall, chinchilla))
    return CagnettaResult(gamma, beta, predicted, comparison)


def measure_contexts(run: Run, n_resamples: int, seed: int) -> ContextExponent:
    """Return gamma, from the losses of the last probe by length of context.

    Raises:
        UndefinedError: lengths of context are not known, or as in `fit_context_exponent`.
    """
    if run.tokens.context_N is None:
        raise UndefinedError("the tokens' lengths of context are not known")
    loss_N = run.read_losses_at(int(run.step_K[-1])).astype(np.float64)
    bins = ContextBins.from_contexts(np.where(np.isfinite(loss_N), run.tokens.context_N, 0))
    loss_N = np.nan_to_num(loss_N)
    cluster_N = run.tokens.cluster_N
    loss_RS = bins.resample(loss_N, cluster_N=cluster_N, n_resamples=n_resamples, seed=seed)
    return fit_context_exponent(bins.context_S, bins.mean(loss_N), loss_RS=loss_RS)


def measure_correlations(
    portions: Sequence[Portion], seed: int, progress: Progress
) -> CorrelationExponent:
    """Return beta of the training data.

    If the differences between documents hide the signal, the correlations are centred.

    Raises:
        UndefinedError: there are no data, or as in `correlation_exponent`.
    """
    if not portions:
        raise UndefinedError("the training data were not given (--data-path)")
    documents = draw_documents(portions, seed=seed)

    def beta(*, centred: bool) -> CorrelationExponent:
        measured = token_correlations(
            documents, lags=_LAGS, centred=centred, seed=seed, progress=progress
        )
        return correlation_exponent(measured, seed=seed)

    try:
        return beta(centred=False)
    except UndefinedError:
        return beta(centred=True)


def _predict(
    gamma: ContextExponent | Undefined, beta: CorrelationExponent | Undefined
) -> DataExponent:
    gamma, beta = defined(gamma), defined(beta)
    return data_exponent(gamma.gamma.value, gamma.se, beta.beta.value, beta.se)


def _compare(
    predicted: DataExponent | Undefined,
    overall: LossPowerLaw | Undefined,
    chinchilla: ChinchillaLaw | Undefined,
) -> ExponentComparison:
    """Compare the prediction with Chinchilla's beta or, without it, with this run's own exponent.

    This run's exponent is a substitute: along one run, data and steps grow together, and the
    learning rate has not decayed before the end.
    """
    if not isinstance(chinchilla, Undefined):
        beta = chinchilla.beta
        se = (beta.high - beta.low) / (2 * Z_95)
        name = "Chinchilla's beta over the runs"
        return compare_exponents(defined(predicted), beta.value, se, name)
    law = defined(overall).law
    name = "the exponent along this one run"
    return compare_exponents(defined(predicted), law.exponent.value, law.exponent_se, name)
