"""The one-third law of one curve: planted laws and scipy's curve_fit. K probes."""

import numpy as np
import pytest
from power_laws import TAU_K, law, noisy
from scipy.optimize import curve_fit

from megatron_tokscale.core.errors import TokscaleError, UndefinedError
from megatron_tokscale.laws.one_third.one_third import fit_one_third
from megatron_tokscale.results.verdict import Verdict


def test_one_curve_is_fitted_as_liu_et_al_do():
    """Repeat the fit that docs/references.md 3.2 describes."""
    loss = noisy(np.random.default_rng(0), law(TAU_K), correlation=0)
    (c, alpha, floor), covariance = curve_fit(
        lambda t, c, alpha, floor: np.log(c / t**alpha + floor),
        TAU_K[2:],
        np.log(loss[2:]),
        p0=[1, 0.33, loss[-1]],
        bounds=([0, 0, 0], [np.inf, np.inf, loss[-1]]),
        maxfev=100_000,
    )
    fit = fit_one_third(TAU_K, loss, from_=TAU_K[2])
    assert (fit.scale, fit.exponent.value, fit.floor) == pytest.approx((c, alpha, floor), rel=1e-6)
    assert fit.exponent_se == pytest.approx(np.sqrt(covariance[1, 1]), rel=1e-4)
    assert fit.n_points == 28


def test_a_law_without_noise_is_found_exactly():
    fit = fit_one_third(TAU_K, law(TAU_K), from_=0)
    assert (fit.scale, fit.exponent.value, fit.floor) == pytest.approx((12, 1 / 3, 2), rel=1e-4)
    assert (fit.r2, fit.r2_one_third) == pytest.approx((1, 1))
    assert fit.predict(TAU_K) == pytest.approx(law(TAU_K), rel=1e-6)


def test_another_exponent_than_one_third_is_found():
    fit = fit_one_third(TAU_K, law(TAU_K, scale=400, exponent=1.2), from_=0)
    assert fit.exponent.value == pytest.approx(1.2, rel=1e-3)
    assert fit.test.verdict is Verdict.FAILS
    assert fit.r2 > fit.r2_one_third


@pytest.mark.parametrize("correlation", [0.0, 0.6])
def test_the_interval_of_one_curve_covers_one_third(correlation):
    rng = np.random.default_rng(1)
    fits = [
        fit_one_third(TAU_K, noisy(rng, law(TAU_K), 0.002, correlation), from_=0)
        for _ in range(100)
    ]
    assert sum(fit.exponent.low <= 1 / 3 <= fit.exponent.high for fit in fits) >= 85
    assert all(fit.test.verdict is not Verdict.FAILS for fit in fits)


def test_an_interval_that_excludes_nothing_is_undecided():
    """Two noisy octaves of tau tell no exponent: the claim neither holds nor fails."""
    tau = np.geomspace(250, 1000, 8)
    rng = np.random.default_rng(0)
    exponent = fit_one_third(tau, noisy(rng, law(tau), 0.01, 0.0), from_=0)
    assert exponent.exponent.high - exponent.exponent.low > 1
    assert exponent.test.verdict is Verdict.UNDECIDED


def test_a_tenth_of_tau_and_the_first_two_probes_are_left_out():
    tau = np.concatenate([[0], np.geomspace(1, 1000, 31)])
    loss = law(np.maximum(tau, 0.5))
    assert fit_one_third(tau, loss).from_lr_sum == pytest.approx(100)
    late = np.geomspace(300, 1000, 10)
    assert fit_one_third(late, law(late)).from_lr_sum == pytest.approx(late[2])


@pytest.mark.parametrize(
    ("tau", "loss", "message"),
    [
        (TAU_K[:5], law(TAU_K[:5]), "too few"),
        (TAU_K, np.where(TAU_K < 100, np.nan, 3.0), "not finite and positive"),
        (TAU_K, law(TAU_K)[:-1], "one sum per probe"),
        (TAU_K, np.stack([law(TAU_K)] * 2), "one curve"),
        ([], [], "one sum per probe"),
        ([0.0], [3.0], "too few"),
    ],
)
def test_invalid_loss_curves_are_refused(tau, loss, message):
    with pytest.raises((TokscaleError, UndefinedError), match=message):
        fit_one_third(tau, loss)
