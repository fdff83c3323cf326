"""Predicted scores of documents, on texts where what is to be found is known.

Shapes: Q documents, W watched ones, L some of them, C hashed columns, V vocabulary.
"""

import sys
from functools import partial

import numpy as np
import pytest
from jobs import write_documents

from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.corpus.bin_idx import IndexedTokens
from megatron_tokscale.data.scores import HeldOutError
from megatron_tokscale.reweight import predict
from megatron_tokscale.reweight.predict import Features, Target, held_out_error

fit_predictor = partial(predict.fit_predictor, seed=0)
N_DOCUMENTS, VOCABULARY = 400, 50


def mixed_documents(seed=0):
    """Documents that draw their tokens from their own mixture of ten topics of five tokens."""
    random = np.random.default_rng(seed)
    documents = []
    for _ in range(N_DOCUMENTS):
        topics = random.choice(10, int(random.integers(80, 200)), p=random.dirichlet(np.ones(10)))
        documents.append((5 * topics + random.integers(0, 5, topics.size)).tolist())
    return documents


def features_of(prefix) -> Features:
    tokens = IndexedTokens.open(prefix)
    surprisal_Q = np.random.default_rng(5).normal(3, 0.1, tokens.n_sequences).astype(np.float32)
    return Features(tokens, surprisal_Q)


@pytest.fixture(scope="module")
def features(tmp_path_factory) -> Features:
    return features_of(write_documents(tmp_path_factory.mktemp("data") / "web", mixed_documents()))


@pytest.fixture(scope="module")
def linear_Q() -> np.ndarray:
    """A function of the frequencies of a document's tokens, linear, like a learning time."""
    weight_V = np.random.default_rng(1).normal(0, 2, VOCABULARY)
    documents = mixed_documents()
    return np.array([20 + weight_V[document].mean() for document in documents])


def test_a_linear_function_of_the_tokens_is_predicted(features, linear_Q):
    watched, rest = np.arange(200), np.arange(200, N_DOCUMENTS)
    target = Target(linear_Q[watched], np.random.default_rng(2).uniform(0.5, 2, 200))
    predictor = fit_predictor(features, watched, {"learning_time": target})
    errors = predictor.held_out["learning_time"]
    predicted = predictor.predict(rest)["learning_time"]
    truth = linear_Q[rest]
    assert errors.r2 > 0.9
    assert errors.spearman > 0.9
    assert errors.rmse < 0.4 * errors.rmse_of_mean
    assert 1 - np.mean((predicted - truth) ** 2) / truth.var() > 0.9  # as held out, so outside


def test_the_order_of_tokens_is_seen(tmp_path):
    """Two kinds of document of the same tokens, one with them in the reverse order."""
    random = np.random.default_rng(0)
    cycle = np.arange(20)
    documents = [
        np.tile(np.roll(cycle, random.integers(20)), 4)[:: 1 if q % 2 else -1].tolist()
        for q in range(100)
    ]
    features = features_of(write_documents(tmp_path / "cycles", documents))
    target = Target(np.arange(100) % 2 * 1.0, np.ones(100))
    assert fit_predictor(features, np.arange(100), {"drop": target}).held_out["drop"].r2 > 0.9


@pytest.mark.parametrize("seed", range(3))
def test_values_unrelated_to_the_text_are_not_predicted(features, linear_Q, seed):
    shuffled_Q = np.random.default_rng(seed).permutation(linear_Q)
    target = Target(shuffled_Q[:300], np.ones(300))
    errors = fit_predictor(features, np.arange(300), {"drop": target}).held_out["drop"]
    assert errors.r2 < 0.05
    assert (errors.spearman or 0) < 0.2  # below 0: a fold's mean is against that of the others
    assert errors.rmse > 0.97 * errors.rmse_of_mean


def test_a_weight_of_zero_leaves_a_document_out(features, linear_Q):
    value_W, weight_W = linear_Q[:300].copy(), np.ones(300)
    value_W[200:], weight_W[200:] = np.nan, 0
    predictor = fit_predictor(features, np.arange(300), {"spread": Target(value_W, weight_W)})
    assert predictor.held_out["spread"].documents == 200
    assert predictor.held_out["spread"].r2 > 0.9


def test_heavy_documents_count_for_more(features, linear_Q):
    """Of two contradicting halves the prediction follows the heavier."""
    value_W = np.where(np.arange(300) % 2, linear_Q[:300], -linear_Q[:300])
    for heavy in (0, 1):
        weight_W = np.where(np.arange(300) % 2 == heavy, 100.0, 1.0)
        predictor = fit_predictor(features, np.arange(300), {"drop": Target(value_W, weight_W)})
        predicted = predictor.predict(np.arange(300, N_DOCUMENTS))["drop"]
        assert np.sign(np.median(predicted)) == (1 if heavy else -1)


