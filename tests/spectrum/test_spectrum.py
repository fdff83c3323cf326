"""Spectra, the measured derivative and the reconstructions, against closed forms and loops.

Shapes: N tokens, K probe steps, G grid points.
"""

import numpy as np
import pytest
from scipy.interpolate import make_smoothing_spline
from scipy.special import expit
from scipy.stats import norm

from megatron_tokscale.core.errors import UndefinedError
from megatron_tokscale.fit import TokenClass, fit_sigmoids
from megatron_tokscale.results.estimate import Estimate
from megatron_tokscale.spectrum import (
    LearningTimeSpectrum,
    SlopeEstimator,
    compare,
    reconstruct,
    slope_noise,
)

X_K = np.concatenate([[-np.inf], np.linspace(0, 8, 80)])
X_G = np.linspace(0, 8, 200)


@pytest.fixture(scope="module")
def fits_and_losses():
    """Falling, rising, two-step, gradual and flat tokens."""
    rng = np.random.default_rng(0)
    n = 150
    c, late = rng.uniform(2, 4, (n, 1)), rng.uniform(5, 7, (n, 1))
    drop = rng.uniform(1, 5, (n, 1))
    kinds = [
        1 + drop * expit((c - X_K) / 0.3),
        1 - drop * expit((late - X_K) / 0.3) + drop,
        1 + drop * (expit((c - X_K) / 0.2) + 0.7 * expit((late - X_K) / 0.2)),
        9 - drop / 4 * np.maximum(np.maximum(X_K, 0) - 3, 0),
        np.full((n, len(X_K)), 3.0),
    ]
    loss_NK = np.concatenate(kinds) + 0.1 * rng.standard_normal((5 * n, len(X_K)))
    loss_NK[0, 3] = np.nan
    return fit_sigmoids(X_K, loss_NK), loss_NK


def measured_slope(x_K, loss_K, x_G):
    estimator = SlopeEstimator.from_curve(x_K, loss_K)
    return estimator.slopes(loss_K[None], x_G)[0], estimator.error(x_G)


def test_derivative_of_a_smooth_curve_without_noise_is_its_slope_at_uneven_probes():
    rng = np.random.default_rng(1)
    x_K = np.concatenate([[-np.inf], np.sort(rng.uniform(0, 8, 60))])
    loss_K = np.concatenate([[50.0], -np.sin(0.6 * x_K[1:])])
    derivative_G, error_G = measured_slope(x_K, loss_K, X_G[20:-20])
    np.testing.assert_allclose(derivative_G, 0.6 * np.cos(0.6 * X_G[20:-20]), atol=3e-3)
    assert (error_G < 0.15).all()


def test_the_estimator_is_the_smoothing_spline_of_scipy_over_the_probes_of_the_range():
    rng = np.random.default_rng(2)
    x_K = np.concatenate([[-np.inf], np.sort(rng.uniform(0, 8, 60))])
    loss_K = rng.standard_normal(61)
    found = SlopeEstimator.from_curve(x_K, loss_K, from_x=2, to_x=7)
    used = (x_K >= 2) & (x_K <= 7)
    np.testing.assert_array_equal(found.used_K, used)
    weights_GK = found.weights(X_G[60:160])
    assert not weights_GK[:, ~used].any()
    other_K = rng.standard_normal(61)
    expected = make_smoothing_spline(x_K[used], other_K[used], lam=found.spline.smoothing)
    slope_G = -expected.derivative()(X_G[60:160])
    np.testing.assert_allclose(weights_GK @ other_K, slope_G, atol=1e-6)
    np.testing.assert_allclose(found.slopes(other_K[None], X_G[60:160])[0], slope_G, atol=1e-6)


def test_evenly_spaced_checkpoints_make_no_slope_of_their_noise():
    """A replay of 35 checkpoints: at the end they are 0.03 apart in ln t, with noise of 0.1."""
    rng = np.random.default_rng(3)
    x_K = np.log(2385 * np.arange(1, 36))
    x_G = np.linspace(x_K[0], x_K[-1], 100)
    truth_G = 1.4 * np.exp(-0.7 * (x_G - x_K[0]))
    worst = []
    for _ in range(50):
        loss_K = 2 * np.exp(-0.7 * (x_K - x_K[0])) + 0.1 * rng.standard_normal(35)
        slope_G, error_G = measured_slope(x_K, loss_K, x_G)
        worst.append(np.abs(slope_G - truth_G).max())
        assert np.mean(np.abs(slope_G - truth_G) < 1.96 * error_G) > 0.5
    assert np.median(worst) < 0.4  # differences of neighbours at the end have errors of 5


