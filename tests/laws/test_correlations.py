"""Dense matrices and planted Markov chains against the correlations of a corpus. L lags."""

import numpy as np
import pytest
from recorded_progress import RecordedProgress

from megatron_tokscale.core.errors import TokscaleError, UndefinedError
from megatron_tokscale.corpus.bin_idx import IndexedTokens, Portion
from megatron_tokscale.laws.language.correlations import (
    Correlations,
    correlation_exponent,
    draw_documents,
    token_correlations,
)
from megatron_tokscale.laws.language.pairs import Documents, Pairs

BETA, SCALE = 1.2, 1.0


def rough_documents(rng, n_documents=40, length=30, n_tokens=7):
    """Draw documents that prefer different words; half of the tokens repeat the token before."""
    documents = []
    for _ in range(n_documents):
        words = rng.choice(n_tokens, size=length, p=rng.dirichlet(np.full(n_tokens, 0.5)))
        for i in range(1, length):
            words[i] = words[i - 1] if rng.random() < 0.5 else words[i]
        documents.append(100 + 13 * words)
    return documents


def dense_joint(documents, lag, n_tokens=7, weights=None):
    """Return P(X_i = mu, X_{i+n} = nu) from a loop over pairs."""
    joint = np.zeros((n_tokens, n_tokens))
    weights = np.ones(len(documents)) if weights is None else weights
    for weight, words in zip(weights, documents, strict=True):
        for left, right in zip(words[:-lag], words[lag:], strict=True):
            joint[(left - 100) // 13, (right - 100) // 13] += weight
    return joint / joint.sum()


def dense_norm(documents, lag, weights=None):
    joint = dense_joint(documents, lag, weights=weights)
    return np.linalg.norm(joint - np.outer(joint.sum(1), joint.sum(0)), 2)


def spins(rng, n_documents, length, n_tokens=4):
    """Draw chains of a hidden spin; each state of the spin shows itself by one of V/2 tokens.

    The spin flips at a rate of its document. With rates from a gamma distribution, the mean of
    exp(-rate n) is (1 + SCALE n)^-BETA, and ||C(n)|| is this mean divided by V.
    """
    kept = np.exp(-rng.gamma(BETA, SCALE, (n_documents, 1)))
    flips = np.where(rng.random((n_documents, length)) < (1 - kept) / 2, -1, 1)
    spin = np.cumprod(flips, axis=1) * rng.choice([-1, 1], (n_documents, 1))
    shown = rng.integers(n_tokens // 2, size=spin.shape)
    return list(shown + (spin > 0) * (n_tokens // 2))


def spins_norm(lag, n_tokens=4):
    return (1 + SCALE * np.asarray(lag)) ** -BETA / n_tokens


@pytest.mark.parametrize("lag", [1, 2, 9])
def test_the_norm_is_that_of_the_dense_matrix(lag):
    documents = rough_documents(np.random.default_rng(0))
    norm = Pairs(Documents.from_sequences(documents), lag, centred=False).norm()
    assert norm == pytest.approx(dense_norm(documents, lag), rel=1e-4)


def test_the_influence_is_the_derivative_by_a_documents_weight():
    documents = rough_documents(np.random.default_rng(1))
    norm, influence_D = Pairs(
        Documents.from_sequences(documents), 2, centred=False
    ).norm_and_influence()
    assert influence_D.sum() == pytest.approx(0, abs=1e-9)
    for d in (0, 17, 39):
        more = np.where(np.arange(40) == d, 1.001, 1.0)
        change = (dense_norm(documents, 2, more) - dense_norm(documents, 2)) / 0.001
        assert influence_D[d] == pytest.approx(change, rel=2e-2, abs=1e-2 * norm / 40)


def test_centred_correlations_subtract_the_mean_of_all_permutations():
    rng = np.random.default_rng(2)
    documents = rough_documents(rng)
    permuted = [[rng.permutation(words) for words in documents] for _ in range(300)]
    shuffled = np.mean([dense_joint(other, 2) for other in permuted], axis=0)
    expected = np.linalg.norm(dense_joint(documents, 2) - shuffled, 2)
    pairs = Pairs(Documents.from_sequences(documents), 2, centred=True)
    norm, influence_D = pairs.norm_and_influence()
    assert norm == pytest.approx(expected, rel=0.02)
    assert influence_D.sum() == pytest.approx(0, abs=1e-9)
    # Documents that differ in their words drown order; about their permutations they do not.
    still = Pairs(Documents.from_sequences(permuted[0]), 2, centred=False)
    assert still.norm() > 2 * Pairs(still.documents, 2, centred=True).norm()


def test_a_planted_decay_is_measured_lag_by_lag():
    documents = Documents.from_sequences(spins(np.random.default_rng(3), 1500, 300))
    found = token_correlations(documents, lags=[1, 2, 4, 8])
    error_L = np.sqrt((found.influence_LD**2).sum(axis=1))
    assert found.valid_L.all()
    assert (np.abs(found.norm_L - spins_norm(found.lag_L)) < 3 * error_L).all()
    assert (error_L < 0.1 * found.norm_L).all()


@pytest.mark.slow
def test_beta_and_its_documents_error_cover_a_planted_decay():
    """The truth is the slope of the exact norms over the same lags.

    It is the same lags in every run, so that the documents' error alone must cover.
    """
    rng = np.random.default_rng(4)
    n_runs, within, within_documents = 30, 0, 0
    for _ in range(n_runs):
        documents = Documents.from_sequences(spins(rng, 150, 1000))
        found = token_correlations(documents, lags=[1, 2, 3, 5, 7, 10], n_permutations=1)
        law = correlation_exponent(found)
        truth = -np.polyfit(np.log(found.lag_L), np.log(spins_norm(found.lag_L)), 1)[0]
        within += law.beta.low <= truth <= law.beta.high
        within_documents += abs(law.beta.value - truth) <= 1.96 * law.document_se
    assert within_documents >= 0.85 * n_runs
    assert within >= 0.9 * n_runs


def test_tokens_without_order_have_no_signal_and_no_beta():
    rng = np.random.default_rng(5)
    documents = Documents.from_sequences(list(rng.integers(200, size=(100, 1000))))
    progress = RecordedProgress()
    for centred in (False, True):
        found = token_correlations(documents, centred=centred, lags=range(1, 9), progress=progress)
        assert not found.valid_L.any()
        assert found.lag_L.tolist() == [1, 2, 3]
        with pytest.raises(UndefinedError, match="up to lag 0; expected lag 10"):
            correlation_exponent(found)
    counted = [(1, 8), (2, 8), (3, 8), (8, 8)]
    assert list(progress.reports.values()) == [counted, counted]


def known(norm_L, valid_L, n_documents=20):
    lag_L = np.arange(1, len(norm_L) + 1)
    floor_L = norm_L / np.where(valid_L, 2.0, 1.0)
    share_D = np.full(n_documents, 1 / n_documents)
    return Correlations(lag_L, norm_L, floor_L, np.zeros((len(lag_L), 20)), share_D, 1000, False)


def test_an_exact_law_gives_its_exponent_up_to_the_first_three_lags_without_a_signal():
    norm_L = 0.3 * np.arange(1.0, 21) ** -0.9
    norm_L[12:] = 1.0
    valid_L = np.ones(20, bool)
    valid_L[[3, 4, 12, 13, 14]] = False
    law = correlation_exponent(known(norm_L, valid_L))
    assert law.beta.value == pytest.approx(0.9)
    assert law.r2 == pytest.approx(1)
    assert law.se == pytest.approx(0, abs=1e-9)
    assert (law.to_lag, law.n_lags) == (12, 12)


def test_the_error_over_lags_is_that_of_a_bootstrap_of_points():
    rng = np.random.default_rng(6)
    x = np.log(np.arange(1, 16))
    y = -0.9 * x + 0.1 * rng.standard_normal(15)
    slopes = []
    for _ in range(2000):
        drawn = rng.integers(15, size=15)
        slopes.append(-np.polyfit(x[drawn], y[drawn], 1)[0])
    law = correlation_exponent(known(np.exp(y), np.ones(15, bool)))
    assert law.lag_se == pytest.approx(np.std(slopes), rel=0.1)
    assert law.lag_interval == pytest.approx(np.quantile(slopes, [0.025, 0.975]), rel=0.05)
    assert law.beta.value == pytest.approx(-np.polyfit(x, y, 1)[0])
    assert law.r2 == pytest.approx(np.corrcoef(x, y)[0, 1] ** 2)


@pytest.mark.parametrize(
    ("norm_L", "n_documents", "message"),
    [
        (np.arange(1.0, 10) ** -1, 20, "up to lag 9; expected lag 10"),
        (np.arange(1.0, 16) ** -1, 5, "from 5.0 documents"),
        (1 + np.arange(15) % 2 - 1e-3 * np.arange(15), 20, "no falling power law"),
        (np.arange(1.0, 16), 20, "no falling power law"),
    ],
)
def test_norms_without_a_power_law_have_no_beta(norm_L, n_documents, message):
    with pytest.raises(UndefinedError, match=message):
        correlation_exponent(known(norm_L, np.ones(len(norm_L), bool), n_documents))


def test_few_or_equal_tokens_are_refused():
    with pytest.raises(UndefinedError, match="29 pairs of tokens 1 apart"):
        token_correlations(Documents.from_sequences([np.arange(30)]))
    for settings in ({"lags": [0, 1]}, {"lags": [2, 1]}, {"lags": []}, {"n_permutations": 0}):
        with pytest.raises(TokscaleError, match="give lags that ascend"):
            token_correlations(Documents.from_sequences([np.arange(2000) % 7]), **settings)
    with pytest.raises(UndefinedError, match="1 distinct tokens"):
        Documents.from_sequences([np.zeros(30, int)])
    with pytest.raises(UndefinedError, match="0 distinct tokens"):
        Documents.from_sequences([])


class _Stored(IndexedTokens):
    """Sequences of which number i has i as its first digits."""

    def sequence(self, index):
        return np.arange(self.lengths[index]) + 100 * index


def test_documents_are_drawn_whole_by_weight_and_cut_at_the_end():
    tokens = _Stored("", np.full(50, 10, np.int32), np.zeros(50, np.int64), np.uint16)
    portions = [Portion(tokens, range(20), 0.75), Portion(tokens, range(20, 50), 0.25)]
    documents = draw_documents(portions, max_tokens=100, seed=1)
    lengths = documents.length_D.tolist()
    assert lengths == [10] * 7 + [5] + [10, 10, 5]
    assert documents.n_tokens == 100
    assert documents.n_distinct == 100
    other = draw_documents(portions, max_tokens=100, seed=1)
    assert (other.token_N == documents.token_N).all()
