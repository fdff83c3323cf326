"""Resamples draw whole documents, and their intervals equal those of scipy.

Shapes: N tokens, U units, R resamples.
"""

import numpy as np
import pytest
from scipy import stats

from megatron_tokscale.spectrum import Estimate, Units


def test_each_document_is_one_unit_of_its_own():
    dataset_N = np.repeat([0, 1], 60)
    document_N = np.tile(np.repeat(np.arange(12), 5), 2)
    units = Units.from_documents(dataset_N, document_N, seed=0)
    assert units.documents == len(units) == 24
    assert len(set(zip(dataset_N, document_N, units.unit_N, strict=True))) == 24
    assert (units.dataset_U[units.unit_N] == dataset_N).all()


def test_a_document_that_comes_back_later_is_the_same_unit():
    units = Units.from_documents(np.zeros(6), [4, 4, 7, 7, 4, 7], seed=0)
    assert units.unit_N.tolist() == [0, 0, 1, 1, 0, 1]


def test_many_documents_are_dealt_evenly_and_no_unit_mixes_datasets():
    document_N = np.repeat(np.arange(4000), 3)
    dataset_N = np.repeat([0, 1, 2], [9000, 2997, 3])
    units = Units.from_documents(dataset_N, document_N, seed=0)
    assert units.documents == 4000
    assert abs(len(units) - 1024) <= 1
    assert (units.dataset_U[units.unit_N] == dataset_N).all()
    of_document = units.unit_N.reshape(-1, 3)
    assert (of_document == of_document[:, :1]).all()
    documents_U = np.bincount(of_document[:, 0])
    assert set(documents_U[units.dataset_U == 0]) <= {3, 4}
    assert documents_U[units.dataset_U == 2].tolist() == [1]


def test_the_seed_decides_the_units():
    document_N, dataset_N = np.arange(3000), np.zeros(3000)
    same, again, other = (
        Units.from_documents(dataset_N, document_N, seed).unit_N for seed in (0, 0, 1)
    )
    assert (same == again).all()
    assert (same != other).any()


def test_weights_are_a_row_of_ones_and_then_negative_binomial():
    """The 97.5% points of the normal distribution and of Student's t are those of any table."""
    weight_RU = Units.from_documents(np.zeros(40), np.arange(40), seed=0).weights(5000, seed=1)
    assert (weight_RU[0] == 1).all()
    drawn = weight_RU[1:].ravel()
    p = (1.95996 / 2.02269) ** 2
    expected = stats.nbinom.pmf(np.arange(7), p / (1 - p), p) * len(drawn)
    observed = np.bincount(drawn.astype(int), minlength=7)[:7]
    assert stats.chisquare(observed, expected * observed.sum() / expected.sum()).pvalue > 1e-3


@pytest.mark.parametrize("n_documents", [6, 12, 40, 400])
def test_the_interval_of_a_mean_is_students(n_documents):
    value_U = np.random.default_rng(3).standard_normal(n_documents)
    units = Units.from_documents(np.zeros(n_documents), np.arange(n_documents), seed=0)
    weight_RU = units.weights(20_000, seed=1)
    mine = Estimate.from_resamples(weight_RU @ value_U / weight_RU.sum(axis=1))
    low, high = stats.ttest_1samp(value_U, 0).confidence_interval()
    assert mine.high - mine.low == pytest.approx(high - low, rel=0.05)


def test_a_half_takes_half_of_every_dataset():
    units = Units.from_documents(np.repeat([0, 1, 2], [40, 7, 1]), np.arange(48), seed=0)
    half_U = units.half(seed=3)
    assert [half_U[units.dataset_U == d].sum() for d in range(3)] == [20, 4, 1]
    assert (half_U != units.half(seed=4)).any()


@pytest.mark.parametrize("statistic", [np.mean, np.median, np.std])
def test_intervals_equal_those_of_scipys_bias_corrected_bootstrap(statistic):
    """scipy's BCa differs only by its acceleration, which is about zero for normal data."""
    value_N = np.random.default_rng(5).standard_normal(400)
    rng = np.random.default_rng(6)
    drawn = [statistic(rng.choice(value_N, 400)) for _ in range(4000)]
    mine = Estimate.from_resamples([statistic(value_N), *drawn])
    theirs = stats.bootstrap(
        (value_N,), statistic, n_resamples=4000, method="BCa", rng=np.random.default_rng(7)
    ).confidence_interval
    width = theirs.high - theirs.low
    np.testing.assert_allclose([mine.low, mine.high], theirs, atol=0.08 * width)


def test_a_symmetric_bootstrap_gives_plain_percentiles():
    drawn = np.linspace(-1, 1, 2001)
    estimate = Estimate.from_resamples([0.0, *drawn])
    np.testing.assert_allclose([estimate.low, estimate.high], [-0.95, 0.95], atol=1e-3)


@pytest.mark.parametrize("value_R", [[1.0], [1.0, 2.0], [np.nan, 1, 2, 3], [1, 2, np.nan, np.nan]])
def test_resamples_that_define_no_interval_give_an_estimate_without_one(value_R):
    estimate = Estimate.from_resamples(value_R)
    assert not estimate.has_interval
    np.testing.assert_equal(estimate.value, 1.0 if value_R[0] == 1 else np.nan)


def test_a_statistic_that_never_varies_has_an_interval_of_no_width():
    assert Estimate.from_resamples(np.ones(50)) == Estimate(1.0, 1.0, 1.0)


def test_every_resample_draws_a_unit():
    units = Units.from_documents([0, 0, 0, 1, 1, 1], [0, 1, 1, 0, 1, 2], seed=0)
    weight_RU = units.weights(5000, seed=0)
    assert (weight_RU[0] == 1).all()
    assert weight_RU.any(axis=1).all()
    assert (weight_RU == 0).any()


@pytest.mark.parametrize("documents", [1, 2, 4])
def test_few_units_have_no_resamples_and_no_interval(documents):
    units = Units.from_documents(np.zeros(documents), np.arange(documents), seed=0)
    weight_RU = units.weights(50, seed=0)
    assert (weight_RU[0] == 1).all() and np.isnan(weight_RU[1:]).all()
    estimate = Estimate.from_resamples(weight_RU @ np.arange(documents))
    assert estimate.value == sum(range(documents)) and not estimate.has_interval


def test_a_dataset_of_few_units_has_no_resamples_beside_one_of_many():
    units = Units.from_documents([0] * 4 + [1] * 5, [0, 1, 2, 3, 0, 1, 2, 3, 4], seed=0)
    weight_RU = units.weights(50, seed=0)
    few_RU, many_RU = (units.of_dataset(weight_RU, dataset) for dataset in (0, 1))
    np.testing.assert_array_equal(few_RU[0], [1] * 4 + [0] * 5)
    assert np.isnan(few_RU[1:]).all()
    np.testing.assert_array_equal(many_RU, weight_RU * ([0] * 4 + [1] * 5))
