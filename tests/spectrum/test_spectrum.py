"""Spectra, the measured derivative and the reconstructions, against closed forms and loops.

Shapes: N tokens, K probe steps, G grid points.
"""

import numpy as np
import pytest
from scipy.special import expit
from scipy.stats import norm

from megatron_tokscale.core.errors import UndefinedError
from megatron_tokscale.fit import FitStatus, TokenClass, fit_sigmoids
from megatron_tokscale.spectrum import (
    LearningTimeSpectrum,
    derivative_weights,
    measured_derivative,
    reconstruct,
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


def test_derivative_is_exact_for_parabolas_at_uneven_probes():
    rng = np.random.default_rng(1)
    x_K = np.concatenate([[-np.inf], np.sort(rng.uniform(0, 8, 40))])
    finite = np.where(np.isfinite(x_K), x_K, 0)
    derivative_G, error_G = measured_derivative(x_K, 2 - 3 * finite + 0.7 * finite**2, X_G)
    np.testing.assert_allclose(derivative_G, 3 - 1.4 * X_G, atol=1e-6)
    assert (error_G < 1e-6).all()


def test_derivative_is_the_local_quadratic_of_numpy_polyfit():
    rng = np.random.default_rng(2)
    x_K = np.sort(rng.uniform(0, 8, 40))
    loss_K = rng.standard_normal(40)
    weights_GK = derivative_weights(x_K, X_G)
    for g in range(0, 200, 17):
        distance_K = np.abs(x_K - X_G[g])
        reach = max(np.sort(distance_K)[6] * 1.01, np.ptp(x_K) / 20)
        tricube_K = np.clip(1 - (distance_K / reach) ** 3, 0, None) ** 3
        near = tricube_K > 0
        weight_K = np.sqrt(tricube_K[near])
        parabola = np.polyfit(x_K[near] - X_G[g], loss_K[near], 2, w=weight_K)
        np.testing.assert_allclose(weights_GK[g] @ loss_K, -parabola[1], rtol=1e-5, atol=1e-8)


def test_the_standard_error_of_the_slope_covers_the_truth():
    rng = np.random.default_rng(3)
    truth_G = 0.6 * np.cos(X_G[20:-20] * 0.6)
    inside = []
    for _ in range(200):
        loss_K = -np.sin(0.6 * X_K[1:]) + 0.05 * rng.standard_normal(80)
        derivative_G, error_G = measured_derivative(X_K[1:], loss_K, X_G[20:-20])
        inside.append(np.abs(derivative_G - truth_G) < 1.96 * error_G)
    assert abs(np.mean(inside) - 0.95) < 0.04


def test_too_few_probes_for_a_derivative_are_refused():
    with pytest.raises(UndefinedError, match="at least 4 probes"):
        measured_derivative(np.arange(3.0), np.ones(3), X_G)


def test_spectrum_is_the_brute_force_sum_of_kernels(fits_and_losses):
    fits, _ = fits_and_losses
    spectrum = LearningTimeSpectrum.from_fits(fits, x_G=X_G)
    events = []
    for n in np.flatnonzero(fits.n_probes_N == len(X_K)):
        if fits.class_N[n] == TokenClass.FALLING:
            if fits.status_N[n] in (FitStatus.CONVERGED, FitStatus.TOO_FEW_POINTS):
                events.append((fits.midpoint_N[n], fits.drop_N[n]))
        elif fits.class_N[n] == TokenClass.TWO_STEP:
            events.append((fits.step1_midpoint_N[n], fits.step1_drop_N[n]))
            events.append((fits.step2_midpoint_N[n], fits.step2_drop_N[n]))
    events = [(c, a) for c, a in events if a > 0 and 0 <= c <= 8]
    assert fits.is_class(TokenClass.GRADUAL).any()
    assert fits.is_class(TokenClass.TWO_STEP).any()
    assert spectrum.n_events == len(events)
    assert spectrum.n_tokens == len(fits) - 1
    kernels = [norm.pdf(X_G, c, spectrum.bandwidth) for c, _ in events]
    np.testing.assert_allclose(spectrum.density_G, np.mean(kernels, axis=0), atol=2e-3)
    weighted = sum(a * kernel for (_, a), kernel in zip(events, kernels, strict=True))
    np.testing.assert_allclose(spectrum.drop_weighted_G, weighted / spectrum.n_tokens, atol=2e-3)


def test_kernel_reconstruction_is_exact_where_all_widths_are_one():
    rng = np.random.default_rng(4)
    c, drop = rng.normal(4, 0.7, (2000, 1)), rng.uniform(1, 5, (2000, 1))
    loss_NK = drop * expit((c - X_K) / 0.3) + 0.02 * rng.standard_normal((2000, len(X_K)))
    by_name = reconstruct(fit_sigmoids(X_K, loss_NK), loss_NK.mean(axis=0)).by_name
    assert by_name["full"].r2 > 0.9999
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