def test_a_prediction_stays_in_the_range_of_the_documents_it_was_learned_from(features, linear_Q):
    middle = np.argsort(linear_Q)[100:300]
    target = Target(linear_Q[middle], np.ones(200))
    others = np.setdiff1d(np.arange(N_DOCUMENTS), middle)
    predicted = fit_predictor(features, middle, {"drop": target}).predict(others)["drop"]
    assert predicted.min() >= linear_Q[middle].min()
    assert predicted.max() <= linear_Q[middle].max()


@pytest.mark.parametrize(
    ("value", "known", "expected"), [(0.3, 60, 0.3), (1.0, 10, 1.0), (1.0, 0, np.nan)]
)
def test_where_nothing_varies_the_prediction_is_the_mean(features, value, known, expected):
    weight_W = (np.arange(60) < known) * 1.0
    predictor = fit_predictor(
        features, np.arange(60), {"drop": Target(np.full(60, value), weight_W)}
    )
    assert predictor.held_out["drop"] == HeldOutError(known)
    np.testing.assert_allclose(predictor.predict(np.arange(60, 65))["drop"], [expected] * 5)


def test_blocks_do_not_change_a_prediction(features, linear_Q, monkeypatch):
    target = {"drop": Target(linear_Q[:100], np.ones(100))}
    whole = fit_predictor(features, np.arange(100), target).predict(np.arange(100, 300))["drop"]
    monkeypatch.setattr(predict, "_BLOCK_TOKENS", 150)
    cut = fit_predictor(features, np.arange(100), target).predict(np.arange(100, 300))["drop"]
    np.testing.assert_allclose(cut, whole, rtol=1e-6)
    assert fit_predictor(features, np.arange(100), target).predict(np.arange(0))["drop"].size == 0


def test_of_many_watched_tokens_some_are_used(features, linear_Q, monkeypatch):
    monkeypatch.setattr(predict, "_TRAINING_TOKENS", 15_000)
    target = {"drop": Target(linear_Q, np.ones(N_DOCUMENTS))}
    predictor = fit_predictor(features, np.arange(N_DOCUMENTS), target)
    assert 75 < len(predictor.document_W) < 188  # documents have 80 to 199 tokens
    assert predictor.held_out["drop"].r2 > 0.7


def column_of(key):
    """splitmix64's mixer in Python's whole numbers, upper 16 bits."""
    key = (key + 0x9E3779B97F4A7C15) % 2**64
    key = (key ^ (key >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    key = (key ^ (key >> 27)) * 0x94D049BB133111EB % 2**64
    return (key ^ (key >> 31)) >> 48


def test_columns_hold_the_frequencies_of_tokens_and_pairs(tmp_path, monkeypatch):
    monkeypatch.setattr(predict, "FIRST_TOKENS", 6)
    documents = [[1, 2, 1, 2], [7], [1, 2, 3, 4, 5, 6, 7, 8, 9], [0, 65535, 0]]
    features = features_of(write_documents(tmp_path / "web", documents))
    chosen = [2, 0, 1, 3]
    expected_LC = np.zeros((4, 2**16))
    for row, q in enumerate(chosen):
        used = documents[q][:6]
        for i, token in enumerate(used):
            expected_LC[row, column_of(token)] += 1 / len(used)
            if i:
                expected_LC[row, column_of((used[i - 1] + 1) * 2**32 + token)] += 1 / len(used)
    found_LC = features.hashed(np.array(chosen)).toarray()
    np.testing.assert_allclose(found_LC, expected_LC, rtol=1e-6)


def test_errors_are_those_of_the_formulas():
    random = np.random.default_rng(0)
    value, weight = random.normal(size=30), random.uniform(1, 2, 30)
    predicted = value + random.normal(size=30)
    errors = held_out_error(value, predicted, weight)
    mean = np.average(value, weights=weight)
    squares = [np.average((value - other) ** 2, weights=weight) for other in (predicted, mean)]
    assert errors.r2 == pytest.approx(1 - squares[0] / squares[1])
    assert (errors.rmse, errors.rmse_of_mean) == pytest.approx(np.sqrt(squares))
    ranks = [[sum(x < y for x in array) for y in array] for array in (value, predicted)]
    difference = np.subtract(*ranks)
    assert errors.spearman == pytest.approx(1 - 6 * (difference**2).sum() / (30 * (30**2 - 1)))


def test_too_few_documents_are_refused(features, linear_Q):
    with pytest.raises(TokscaleError, match=r"has 49 watched documents, too few .*; expected 50"):
        fit_predictor(features, np.arange(49), {"drop": Target(linear_Q[:49], np.ones(49))})


def test_a_machine_without_scikit_learn_is_told_what_to_install(features, linear_Q, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(TokscaleError, match=r"pip install 'megatron-tokscale\[scores\]'"):
        fit_predictor(features, np.arange(60), {"drop": Target(linear_Q[:60], np.ones(60))})
