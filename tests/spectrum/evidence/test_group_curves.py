"""The null model of group curves: what it keeps of each token, and what it must not keep.

Shapes: N tokens, K probe steps.
"""

import numpy as np
import planted_worlds
import pytest
from correlated import correlated_noise
from scipy.special import expit

from megatron_tokscale.fit import fit_sigmoids
from megatron_tokscale.spectrum import group_curve_losses

X_K = np.linspace(0, 8, 60)
SIZE, CORRELATION = 0.15, 0.5


def smooth_tokens(n_tokens=2500, common=0.0, seed=0):
    """Tokens of two groups with a curve each, levels and amplitudes of their own, and noise."""
    rng = np.random.default_rng(seed)
    group_N = np.arange(n_tokens) % 2
    shape_GK = np.stack([expit((3 - X_K) / 1.2), expit((6 - X_K) / 0.8)])
    level_N, amplitude_N = rng.uniform(1, 3, n_tokens), rng.uniform(1, 3, n_tokens)
    clean_NK = level_N[:, None] + amplitude_N[:, None] * shape_GK[group_N]
    noise_NK = SIZE * correlated_noise(rng, clean_NK.shape, CORRELATION)
    loss_NK = clean_NK + noise_NK + common * rng.standard_normal(len(X_K))
    return loss_NK.astype(np.float32), group_N, clean_NK, amplitude_N


def null_of(loss_NK, group_N):
    return group_curve_losses(fit_sigmoids(X_K, loss_NK), loss_NK, group_N, seed=0).astype(float)


def test_a_token_keeps_its_level_and_amplitude_and_follows_its_group():
    loss_NK, group_N, clean_NK, amplitude_N = smooth_tokens()
    null_NK = null_of(loss_NK, group_N)
    off_N = (null_NK - clean_NK).mean(axis=1)
    assert np.abs(off_N).mean() < 0.1
    for group in (0, 1):
        inside = group_N == group
        mean_K = loss_NK[inside].mean(axis=0, dtype=float)
        np.testing.assert_allclose(null_NK[inside].mean(axis=0), mean_K, atol=0.03)
        # Amplitudes: falls from the first probes to the last.
        fall_N = null_NK[inside, :3].mean(axis=1) - null_NK[inside, -3:].mean(axis=1)
        assert np.corrcoef(fall_N, amplitude_N[inside])[0, 1] > 0.9


@pytest.mark.parametrize("common", [0.0, 0.1])
def test_the_noise_is_as_large_and_as_correlated_as_the_tokens_own(common):
    """Noise that all tokens of a probe share is in the mean curve, and is no token's own."""
    loss_NK, group_N, _, _ = smooth_tokens(common=common)
    null_NK = null_of(loss_NK, group_N)
    noise_NK = np.empty_like(null_NK)
    for group in (0, 1):
        inside = group_N == group
        mean_K = loss_NK[inside].mean(axis=0, dtype=float)
        design_K2 = np.stack([np.ones(len(X_K)), mean_K], axis=1)
        fitted_2N = np.linalg.lstsq(design_K2, null_NK[inside].T, rcond=None)[0]
        noise_NK[inside] = null_NK[inside] - (design_K2 @ fitted_2N).T
    size = np.sqrt((noise_NK**2).sum() / (noise_NK.size - 2 * 3 * len(noise_NK)))
    assert abs(size / SIZE - 1) < 0.06
    correlation = (noise_NK[:, 1:] * noise_NK[:, :-1]).mean() / (noise_NK**2).mean()
    assert abs(correlation - CORRELATION) < 0.08


def test_amplitudes_vary_no_more_than_those_of_the_tokens():
    """All tokens have one amplitude; least squares on their noise would spread it."""
    rng = np.random.default_rng(1)
    loss_NK = 2 + expit((4 - X_K) / 1.2) + 0.6 * correlated_noise(rng, (3000, 60), CORRELATION)
    null_NK = null_of(loss_NK.astype(np.float32), np.zeros(3000, int))
    falls = [each[:, :15].mean(axis=1) - each[:, -15:].mean(axis=1) for each in (loss_NK, null_NK)]
    assert abs(falls[1].std() / falls[0].std() - 1) < 0.06


@pytest.mark.parametrize("world", ["C", "D"])
def test_fits_of_a_world_without_steps_leave_the_null_models_residuals(world):
    rng = np.random.default_rng(0)
    text, x_K = planted_worlds.text_of(4000, rng), planted_worlds.axis()
    loss_NK = planted_worlds.seeds(planted_worlds.WORLDS[world], text, x_K, rng, runs=1)[0]
    late = x_K >= np.log(38)
    x_K, loss_NK = x_K[late], np.ascontiguousarray(loss_NK[:, late])
    fits = fit_sigmoids(x_K, loss_NK)
    null_fits = fit_sigmoids(x_K, group_curve_losses(fits, loss_NK, text.dataset_N, seed=0))
    assert abs(null_fits.sse_N.mean() / fits.sse_N.mean() - 1) < 0.03
    assert abs(null_fits.autocorrelation_N.mean() - fits.autocorrelation_N.mean()) < 0.02


def test_no_tokens_have_no_null_model():
    empty_NK = np.empty((0, 60), np.float32)
    null_NK = group_curve_losses(fit_sigmoids(X_K, empty_NK), empty_NK, np.empty(0, int), seed=0)
    assert null_NK.shape == (0, 60)
