"""Planted laws, closed forms and scipy's curve_fit, against `fit_power_law`. K probe steps."""

import numpy as np
import pytest
from correlated import correlated_noise
from scipy.optimize import curve_fit, minimize

from megatron_tokscale.core.errors import TokscaleError, UndefinedError
from megatron_tokscale.laws import fit_power_law
from megatron_tokscale.laws.power_law.power_law import power_law_falls

T_K = np.geomspace(200, 20_000, 30)


def law(t, floor=2.0, scale=8.0, exponent=0.3):
    return floor + scale * t**-exponent


@pytest.mark.parametrize("floor", [0.0, 0.5, 3.2])
@pytest.mark.parametrize("exponent", [0.07, 0.33, 1.4])
def test_a_law_without_noise_is_found_exactly(floor, exponent):
    t = np.geomspace(10, 1e6, 40)
    fit = fit_power_law(t, law(t, floor, 6.0, exponent), from_=0, n_resamples=10)
    assert fit.converged
    assert fit.n_points == 40
    assert fit.floor.value == pytest.approx(floor, abs=1e-3)
    assert fit.scale.value == pytest.approx(6.0, rel=1e-3)
    assert fit.exponent.value == pytest.approx(exponent, rel=1e-3)
    assert fit.r2 == pytest.approx(1.0, abs=1e-8)
    assert fit.predict(t) == pytest.approx(law(t, floor, 6.0, exponent), rel=1e-5)


@pytest.mark.parametrize("correlation", [0.0, 0.4])
@pytest.mark.slow
def test_intervals_cover_a_planted_law_under_white_and_correlated_noise(correlation):
    rng = np.random.default_rng(7)
    n_runs = 60
    covered = np.zeros(3)
    for _ in range(n_runs):
        noise = 0.003 * correlated_noise(rng, len(T_K), correlation)
        fit = fit_power_law(T_K, law(T_K) * np.exp(noise), from_=0, n_resamples=40)
        found = (fit.floor, fit.scale, fit.exponent)
        intervals = np.array([(each.low, each.high) for each in found])
        truth = [2.0, 8.0, 0.3]
        covered += (intervals[:, 0] <= truth) & (truth <= intervals[:, 1])
    # Two standard deviations of 95% in 60 runs are 6%; quantiles of 40 resamples lose 3% more.
    assert (covered >= 0.86 * n_runs).all()


def test_the_fit_agrees_with_scipys_curve_fit_on_log_losses():
    """Compare with the least squares of Liu et al. (docs/references.md 3.2), within the noise."""
    rng = np.random.default_rng(1)
    loss = law(T_K) * np.exp(0.002 * rng.standard_normal(len(T_K)))
    (floor, scale, exponent), covariance = curve_fit(
        lambda t, *parameters: np.log(law(t, *parameters)),
        T_K,
        np.log(loss),
        p0=[loss[-1] / 2, 1, 0.33],
        bounds=([0, 0, 0], [loss[-1], np.inf, np.inf]),
        maxfev=100_000,
    )
    error = np.sqrt(np.diag(covariance))
    fit = fit_power_law(T_K, loss, from_=0)
    assert abs(fit.floor.value - floor) < 1.5 * error[0]
    assert abs(fit.scale.value - scale) < 1.5 * error[1]
    assert abs(fit.exponent.value - exponent) < 1.5 * error[2]
    # Least absolute deviations have pi / 2 times the variance of least squares.
    assert 0.7 * error[2] < fit.exponent_se < 2.5 * error[2]


def test_no_other_minimum_has_a_lower_huber_loss():
    """Search with Nelder-Mead from random starts, in Chinchilla's parameters."""
    rng = np.random.default_rng(2)
    loss = law(T_K) * np.exp(0.005 * rng.standard_normal(len(T_K)))

    def huber(parameters):
        log_floor, log_scale, exponent = parameters
        r = np.abs(np.logaddexp(log_floor, log_scale - exponent * np.log(T_K)) - np.log(loss))
        return np.where(r <= 1e-3, r**2 / 2, 1e-3 * (r - 0.5e-3)).sum()

    fit = fit_power_law(T_K, loss, from_=0, n_resamples=2)
    ours = huber([np.log(fit.floor.value), np.log(fit.scale.value), fit.exponent.value])
    others = [
        minimize(huber, start, method="Nelder-Mead", options={"maxiter": 3000, "xatol": 1e-9}).fun
        for start in rng.uniform([-1, 0, 0.1], [1, 4, 1], (8, 3))
    ]
    assert ours <= min(others) * (1 + 1e-4)


