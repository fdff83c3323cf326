"""The smoothing spline against scipy's, a dense likelihood, a dense Gaussian process and limits.

Shapes: K values, G grid points.
"""

import numpy as np
import pytest
from correlated import correlated_noise
from numpy.testing import assert_allclose
from scipy.interpolate import CubicSpline, make_smoothing_spline
from scipy.optimize import minimize

from megatron_tokscale.core.errors import UndefinedError
from megatron_tokscale.core.smoothing import SmoothingSpline


@pytest.fixture
def uneven():
    """Uneven x in no order, and noisy values of a sine."""
    rng = np.random.default_rng(0)
    x_K = rng.uniform(2, 10, 40)
    return x_K, np.sin(x_K) + 0.1 * rng.standard_normal(40)


@pytest.mark.parametrize("smoothing", [1e-3, 0.1, 10, 1e4])
def test_curve_and_slope_are_those_of_scipy_at_the_same_smoothing(uneven, smoothing):
    x_K, value_K = uneven
    found = SmoothingSpline.from_values(x_K, value_K, smoothing)
    order = np.argsort(x_K)
    expected = make_smoothing_spline(x_K[order], value_K[order], lam=smoothing)
    x_G = np.linspace(x_K.min(), x_K.max(), 101)
    assert_allclose(found.weights(x_G) @ value_K, expected(x_G), atol=1e-8)
    assert_allclose(found.slope_weights(x_G) @ value_K, expected.derivative()(x_G), atol=1e-8)
    fitted_KK = found.weights(x_K)
    assert_allclose(found.freedom, np.trace(fitted_KK), rtol=1e-9)


def test_values_at_the_same_x_count_as_their_mean_with_its_weight(uneven):
    x_K, value_K = uneven
    x_K = np.round(x_K)
    found = SmoothingSpline.from_values(x_K, value_K, 0.3)
    x_J, count_J = np.unique(x_K, return_counts=True)
    mean_J = [value_K[x_K == x].mean() for x in x_J]
    expected = make_smoothing_spline(x_J, mean_J, w=count_J, lam=0.3)
    x_G = np.linspace(x_J[0], x_J[-1], 50)
    assert_allclose(found.weights(x_G) @ value_K, expected(x_G), atol=1e-9)
    assert_allclose(found.slope_weights(x_G) @ value_K, expected.derivative()(x_G), atol=1e-9)


def test_the_limits_are_a_straight_line_and_the_natural_spline(uneven):
    x_K, value_K = uneven
    x_G = np.linspace(x_K.min(), x_K.max(), 50)
    line = SmoothingSpline.from_values(x_K, value_K, 1e12)
    assert_allclose(line.weights(x_G) @ value_K, np.polyval(np.polyfit(x_K, value_K, 1), x_G))
    x_K, value_K = np.arange(12.0), value_K[:12]
    through = SmoothingSpline.from_values(x_K, value_K, 1e-9)
    natural = CubicSpline(x_K, value_K, bc_type="natural")
    assert_allclose(through.slope_weights(x_G) @ value_K, natural(x_G, 1), atol=1e-6)


def motion_covariance(s, t):
    low, high = np.minimum(s, t), np.maximum(s, t)
    return low**2 * (3 * high - low) / 6


def restricted(x_K, value_K, noise, motion):
    """Minus twice the restricted log-likelihood of the mixed model, by dense matrices."""
    offset_K = x_K - x_K.min()
    v_KK = noise * np.eye(len(x_K)) + motion * motion_covariance(offset_K[:, None], offset_K)
    lines_K2 = np.stack([np.ones_like(x_K), x_K], axis=1)
    inverse_KK = np.linalg.inv(v_KK)
    inner_22 = lines_K2.T @ inverse_KK @ lines_K2
    beta_2 = np.linalg.solve(inner_22, lines_K2.T @ inverse_KK @ value_K)
    residual_K = value_K - lines_K2 @ beta_2
    logarithms = np.linalg.slogdet(v_KK)[1] + np.linalg.slogdet(inner_22)[1]
    return logarithms + residual_K @ inverse_KK @ residual_K


@pytest.mark.parametrize("ties", [False, True])
def test_the_smoothing_has_the_largest_restricted_likelihood(uneven, ties):
    x_K, value_K = uneven[0][:15], uneven[1][:15]
    x_K = np.round(x_K, 0 if ties else 6)
    best = minimize(
        lambda logs: restricted(x_K, value_K, *np.exp(logs)),
        np.log([0.02, 0.5]),
        method="Nelder-Mead",
        options={"xatol": 1e-7, "fatol": 1e-9, "maxiter": 2000},
    )
    noise, motion = np.exp(best.x)
    assert_allclose(SmoothingSpline.from_values(x_K, value_K).smoothing, noise / motion, rtol=1e-4)


