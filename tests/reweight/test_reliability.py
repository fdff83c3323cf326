"""Reliability and shrinkage, against closed forms of planted documents.

A planted document has a true mean difference and independent noise in each of its tokens.

Shapes: W documents, 2 halves.
"""

import numpy as np
import pytest

from megatron_tokscale.reweight.halves import Halves
from megatron_tokscale.reweight.reliability import cells, reliability, shrunk, variances

SIGNAL, NOISE = 0.04, 1.5  # variances of the true means, and of a token


def planted(random, true_W, count_W2, noise=NOISE):
    """Halves of documents with these true means."""
    count_W2 = np.broadcast_to(count_W2, (len(true_W), 2))
    deviation_W2 = np.sqrt(noise * count_W2)
    sum_W2 = count_W2 * true_W[:, None] + deviation_W2 * random.normal(size=count_W2.shape)
    return Halves(np.arange(len(true_W)), count_W2.astype(np.int64), sum_W2)


def true_means(random, n, mean=0.3, signal=SIGNAL):
    return random.normal(mean, np.sqrt(signal), n)


def test_the_reliability_of_equal_halves_is_that_of_numpy():
    random = np.random.default_rng(0)
    halves = planted(random, true_means(random, 500), 40)
    r = np.corrcoef((halves.sum_W2 / 40).T)[0, 1]
    found = reliability(halves, None)
    assert found.watched == pytest.approx(2 * r / (1 + r), rel=1e-12)
    assert found.signal_variance == pytest.approx(np.cov((halves.sum_W2 / 40).T)[0, 1], rel=1e-12)
    assert found.mean == pytest.approx(halves.sum_W2.sum() / (500 * 80), rel=1e-12)
    assert (found.documents, found.predicted) == (500, None)


def test_reliability_and_variances_are_those_that_are_planted():
    random = np.random.default_rng(1)
    halves = planted(random, true_means(random, 40_000), 30)
    found, parts = reliability(halves, None), variances(halves)
    assert found.watched == pytest.approx(SIGNAL / (SIGNAL + NOISE / 60), abs=0.01)
    assert parts.signal == found.signal_variance == pytest.approx(SIGNAL, rel=0.03)
    assert parts.noise == pytest.approx(NOISE, rel=0.03)


def test_variances_are_unbiased_in_few_documents_of_unequal_length():
    random = np.random.default_rng(2)
    count_W2 = random.integers(1, 60, (12, 2))
    found = []
    for _ in range(4000):
        parts = variances(planted(random, true_means(random, 12), count_W2))
        found.append((parts.signal, parts.noise))
    errors = np.std(found, axis=0) / np.sqrt(len(found))
    assert np.all(np.abs(np.mean(found, axis=0) - (SIGNAL, NOISE)) < 4 * errors)
    assert np.min(found, axis=0)[0] < 0  # an estimate of few documents may be negative


def test_halves_that_differ_in_their_means_have_the_same_variances():
    random = np.random.default_rng(3)
    halves = planted(random, true_means(random, 300), random.integers(1, 60, (300, 2)))
    moved = Halves(halves.document_W, halves.count_W2, halves.sum_W2 + halves.count_W2 * [0.0, 5.0])
    assert variances(moved).signal == pytest.approx(variances(halves).signal, rel=1e-9)
    assert variances(moved).noise == pytest.approx(variances(halves).noise, rel=1e-9)


def test_the_reliability_of_a_prediction_is_its_squared_correlation_with_the_truth():
    random = np.random.default_rng(4)
    true_W = true_means(random, 40_000)
    halves = planted(random, true_W, 10)
    predicted_W = 0.5 * true_W + random.normal(0, 0.1, true_W.size)
    expected = np.corrcoef(predicted_W, true_W)[0, 1] ** 2
    assert reliability(halves, predicted_W).predicted == pytest.approx(expected, abs=0.02)
    assert reliability(halves, -predicted_W).predicted == 0
    assert reliability(halves, np.ones(true_W.size)).predicted == 0


def test_predictions_of_scores_without_a_sure_signal_have_no_reliability():
    """Divided by a reliability that is chance, any correlation would look perfect."""
    random = np.random.default_rng(11)
    halves = planted(random, np.zeros(30), 10)
    while not 0 < np.corrcoef((halves.sum_W2 / 10).T)[0, 1] < 2 / np.sqrt(30):
        halves = planted(random, np.zeros(30), 10)
    found = reliability(halves, halves.mean_W)
    assert 0 < found.watched < 0.6
    assert found.predicted is None


def test_scores_of_equal_documents_are_shrunk_by_their_reliability():
    random = np.random.default_rng(5)
    halves = planted(random, true_means(random, 200), 20)
    parts = variances(halves)
    share = parts.signal / (parts.signal + parts.noise / 40)
    expected_W = halves.mean_W.mean() + share * (halves.mean_W - halves.mean_W.mean())
    np.testing.assert_allclose(shrunk(halves, np.zeros(200, int)), expected_W, rtol=1e-12)


def test_shrunk_scores_are_nearer_the_truth_and_the_truth_follows_them_one_to_one():
    """In cells of unlike means and signals, with documents of 2 to 60 tokens."""
    random = np.random.default_rng(6)
    cell_W = np.repeat(np.arange(8), 1500)
    true_W = np.concatenate(
        [true_means(random, 1500, mean=0.1 * c, signal=0.01 * (c + 1)) for c in range(8)]
    )
    halves = planted(random, true_W, random.integers(1, 31, (cell_W.size, 2)))
    found_W = shrunk(halves, cell_W)
    raw, better = np.mean((halves.mean_W - true_W) ** 2), np.mean((found_W - true_W) ** 2)
    assert better < 0.5 * raw
    # The best that is possible: the variance of the truth given cell and measurement.
    signal_W, noise_W = 0.01 * (cell_W + 1), NOISE / halves.tokens_W
    assert better < 1.05 * np.mean(signal_W * noise_W / (signal_W + noise_W))
    assert np.polyfit(found_W, true_W, 1)[0] == pytest.approx(1, abs=0.02)
    assert np.polyfit(halves.mean_W, true_W, 1)[0] < 0.8