def test_the_standard_error_of_the_slope_covers_the_truth():
    rng = np.random.default_rng(3)
    truth_G = 0.6 * np.cos(X_G[20:-20] * 0.6)
    inside = []
    for _ in range(50):
        loss_K = -np.sin(0.6 * X_K[1:]) + 0.05 * rng.standard_normal(80)
        derivative_G, error_G = measured_slope(X_K[1:], loss_K, X_G[20:-20])
        inside.append(np.abs(derivative_G - truth_G) < 1.96 * error_G)
    assert np.mean(inside) > 0.93


def test_noise_of_the_tokens_and_noise_that_they_share_are_told_apart():
    """Resamples of the documents know the tokens' own noise, and not the noise of the probe."""
    rng = np.random.default_rng(4)
    clean_K = 3 * expit((4 - X_K[1:]) / 0.8)
    own_UK = 0.4 * rng.standard_normal((100, 80))  # of 100 documents
    shared_K = 0.1 * rng.standard_normal(80)
    weight_RU = np.concatenate([np.ones((1, 100)), rng.poisson(1.0, (200, 100))])
    mean_RK = weight_RU @ own_UK / weight_RU.sum(axis=1, keepdims=True)
    loss_RK = clean_K + shared_K + mean_RK
    estimator = SlopeEstimator.from_curve(X_K[1:], loss_RK[0])
    noise = slope_noise(estimator, loss_RK, X_G)
    np.testing.assert_allclose(noise.own, 0.04, rtol=0.1)
    assert noise.shared.low < 0.1 < noise.shared.high
    assert noise.noise.low < np.hypot(0.1, 0.04) < noise.noise.high
    assert noise.probes == 80
    assert abs(noise.lag_one_correlation) < 0.25
    alone = slope_noise(estimator, loss_RK[:1], X_G)
    assert np.isnan(alone.own)
    assert alone.shared.value == alone.noise.value


@pytest.mark.parametrize(("size", "least"), [(0.02, 0.98), (0.2, 0.7)])
def test_a_perfect_model_reaches_the_ceiling_on_average(size, least):
    rng = np.random.default_rng(5)
    x_K = np.linspace(0, 6, 50)
    clean_K = 2 * expit((3 - x_K) / 0.5)
    reached, ceilings = [], []
    for _ in range(100):
        loss_1K = (clean_K + size * rng.standard_normal(50))[None]
        found = compare(x_K, {"full": clean_K[None]}, loss_1K)
        reached.append(found.by_name["full"].r2)
        ceilings.append(found.noise.ceiling.value)
    error = np.std(reached) / 10
    assert np.mean(ceilings) > least
    assert abs(np.mean(reached) - np.mean(ceilings)) < 3 * error + 0.1 * (1 - np.mean(ceilings))


def test_no_r2_is_given_where_the_slope_is_noise():
    rng = np.random.default_rng(6)
    x_K = np.log(2385 * np.arange(1, 36))
    loss_1K = (3 - 0.3 * x_K + 2 * rng.standard_normal(35))[None]
    found = compare(x_K, {"full": loss_1K}, loss_1K).scores()["full"]
    assert "cannot be measured" in found.r2.undefined
    assert found.ceiling.value < 0.5


def test_a_straight_line_with_noise_seldom_has_an_r2():
    """Noise alone often looks like a slope that varies, with a ceiling above one half."""
    rng = np.random.default_rng(8)
    x_K = np.log(np.linspace(40, 640, 35))
    given = 0
    for _ in range(100):
        loss_1K = (3 - 0.3 * x_K + 0.2 * rng.standard_normal(35))[None]
        scores = compare(x_K, {"full": loss_1K}, loss_1K).scores()
        given += isinstance(scores["full"].r2, Estimate)
    assert given <= 10  # 5 are expected


def test_the_error_of_the_loss_is_free_of_the_constant_where_it_is_not_known():
    rng = np.random.default_rng(7)
    x_K = np.linspace(0, 6, 50)
    loss_1K = (2 * expit((3 - x_K) / 0.5) + 0.02 * rng.standard_normal(50))[None]
    wave_K = 0.1 * np.cos(np.arange(50))
    curves = {"full": loss_1K + 1 + wave_K, "kernel": loss_1K + 1 + wave_K}
    scores = compare(x_K, curves, loss_1K).scores()
    level = np.sqrt(np.mean((1 + wave_K) ** 2))
    np.testing.assert_allclose(scores["full"].loss_error.value, level)
    np.testing.assert_allclose(scores["kernel"].loss_error.value, wave_K.std())


