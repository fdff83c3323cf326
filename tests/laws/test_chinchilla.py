"""Planted laws, brute force and scipy, against `fit_chinchilla`. I runs, P parameters."""

import numpy as np
import pytest
from scipy.optimize import check_grad, minimize

from megatron_tokscale.core.errors import TokscaleError, UndefinedError
from megatron_tokscale.laws.chinchilla import Runs, fit_chinchilla, forecast_chinchilla
from megatron_tokscale.results.laws import RunLoss

TRUTH = {"floor": 1.8, "A": 480.0, "B": 2000.0, "alpha": 0.35, "beta": 0.37}
N_I, D_I = (
    grid.ravel() for grid in np.meshgrid(np.geomspace(1e8, 1e10, 6), np.geomspace(2e9, 3e11, 5))
)


def law(n, d, floor=1.8, A=480.0, B=2000.0, alpha=0.35, beta=0.37):
    return floor + A * n**-alpha + B * d**-beta


def noisy(seed, noise=0.003):
    return law(N_I, D_I) * np.exp(noise * np.random.default_rng(seed).standard_normal(len(N_I)))


@pytest.mark.parametrize("floor", [0.0, 1.8])
@pytest.mark.parametrize(("alpha", "beta"), [(0.35, 0.37), (0.1, 0.6), (1.1, 0.3)])
def test_a_law_without_noise_is_found_exactly(floor, alpha, beta):
    A, B = 0.6 * 1e9**alpha, 0.4 * 2e10**beta
    loss = law(N_I, D_I, floor, A, B, alpha, beta)
    fit = fit_chinchilla(N_I, D_I, loss, n_resamples=2)
    assert fit.converged
    assert (fit.alpha.value, fit.beta.value) == pytest.approx((alpha, beta), rel=0.01)
    assert fit.floor.value == pytest.approx(floor, abs=0.02)
    assert fit.a.value == pytest.approx(beta / (alpha + beta), rel=0.01)
    assert fit.predict(N_I, D_I) == pytest.approx(loss, rel=1e-4)


@pytest.mark.slow
def test_intervals_cover_a_planted_law():
    n_repeats = 20
    covered = np.zeros(len(TRUTH) + 1)
    for seed in range(n_repeats):
        fit = fit_chinchilla(N_I, D_I, noisy(seed), n_resamples=25)
        truth = {**TRUTH, "a": TRUTH["beta"] / (TRUTH["alpha"] + TRUTH["beta"])}
        found = [getattr(fit, name) for name in truth]
        covered += [
            each.low <= value <= each.high
            for each, value in zip(found, truth.values(), strict=True)
        ]
    # Two standard deviations of 95% in 20 repeats are 10%; quantiles of 25 resamples lose 5% more.
    assert (covered >= 0.8 * n_repeats).all()


def test_the_gradient_is_that_of_the_objective():
    runs = Runs(np.log(N_I), np.log(D_I), noisy(1))
    weight_I = np.arange(len(N_I)) % 3.0
    for point_P in ([0.7, -1.0, -2.0, 0.3, 0.5], [0.0, 0.5, 0.1, 1.5, 0.05]):
        error = check_grad(
            lambda p: runs.objective(p, weight_I)[0],
            lambda p: runs.objective(p, weight_I)[1],
            np.array(point_P),
        )
        assert error < 1e-5 * np.linalg.norm(runs.objective(np.array(point_P), weight_I)[1])


def test_no_other_minimum_has_a_lower_huber_loss():
    """Search with Nelder-Mead in Chinchilla's parameters, from starts around the planted law."""
    loss = noisy(2)

    def huber(p):
        a, b, e, alpha, beta = p
        terms = [a - alpha * np.log(N_I), b - beta * np.log(D_I), np.full(len(N_I), e)]
        r = np.abs(np.logaddexp.reduce(terms) - np.log(loss))
        return np.where(r <= 1e-3, r**2 / 2, 1e-3 * (r - 0.5e-3)).sum()

    fit = fit_chinchilla(N_I, D_I, loss, n_resamples=2)
    found = [np.log([fit.A.value, fit.B.value, fit.floor.value]), [fit.alpha.value, fit.beta.value]]
    ours = huber(np.concatenate(found))
    about = np.array([np.log(480), np.log(2000), np.log(1.8), 0.35, 0.37])
    starts = about * np.random.default_rng(0).uniform(0.9, 1.1, (5, 5))
    others = [
        minimize(huber, start, method="Nelder-Mead", options={"maxiter": 4000, "maxfev": 8000}).fun
        for start in starts
    ]
    assert ours <= min(others) * (1 + 1e-4)


def test_the_units_of_parameters_and_tokens_do_not_matter():
    fit = fit_chinchilla(N_I, D_I, noisy(3), n_resamples=2)
    billions = fit_chinchilla(N_I / 1e9, D_I / 1e9, noisy(3), n_resamples=2)
    assert (billions.alpha.value, billions.beta.value) == pytest.approx(
        (fit.alpha.value, fit.beta.value), rel=1e-6
    )
    ratio = billions.A.value / fit.A.value
    assert ratio == pytest.approx(1e9**-fit.alpha.value, rel=1e-5)


def test_the_same_seed_gives_the_same_intervals():
    fits = [fit_chinchilla(N_I, D_I, noisy(4), n_resamples=5, seed=1) for _ in range(2)]
    assert fits[0] == fits[1]


LOSS_I = law(N_I, D_I)


@pytest.mark.parametrize(
    ("n", "d", "loss", "message"),
    [
        (
            N_I[:5],
            D_I[:5],
            LOSS_I[:5],
            "5 runs are too few for the five constants of Chinchilla's law; expected 6",
        ),
        (np.full(30, 1e9), D_I, LOSS_I, "different numbers of parameters"),
        (N_I, np.full(30, 1e9), LOSS_I, "different numbers of tokens"),
        (N_I, 20 * N_I, LOSS_I, "vary only together"),
        (N_I, D_I, LOSS_I - 3, "loss of run .* is -"),
        (N_I, np.where(D_I < 3e9, np.nan, D_I), LOSS_I, "tokens of run 0 is nan"),
        (N_I, D_I, LOSS_I[1:], "expected one number of each per run"),
        (N_I, D_I, np.full(30, 2.0), "the same loss"),
    ],
)
def test_runs_that_determine_no_law_are_refused(n, d, loss, message):
    with pytest.raises((TokscaleError, UndefinedError), match=message):
        fit_chinchilla(n, d, loss)


def test_a_forecast_says_how_many_smaller_models_it_lacks():
    rows = [RunLoss(f"r{i}", None, 10**9, None, 10 ** (9 + i), 3.0 - i / 10) for i in range(3)]
    with pytest.raises(UndefinedError, match=r"^0 runs of models smaller than the largest are too"):
        forecast_chinchilla(rows)