def test_negative_falls_stay_negative():
    random = np.random.default_rng(7)
    halves = planted(random, true_means(random, 300, mean=-0.5), 50)
    assert np.mean(shrunk(halves, np.zeros(300, int)) < 0) > 0.95
    assert reliability(halves, None).mean < -0.4


def test_without_signal_every_document_of_a_cell_gets_its_mean():
    """Halves that contradict each other have a negative covariance, which counts as zero."""
    gap_W = np.linspace(-1, 1, 40)
    halves = Halves(
        np.arange(40), np.full((40, 2), 8), 8 * np.stack([0.2 + gap_W, 0.2 - gap_W], axis=1)
    )
    assert variances(halves).signal < 0
    np.testing.assert_allclose(shrunk(halves, np.zeros(40, int)), 0.2, rtol=1e-12)
    found = reliability(halves, gap_W)
    assert (found.watched, found.signal_variance, found.predicted) == (0.0, 0.0, None)


def test_scores_without_signal_keep_next_to_nothing_of_the_spread_of_their_noise():
    """Strata by such scores promise the spread that is kept as a gain, and cannot give it."""
    random = np.random.default_rng(12)
    halves = planted(random, np.full(5000, 0.3), 50)
    found_W = shrunk(halves, cells(random.permutation(5000), random.normal(size=5000)))
    assert np.var(found_W) < 0.02 * NOISE / 100


def test_without_noise_scores_stay_as_they_are():
    true_W = np.linspace(-1, 2, 30)
    halves = Halves(np.arange(30), np.full((30, 2), 3), 3 * np.stack([true_W, true_W], axis=1))
    np.testing.assert_allclose(shrunk(halves, np.zeros(30, int)), true_W, rtol=1e-12)
    assert reliability(halves, None).watched == pytest.approx(1, rel=1e-12)


def test_equal_documents_have_no_reliability_and_keep_their_score():
    halves = Halves(np.arange(30), np.full((30, 2), 4), np.full((30, 2), 2.0))
    np.testing.assert_allclose(shrunk(halves, np.zeros(30, int)), 0.5, rtol=1e-12)
    assert reliability(halves, np.arange(30.0)).watched is None


def test_a_document_of_one_token_is_shrunk_by_the_variances_of_the_others():
    random = np.random.default_rng(8)
    rest = planted(random, true_means(random, 60), 25)
    halves = Halves(
        np.arange(61),
        np.concatenate([rest.count_W2, [[0, 1]]]),
        np.concatenate([rest.sum_W2, [[0.0, 3.0]]]),
    )
    parts = variances(rest)
    assert variances(halves) == parts
    total_W = parts.signal + parts.noise / halves.tokens_W
    centre = np.average(halves.mean_W, weights=1 / total_W)
    expected = centre + parts.signal / total_W[-1] * (3.0 - centre)
    found_W = shrunk(halves, np.zeros(61, int))
    assert found_W[-1] == pytest.approx(expected, rel=1e-12)
    assert abs(found_W[-1] - centre) < 0.1


@pytest.mark.parametrize("n_others", [0, 8])
def test_a_small_cell_takes_mean_and_variances_of_the_dataset(n_others):
    random = np.random.default_rng(9)
    halves = planted(random, true_means(random, 100), 20)
    cell_W = np.where(np.arange(100) <= n_others, 7, 3)
    in_one_cell_W = shrunk(halves, np.zeros(100, int))
    found_W = shrunk(halves, cell_W)
    np.testing.assert_array_equal(found_W[cell_W == 7], in_one_cell_W[cell_W == 7])
    large = halves.rows(cell_W == 3)
    np.testing.assert_array_equal(
        found_W[cell_W == 3], shrunk(large, np.zeros(len(large.document_W), int))
    )


@pytest.mark.parametrize("n", [0, 1])
def test_a_dataset_without_two_documents_is_not_shrunk(n):
    halves = Halves(np.arange(n), np.full((n, 2), 4), np.full((n, 2), 2.0))
    np.testing.assert_array_equal(shrunk(halves, cells(np.full(n, 9), None)), np.full(n, 0.5))
    found = reliability(halves, None)
    assert (found.watched, found.predicted, found.documents) == (None, None, n)


def test_cells_are_deciles_of_length_and_prediction():
    random = np.random.default_rng(10)
    length_W, predicted_W = random.permutation(20_000), random.normal(size=20_000)
    cell_W = cells(length_W, predicted_W)
    by_rank_W = (length_W // 2000) * 10 + (np.argsort(np.argsort(predicted_W)) // 2000)
    np.testing.assert_array_equal(cell_W, by_rank_W)
    np.testing.assert_array_equal(cells(length_W, None), length_W // 2000)


def test_few_documents_have_few_cells_and_equal_ones_one():
    lengths = np.arange(1800)
    assert np.bincount(cells(lengths, None)).tolist() == [200] * 9
    assert len(np.unique(cells(lengths, np.random.default_rng(0).normal(size=1800)))) == 9
    assert len(np.unique(cells(np.full(1800, 64), None))) == 1
    assert np.unique(cells(lengths[:190], lengths[:190] * 1.0)).tolist() == [0]
