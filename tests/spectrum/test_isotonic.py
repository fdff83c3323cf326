"""Isotonic losses and times to a threshold, against scipy. N tokens, V values of the axis."""

import math

import numpy as np
import pytest
from scipy.optimize import isotonic_regression

from megatron_tokscale.core.errors import UndefinedError
from megatron_tokscale.spectrum.isotonic import isotonic, size_thresholds, threshold_times


def test_isotonic_losses_are_scipys():
    rng = np.random.default_rng(0)
    loss_NV, weight = rng.standard_normal((40, 7)) - 0.3 * np.arange(7), rng.integers(1, 4, 7)
    expected = [isotonic_regression(row, weights=weight, increasing=False).x for row in loss_NV]
    np.testing.assert_allclose(isotonic(loss_NV, weight.astype(float)), expected, atol=1e-12)


def by_scipy(value_K, loss_K, threshold):
    """The first value at which the antitonic fit of the means at each value is low enough."""
    value_V, count_V = np.unique(value_K, return_counts=True)
    mean_V = [loss_K[value_K == value].mean() for value in value_V]
    fit_V = isotonic_regression(mean_V, weights=count_V, increasing=False).x
    low = np.flatnonzero(fit_V <= threshold)
    return value_V[low[0]] if len(low) else np.inf


@pytest.mark.parametrize("value_K", [np.arange(1.0, 9), np.array([1.0, 1, 2, 3, 3, 3, 4, 8])])
def test_the_threshold_is_met_where_scipys_isotonic_regression_meets_it(value_K):
    generator = np.random.default_rng(0)
    fall_N = generator.uniform(-1, 4, (300, 1))
    loss_NK = 2 - fall_N * np.linspace(0, 1, 8) + generator.normal(0, 0.7, (300, 8))
    found = threshold_times(value_K, loss_NK, 0.9)
    expected = [by_scipy(value_K, loss_K, 0.9) for loss_K in loss_NK]
    assert found.tolist() == expected
    assert 50 < np.isfinite(expected).sum() < 250


def test_a_fit_at_the_threshold_is_learned():
    assert threshold_times([1, 2, 4], [[3.0, 1.0, 1.0]], 1.0).tolist() == [2]
    assert threshold_times([1, 2, 4], [[1.0, 1.0, 1.0]], 1.0).tolist() == [1]
    assert threshold_times([1, 2, 4], [[3.0, 3.0, 1.5]], 1.0).tolist() == [math.inf]


def test_the_size_of_half_the_fall_is_interpolated_and_equal_sizes_are_averaged():
    log_size = np.array([1.0, 2.0, 2.0, 4.0])
    loss = np.array([[4.0, 3.9, 4.1, 2.0], [4.0, 2.0, 2.0, 2.0], [1.0, 2.0, 2.0, 3.0]], np.float32)
    at, fall = size_thresholds(log_size, loss)
    # 4 -> 4 -> 2: half at 3 nats, midway from ln size 2 to 4; 4 -> 2 -> 2: midway from 1 to 2.
    assert at[:2] == pytest.approx([3.0, 1.5])
    assert fall == pytest.approx([2.0, 2.0, 0.0], abs=1e-6)
    assert np.isnan(at[2])


def test_one_size_has_no_threshold():
    with pytest.raises(UndefinedError, match="all runs have one size"):
        size_thresholds(np.zeros(3), np.zeros((2, 3), np.float32))
