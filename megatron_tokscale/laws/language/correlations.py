"""Norm of a corpus's token correlations by lag, and the exponent beta with which it falls.

C(n) is the covariance of one-hot tokens n apart, and its norm falls as n^-beta (docs/references.md
2.1). Shapes: D documents, L lags, R bootstrap resamples.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t as student_t

from megatron_tokscale.core.arrays import Floats, Integers32, Mask
from megatron_tokscale.core.errors import TokscaleError, UndefinedError
from megatron_tokscale.core.progress import NoProgress, Progress
from megatron_tokscale.core.resampling import percentile_interval
from megatron_tokscale.core.seed import DEFAULT_SEED
from megatron_tokscale.corpus.bin_idx import Portion
from megatron_tokscale.laws.estimates import symmetric_estimate
from megatron_tokscale.laws.language.pairs import Documents, Pairs
from megatron_tokscale.results.laws import CorrelationExponent

MAX_TOKENS = 4_000_000  # our choice: a minute or two of computing
LAGS = tuple(sorted({*range(1, 33), *np.geomspace(33, 8192, 20).round().astype(int).tolist()}))
"""Default lags; they and the constants from SIGNAL to MIN_R2 are from docs/references.md 2.5."""
MIN_PAIRS = 1000  # least pairs of tokens at a lag; our choice
SIGNAL = 1.5  # least norm over its floor at which a lag has a signal
END_OF_SIGNAL = 3  # lags in a row without a signal
MIN_REACH = 10  # least lag up to which there must be a signal
MIN_R2 = 0.7  # least R^2 that counts as a power law
MIN_DOCUMENTS = 10.0  # effective number; our choice: fewer give no useful error of beta


def draw_documents(
    portions: Sequence[Portion], *, max_tokens: int = MAX_TOKENS, seed: int
) -> Documents:
    """Draw whole documents without replacement, from each dataset by its weight in the mixture.

    Args:
        portions: sequences of the datasets in a part of the job's data, as from
            `DataSource.portions`.
        max_tokens: number of tokens to read; the last document of a dataset is cut to it.
        seed: seed of the draw.

    Raises:
        UndefinedError: there are no tokens, or all are the same.
    """
    rng = np.random.default_rng(seed)
    sequences: list[NDArray[np.generic]] = []
    for portion in portions:
        left = round(max_tokens * portion.weight)
        for index in rng.permutation(len(portion.sequences)).tolist():
            if left <= 0:
                break
            sequences.append(portion.tokens.sequence(portion.sequences[index])[:left])
            left -= len(sequences[-1])
    return Documents.from_sequences(sequences)


@dataclass(frozen=True)
class Correlations:
    """Norms of C(n), up to the end of the signal.

    Attributes:
        lag_L: lags n, ascending.
        norm_L: top singular value of C(n).
        floor_L: highest norm among permutations of the tokens within their documents.
        influence_LD: derivatives of the norm by the documents' weights; they sum to 0.
        share_D: share of the tokens in each document.
        n_tokens: number of tokens read.
        centred: whether the mean over permutations within documents was subtracted, instead of the
            product of the marginals.
    """

    lag_L: Integers32
    norm_L: Floats
    floor_L: Floats
    influence_LD: Floats
    share_D: Floats
    n_tokens: int
    centred: bool

    @property
    def valid_L(self) -> Mask:
        """True at lags whose norm stands out from the floor."""
        return np.asarray(self.norm_L >= SIGNAL * self.floor_L)


def token_correlations(
    documents: Documents,
    *,
    lags: Sequence[int] = LAGS,
    centred: bool = False,
    n_permutations: int = 3,
    seed: int = DEFAULT_SEED,
    progress: Progress | None = None,
) -> Correlations:
    """Measure the norm of C(n) and its floor, from lag 1 until three lags in a row show no signal.

    Pairs lie within one document, and the marginals are those of the pairs' left and right ends
    (docs/references.md 2.5). The floor is the norm under permutations of the tokens within their
    documents. Two parts of C(n) are in the floor: noise, which falls as P^-1/2 with the number P of
    pairs, and each document's preference for some words, which does not depend on the lag.

    In few long documents this preference hides the correlation that is due to the order of tokens.
    `centred` subtracts the preference: the exact mean of C(n) over all permutations. It also
    subtracts correlations that are as long as a document: for lags to 20, beta was 1.38 instead of
    0.95 in planted documents of 100 tokens, and 1.00 in documents of 1000 tokens.

    Noise raises a norm, and so lowers beta. By the theory of spiked matrices it raises a norm by
    15% where the norm is 1.5 times a floor of noise alone.

    Args:
        documents: from `draw_documents` or `Documents.from_sequences`.
        lags: lags to take, ascending, up to the first with fewer than 1000 pairs.
        centred: subtract the documents' preference for words; the authors' beta is not centred.
        n_permutations: number of permutations; the floor is the highest of their norms.
        seed: seed of the permutations.
        progress: receiver of the lags done; None for none.

    Raises:
        TokscaleError: lags do not ascend from 1 or more, or there is no permutation.
        UndefinedError: the first lag has too few pairs.
    """
    if not lags or lags[0] < 1 or (np.diff(lags) <= 0).any() or n_permutations < 1:
        raise TokscaleError(
            f"{len(lags)} lags and {n_permutations} permutations give no correlations; give lags "
            "that ascend from 1 or more, and at least one permutation"
        )
    rng = np.random.default_rng(seed)
    permuted = [documents.permuted(rng) for _ in range(n_permutations)]
    taken: list[tuple[int, float, float, Floats]] = []
    n_without = 0
    what = "correlations within documents" if centred else "correlations of the tokens"
    meter = (progress or NoProgress()).meter(what, len(lags), "lags")
    for lag in lags:
        pairs = Pairs(documents, lag, centred)
        if pairs.n < MIN_PAIRS or n_without == END_OF_SIGNAL:
            break
        norm, influence_D = pairs.norm_and_influence()
        floor = max(Pairs(other, lag, centred).norm() for other in permuted)
        taken.append((lag, norm, floor, influence_D))
        n_without = 0 if norm >= SIGNAL * floor else n_without + 1
        meter(len(taken))
    meter(len(lags))  # the lags after the end of the signal are done, too
    if not taken:
        raise UndefinedError(
            f"the documents have {pairs.n} pairs of tokens {lag} apart; expected {MIN_PAIRS} or "
            "more for correlations; read more tokens"
        )
    lag_L, norm_L, floor_L, influence_LD = map(np.array, zip(*taken, strict=True))
    share_D = documents.length_D / documents.n_tokens
    return Correlations(lag_L, norm_L, floor_L, influence_LD, share_D, documents.n_tokens, centred)


def correlation_exponent(
    correlations: Correlations, *, n_resamples: int = 1000, seed: int = DEFAULT_SEED
) -> CorrelationExponent:
    """Fit ln ||C(n)|| on ln n by ordinary least squares, up to the end of the signal.

    The fit follows docs/references.md 2.3 and ends as in 2.5: at the last lag before three in a row
    without a signal. Measured coverage: the interval from the documents' error alone had the exact
    slope in it for 57 of 60 planted corpora of 150 documents. Neither of the two errors shows that
    a law bends: check `r2` and the norms.

    Args:
        correlations: from `token_correlations`.
        n_resamples: number of bootstrap resamples R of the lags.
        seed: seed of the bootstrap.

    Raises:
        UndefinedError: there is no signal, it ends before lag 10, it is no power law (R^2 under
            0.7), or it comes from too few documents.
    """
    n_documents = float(1 / (correlations.share_D**2).sum())
    n_lags = _signal_end(correlations.valid_L)
    to_lag = int(correlations.lag_L[n_lags - 1]) if n_lags else 0
    _check_signal(correlations.n_tokens, to_lag, n_documents)
    x_L, y_L = np.log(correlations.lag_L[:n_lags]), np.log(correlations.norm_L[:n_lags])
    pull_L = -(x_L - x_L.mean()) / (n_lags * x_L.var())
    beta = float(pull_L @ y_L)
    r2 = float(beta**2 * x_L.var() / y_L.var())
    if r2 < MIN_R2 or beta <= 0:
        raise UndefinedError(
            f"the correlations' norm is no falling power law of the lag up to {to_lag}: beta is "
            f"{beta:.2f} and R^2 {r2:.2f}; expected a beta above 0 and R^2 of {MIN_R2:g} or more"
        )
    relative_LD = correlations.influence_LD[:n_lags] / correlations.norm_L[:n_lags, None]
    document_se = float(np.linalg.norm(pull_L @ relative_LD))
    document_se *= math.sqrt(n_documents / (n_documents - 1))
    beta_R = _resample_lags(x_L, y_L, n_resamples, seed)
    lag_se = float(beta_R.std(ddof=1))
    se = math.hypot(document_se, lag_se)
    reach = se * float(student_t.ppf(0.975, n_documents - 1))
    return CorrelationExponent(
        beta=symmetric_estimate(beta, reach),
        se=se,
        document_se=document_se,
        lag_se=lag_se,
        lag_interval=percentile_interval(beta, beta_R),
        r2=r2,
        to_lag=to_lag,
        n_lags=n_lags,
        n_documents=n_documents,
        n_tokens=correlations.n_tokens,
        centred=correlations.centred,
    )


def _check_signal(n_tokens: int, to_lag: int, n_documents: float) -> None:
    if to_lag < MIN_REACH:
        raise UndefinedError(
            f"the correlations of {n_tokens:,} tokens stand out from their floor up to lag "
            f"{to_lag}; expected lag {MIN_REACH} or more for beta; read more tokens, or take them "
            "centred"
        )
    if n_documents < MIN_DOCUMENTS:
        raise UndefinedError(
            f"the tokens come from {n_documents:.1f} documents (effective number); expected "
            f"{MIN_DOCUMENTS:g} or more for an error of beta; read more tokens"
        )


def _signal_end(valid_L: Mask) -> int:
    """Return the number of lags before the first three invalid ones, up to the last valid one."""
    end = len(valid_L)
    for start in range(len(valid_L) - END_OF_SIGNAL + 1):
        if not valid_L[start : start + END_OF_SIGNAL].any():
            end = start
            break
    return int(np.flatnonzero(valid_L[:end]).max(initial=-1)) + 1


def _resample_lags(x_L: Floats, y_L: Floats, n_resamples: int, seed: int) -> Floats:
    """Return beta of lags drawn with replacement, at least two of them different."""
    drawn_RL = np.random.default_rng(seed).integers(len(x_L), size=(n_resamples, len(x_L)))
    drawn_RL = drawn_RL[np.ptp(drawn_RL, axis=1) > 0]
    x_RL = x_L[drawn_RL] - x_L[drawn_RL].mean(axis=1, keepdims=True)
    return np.asarray(-(x_RL * y_L[drawn_RL]).sum(axis=1) / (x_RL**2).sum(axis=1))