def test_too_few_probes_for_a_derivative_are_refused():
    with pytest.raises(UndefinedError, match="at least 4 probes"):
        SlopeEstimator.from_curve(np.arange(3.0), np.ones(3))
    with pytest.raises(UndefinedError, match="at least 4 probes"):
        SlopeEstimator.from_curve(X_K, np.ones(81), from_x=7.8)


def test_spectrum_is_the_brute_force_sum_of_kernels(fits_and_losses):
    fits, _ = fits_and_losses
    spectrum = LearningTimeSpectrum.from_fits(fits, x_G=X_G)
    events = []
    for n in np.flatnonzero(fits.n_probes_N == len(X_K)):
        one = (fits.midpoint_N[n], fits.drop_N[n])
        if fits.class_N[n] in (TokenClass.FALLING, TokenClass.GRADUAL):
            events.append(one)
        elif fits.class_N[n] == TokenClass.TWO_STEP:
            steps = [
                (fits.step1_midpoint_N[n], fits.step1_drop_N[n]),
                (fits.step2_midpoint_N[n], fits.step2_drop_N[n]),
            ]
            events.append(max(steps, key=lambda step: step[1]))
    events = [(c, a) for c, a in events if a > 0 and 0 <= c <= 8]
    assert fits.is_class(TokenClass.GRADUAL).any()
    assert fits.is_class(TokenClass.TWO_STEP).any()
    assert spectrum.n_events == len(events)
    assert spectrum.n_tokens == len(fits) - 1
    kernels = [norm.pdf(X_G, c, spectrum.bandwidth) for c, _ in events]
    np.testing.assert_allclose(spectrum.density_G, np.mean(kernels, axis=0), atol=2e-3)
    weighted = sum(a * kernel for (_, a), kernel in zip(events, kernels, strict=True))
    np.testing.assert_allclose(
        spectrum.drop_weighted_G, weighted / spectrum.n_tokens, rtol=2e-3, atol=2e-3
    )


def test_kernel_reconstruction_is_exact_where_all_widths_are_one():
    rng = np.random.default_rng(4)
    c, drop = rng.normal(4, 0.7, (2000, 1)), rng.uniform(1, 5, (2000, 1))
    loss_NK = drop * expit((c - X_K) / 0.3) + 0.02 * rng.standard_normal((2000, len(X_K)))
    by_name = reconstruct(fit_sigmoids(X_K, loss_NK), loss_NK.mean(axis=0)).by_name
    assert by_name["full"].r2 > 0.9995
    assert by_name["kernel"].r2 > 0.999
    assert by_name["spectrum"].r2 > 0.97


def test_learning_times_alone_do_not_reconstruct_unequal_drops():
    rng = np.random.default_rng(5)
    early, late = rng.normal(3, 0.3, (1500, 1)), rng.normal(6, 0.3, (500, 1))
    c = np.concatenate([early, late])
    drop = np.concatenate([np.full((1500, 1), 0.5), np.full((500, 1), 6.0)])
    loss_NK = drop * expit((c - X_K) / 0.2) + 0.02 * rng.standard_normal((2000, len(X_K)))
    by_name = reconstruct(fit_sigmoids(X_K, loss_NK), loss_NK.mean(axis=0)).by_name
    assert by_name["kernel"].r2 > 0.99
    assert by_name["spectrum"].r2 < 0.5


def test_reconstruction_scores_are_those_of_their_definition(fits_and_losses):
    fits, loss_NK = fits_and_losses
    comparison = reconstruct(fits, np.nanmean(loss_NK, axis=0), x_G=X_G)
    for each in comparison.by_name.values():
        miss_G = comparison.measured_G - each.derivative_G
        np.testing.assert_allclose(
            1
            - miss_G.var() / comparison.measured_G.var()
            - miss_G.mean() ** 2 / comparison.measured_G.var(),
            each.r2,
            atol=1e-12,
        )


def test_a_run_with_nothing_learned_reconstructs_nothing():
    loss_NK = 5 + 0.1 * np.random.default_rng(6).standard_normal((200, len(X_K)))
    fits = fit_sigmoids(X_K, loss_NK)
    spectrum = LearningTimeSpectrum.from_fits(fits)
    assert spectrum.n_events <= 2
    assert np.isfinite(spectrum.density_G).all()
    assert reconstruct(fits, loss_NK.mean(axis=0)).by_name["full"].r2 < 0.5
