"""The locality test: it passes on local transitions and fails on mean-curve tokens.

Shapes: N tokens, K probe steps.
"""

import numpy as np
from scipy.special import expit

from megatron_tokscale.fit import TokenClass, fit_sigmoids
from megatron_tokscale.spectrum import mean_curve_losses, transition_widths
from megatron_tokscale.spectrum.density import weighted_quantile
from megatron_tokscale.spectrum.widths import mean_curve_fits

X_K = np.concatenate([[-np.inf], np.linspace(0, 8, 60)])


def local(n_tokens=1500, seed=0):
    rng = np.random.default_rng(seed)
    c, drop = rng.normal(4, 0.9, (n_tokens, 1)), rng.uniform(1, 5, (n_tokens, 1))
    return drop * expit((c - X_K) / 0.15) + 0.1 * rng.standard_normal((n_tokens, len(X_K)))


def test_local_transitions_are_narrower_than_their_null():
    loss_NK = local()
    fits = fit_sigmoids(X_K, loss_NK)
    null, null_NK = mean_curve_fits(fits, loss_NK)
    observed, null_widths = transition_widths(fits, loss_NK), transition_widths(null, null_NK)
    np.testing.assert_allclose(observed["width_x"]["p50"], 4.394 * 0.15, rtol=0.05)
    np.testing.assert_allclose(
        observed["width_decades"]["p50"], observed["width_x"]["p50"] / np.log(10)
    )
    assert null_widths["width_x"]["p25"] > 2 * observed["width_x"]["p75"]
    assert abs(observed["fall_in_windows"] - 0.8) < 0.04


def test_mean_curve_tokens_look_like_their_null():
    rng = np.random.default_rng(1)
    mean_K = local().mean(axis=0)
    loss_NK = rng.uniform(0.5, 2, (1500, 1)) * mean_K + 0.1 * rng.standard_normal((1500, 61))
    fits = fit_sigmoids(X_K, loss_NK)
    null, null_NK = mean_curve_fits(fits, loss_NK)
    observed, null_widths = transition_widths(fits, loss_NK), transition_widths(null, null_NK)
    for quartile in ("p25", "p50", "p75"):
        np.testing.assert_allclose(
            observed["width_x"][quartile], null_widths["width_x"][quartile], rtol=0.05
        )


def test_null_tokens_have_their_own_level_amplitude_and_noise():
    loss_NK = local(400)
    fits = fit_sigmoids(X_K, loss_NK)
    null_NK = mean_curve_losses(fits, loss_NK).astype(float)
    mean_K = loss_NK.mean(axis=0)
    for n in range(0, 400, 50):
        b, a = np.polyfit(mean_K, loss_NK[n], 1)
        residual_K = null_NK[n] - (a + b * mean_K)
        sigma = np.sqrt(fits.sse_N[n] / (len(X_K) - 4))
        assert abs(residual_K.mean()) < 5 * sigma / np.sqrt(len(X_K))
        assert 0.6 < residual_K.std() / sigma < 1.4


def test_fall_in_windows_is_the_interpolated_loop():
    loss_NK = local(200)
    fits = fit_sigmoids(X_K, loss_NK)
    x, inside = X_K[1:], 0.0
    for n in np.flatnonzero((fits.class_N == TokenClass.FALLING) & np.isin(fits.status_N, (0, 2))):
        half = np.log(9) * fits.width_N[n]
        ends = fits.midpoint_N[n] - half, fits.midpoint_N[n] + half
        inside -= np.diff(np.interp(ends, x, loss_NK[n, 1:]))[0]
    expected = inside / (loss_NK[:, 1] - loss_NK[:, -1]).sum()
    np.testing.assert_allclose(transition_widths(fits, loss_NK)["fall_in_windows"], expected)


def test_weighted_quantile_is_that_of_repeated_values():
    rng = np.random.default_rng(2)
    value, count = rng.standard_normal(50), rng.integers(1, 9, 50)
    repeated = np.repeat(value, count)
    for share in (0.25, 0.5, 0.75):
        expected = np.quantile(repeated, share, method="inverted_cdf")
        assert weighted_quantile(value, count.astype(float), share) == expected
    assert np.isnan(weighted_quantile(np.array([]), np.array([]), 0.5))