def test_errors_are_those_of_dense_universal_kriging(uneven):
    """Predict values and differences with a straight line of unknown coefficients."""
    x_K, value_K = uneven[0][:12], uneven[1][:12]
    found = SmoothingSpline.from_values(x_K, value_K, 0.2)
    step, first, motion = 1e-4, x_K.min(), found.noise_variance / 0.2
    x_G = np.linspace(x_K.min() + 0.1, x_K.max() - 0.1, 9)
    x_A = np.concatenate([x_G, x_G - step, x_G + step])

    def covariance(s, t):
        return motion * motion_covariance(s[:, None] - first, t - first)

    v_KK = covariance(x_K, x_K) + found.noise_variance * np.eye(12)
    gain_AK = np.linalg.solve(v_KK, covariance(x_K, x_A)).T
    lines_K2, lines_A2 = (np.stack([np.ones_like(x), x], axis=1) for x in (x_K, x_A))
    inner_22 = np.linalg.inv(lines_K2.T @ np.linalg.solve(v_KK, lines_K2))
    beyond_A2 = lines_A2 - gain_AK @ lines_K2
    posterior_AA = covariance(x_A, x_A) - gain_AK @ covariance(x_K, x_A)
    posterior_AA += beyond_A2 @ inner_22 @ beyond_A2.T
    difference_GA = np.zeros((9, 27))
    difference_GA[np.arange(9), np.arange(9) + 9] = -1 / (2 * step)
    difference_GA[np.arange(9), np.arange(9) + 18] = 1 / (2 * step)
    slope_GG = difference_GA @ posterior_AA @ difference_GA.T
    assert_allclose(found.slope_error(x_G), np.sqrt(np.diag(slope_GG)), rtol=1e-3)


@pytest.mark.parametrize("count", [15, 35])
def test_intervals_of_the_noise_and_errors_of_the_slope_cover(count):
    """Checkpoints evenly spaced in steps are dense in ln t at the end."""
    rng = np.random.default_rng(1)
    x_K = np.log(np.arange(2, count + 2))
    x_G = np.linspace(x_K[0], x_K[-1], 40)
    inside, covered, variances = [], [], []
    for _ in range(200):
        value_K = 5 * np.exp(-0.35 * x_K) + 0.05 * rng.standard_normal(count)
        found = SmoothingSpline.from_values(x_K, value_K)
        inside.append(found.noise_interval[0] < 0.05 < found.noise_interval[1])
        miss_G = found.slope_weights(x_G) @ value_K + 1.75 * np.exp(-0.35 * x_G)
        covered.append(np.abs(miss_G) < 1.96 * found.slope_error(x_G))
        variances.append(found.noise_variance)
    assert abs(np.mean(inside) - 0.95) < 0.04
    assert 0.93 < np.mean(covered) <= 1
    assert_allclose(np.mean(variances), 0.05**2, rtol=0.2)


def test_residuals_of_independent_noise_have_no_correlation_beyond_the_expected():
    rng = np.random.default_rng(2)
    x_K = np.linspace(0, 5, 60)
    found = {}
    for correlation in (0.0, 0.5):
        noise_RK = correlated_noise(rng, (60, 60), correlation)
        found[correlation] = np.mean(
            [
                SmoothingSpline.from_values(x_K, noise_K, 1.0).lag_one_correlation(noise_K)
                for noise_K in noise_RK
            ]
        )
    assert abs(found[0.0]) < 0.05
    assert 0.3 < found[0.5] < 0.6


def test_a_straight_line_is_rejected_as_often_as_the_level_and_a_curve_always():
    rng = np.random.default_rng(3)
    x_K = np.linspace(0, 4, 35)
    straight, curved = (
        [
            SmoothingSpline.from_values(x_K, curve_K + rng.standard_normal(35)).straight_p_value
            for _ in range(200)
        ]
        for curve_K in (3 - 2 * x_K, 20 * np.exp(-x_K))
    )
    assert np.mean(np.array(straight) < 0.05) < 0.09
    assert max(curved) < 0.01


def test_values_without_noise_leave_none():
    x_K = np.linspace(1, 4, 20)
    line = SmoothingSpline.from_values(x_K, 3 - 2 * x_K)
    assert line.noise < 1e-12
    assert_allclose(line.slope_weights([1.5, 3.0]) @ (3 - 2 * x_K), -2)
    assert SmoothingSpline.from_values(x_K, np.zeros(20)).noise < 1e-100


def test_three_points_are_too_few():
    with pytest.raises(UndefinedError, match="3 points are too few"):
        SmoothingSpline.from_values([0, 1, 2, 2], np.ones(4))