def test_an_outlier_hardly_moves_the_law():
    loss = law(T_K)
    loss[12] *= 1.5
    assert fit_power_law(T_K, loss, from_=0, n_resamples=2).exponent.value == pytest.approx(
        0.3, abs=5e-3
    )


def test_the_exponent_does_not_depend_on_the_unit_of_time():
    loss = law(T_K) * np.exp(0.005 * np.random.default_rng(3).standard_normal(len(T_K)))
    steps = fit_power_law(T_K, loss)
    tokens = fit_power_law(T_K * 4_194_304, loss)
    assert tokens.exponent.value == pytest.approx(steps.exponent.value, rel=1e-4)
    for end in ("low", "high"):
        interval_end = getattr(steps.exponent, end)
        assert getattr(tokens.exponent, end) == pytest.approx(interval_end, rel=1e-2)
    assert tokens.floor.value == pytest.approx(steps.floor.value, rel=1e-4)
    assert tokens.scale.value == pytest.approx(
        steps.scale.value * 4_194_304**steps.exponent.value, rel=1e-2
    )


def test_correlated_residuals_widen_the_intervals():
    """The factor is sqrt((1 + 0.7) / (1 - 0.7)) = 2.4 for many probes; it is smaller for these."""
    rng = np.random.default_rng(4)
    error = {0.0: 0.0, 0.7: 0.0}
    for correlation in [0.0, 0.7] * 8:
        noise = 0.003 * correlated_noise(rng, len(T_K), correlation)
        fit = fit_power_law(T_K, law(T_K) * np.exp(noise), from_=0, n_resamples=30)
        error[correlation] += fit.exponent_se
    assert error[0.7] > 1.4 * error[0.0]


def test_step_zero_and_the_first_tenth_are_left_out():
    t = np.concatenate([[0], np.geomspace(1, 1000, 61)])
    loss = np.where(t < 100, 11.0, law(np.maximum(t, 1)))
    fit = fit_power_law(t, loss, n_resamples=2)
    assert (fit.from_time, fit.to_time, fit.n_points) == (pytest.approx(100), 1000, 21)
    assert fit.exponent.value == pytest.approx(0.3, abs=1e-3)
    assert fit_power_law(t, law(np.maximum(t, 0.5)), from_=0, n_resamples=2).n_points == 61


def test_the_same_seed_gives_the_same_intervals():
    loss = law(T_K) * np.exp(0.005 * np.random.default_rng(5).standard_normal(len(T_K)))
    assert fit_power_law(T_K, loss, n_resamples=5) == fit_power_law(T_K, loss, n_resamples=5)


@pytest.mark.parametrize(
    ("t", "loss", "message"),
    [
        (T_K[:5], law(T_K[:5]), "5 probes from time .* are too few"),
        (T_K, np.where(T_K < 300, np.nan, 3.0), "the loss at time 200 is nan"),
        (T_K, law(T_K) - 4, "finite, positive losses"),
        (T_K, law(T_K)[::-1], "the loss does not fall from time"),
        (T_K, np.full(30, 2.5), "the loss does not fall from time"),
        (T_K[::-1], law(T_K), "do not ascend"),
        (T_K, law(T_K)[:-1], "are not a loss curve"),
        ([], [], "are not a loss curve"),
    ],
)
def test_curves_without_a_falling_loss_are_refused(t, loss, message):
    with pytest.raises((TokscaleError, UndefinedError), match=message):
        fit_power_law(t, loss)


def test_the_falls_of_a_law_without_noise_are_exact():
    time_K, later_H = np.geomspace(10, 1000, 40), np.array([2000.0, 10_000.0])
    falls = power_law_falls(time_K, law(time_K), later_H, from_=0, n_resamples=10)
    expected_H = law(1000.0) - law(later_H)
    assert falls[0] == pytest.approx(expected_H, rel=1e-3)
    assert falls.shape == (11, len(later_H))


@pytest.mark.slow
def test_intervals_of_falls_cover_a_planted_law():
    rng = np.random.default_rng(8)
    later_H = T_K[-1] * np.array([2.0, 10.0])
    expected_H, covered_H, n_runs = law(T_K[-1]) - law(later_H), np.zeros(2), 60
    for _ in range(n_runs):
        noise_K = 0.003 * rng.standard_normal(len(T_K))
        _, *falls = power_law_falls(
            T_K, law(T_K) * np.exp(noise_K), later_H, from_=0, n_resamples=40
        )
        low_H, high_H = np.quantile(falls, [0.025, 0.975], axis=0)
        covered_H += (low_H <= expected_H) & (expected_H <= high_H)
    assert (covered_H / n_runs > 0.8).all()
