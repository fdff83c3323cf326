"""The locality test: it passes on local transitions and fails on mean-curve tokens.

Shapes: N tokens, K probe steps, U units.
"""

import numpy as np
import pytest
from correlated import correlated_noise
from scipy.special import expit

from megatron_tokscale.fit import TokenClass, fit_sigmoids
from megatron_tokscale.spectrum import Units, Widths, mean_curve_losses
from megatron_tokscale.spectrum.evidence.locality import width_edges

X_K = np.concatenate([[-np.inf], np.linspace(0, 8, 60)])


def local(n_tokens=1500, seed=0):
    rng = np.random.default_rng(seed)
    c, drop = rng.normal(4, 0.9, (n_tokens, 1)), rng.uniform(1, 5, (n_tokens, 1))
    return drop * expit((c - X_K) / 0.15) + 0.1 * rng.standard_normal((n_tokens, len(X_K)))


def mean_curve(n_tokens=1500):
    """Tokens that follow the mean of those above, with a level and an amplitude of their own."""
    rng = np.random.default_rng(1)
    mean_K = local().mean(axis=0)
    noise_NK = 0.1 * correlated_noise(rng, (n_tokens, len(X_K)), 0.6)
    return rng.uniform(0.5, 2, (n_tokens, 1)) * mean_K + noise_NK


def widths_of(loss_NK):
    """The widths of documents of ten tokens, and the weights of their resamples."""
    units = Units.from_documents(np.zeros(len(loss_NK)), np.arange(len(loss_NK)) // 10, seed=0)
    widths = Widths.from_fits(fit_sigmoids(X_K, loss_NK), loss_NK, units.unit_N, seed=0)
    return widths, units.weights(100, seed=0)


def test_local_transitions_are_narrower_than_under_the_null_model():
    widths, weight_RU = widths_of(local())
    result = widths.result(weight_RU)
    observed, null = result.observed, result.mean_curve_null
    assert result.local is True
    np.testing.assert_allclose(observed.width_x.p50.value, 4.394 * 0.15, rtol=0.05)
    np.testing.assert_allclose(
        observed.width_decades.p50.value, observed.width_x.p50.value / np.log(10)
    )
    np.testing.assert_allclose(observed.width_of_range.p50.value, observed.width_x.p50.value / 8)
    assert null.width_x.p25.value > 2 * observed.width_x.p75.value
    assert abs(observed.fall_in_windows.value - 0.8) < 0.04
    ratio = result.median_over_null
    assert ratio.low < ratio.value < ratio.high < 0.5


def test_tokens_that_follow_the_mean_curve_have_the_null_models_widths():
    widths, weight_RU = widths_of(mean_curve())
    result = widths.result(weight_RU)
    assert result.local is False
    for quartile in ("p25", "p50", "p75"):
        np.testing.assert_allclose(
            getattr(result.observed.width_x, quartile).value,
            getattr(result.mean_curve_null.width_x, quartile).value,
            rtol=0.06,
        )


def test_null_tokens_have_their_own_level_amplitude_and_noise():
    loss_NK = local(400)
    fits = fit_sigmoids(X_K, loss_NK)
    null_NK = mean_curve_losses(fits, loss_NK, seed=0).astype(float)
    mean_K = loss_NK.mean(axis=0)
    for n in range(0, 400, 50):
        b, a = np.polyfit(mean_K, loss_NK[n], 1)
        residual_K = null_NK[n] - (a + b * mean_K)
        sigma = np.sqrt(fits.sse_N[n] / (len(X_K) - 4))
        assert abs(residual_K.mean()) < 5 * sigma / np.sqrt(len(X_K))
        assert 0.6 < residual_K.std() / sigma < 1.4


def test_null_noise_is_as_autocorrelated_as_the_tokens_own():
    loss_NK = mean_curve(2000)
    fits = fit_sigmoids(X_K, loss_NK)
    null_NK = mean_curve_losses(fits, loss_NK, seed=0).astype(float)
    mean_K = loss_NK.mean(axis=0) - loss_NK.mean()
    along_N = loss_NK @ mean_K / (mean_K @ mean_K)
    noise_NK = null_NK - loss_NK.mean(axis=1, keepdims=True) - along_N[:, None] * mean_K
    correlation = (noise_NK[:, 1:] * noise_NK[:, :-1]).mean() / (noise_NK**2).mean()
    assert abs(correlation - 0.6) < 0.06


def test_fall_in_windows_is_the_interpolated_loop():
    loss_NK = local(200)
    widths, weight_RU = widths_of(loss_NK)
    fits, x, inside = widths.observed.fits, X_K[1:], 0.0
    for n in np.flatnonzero((fits.class_N == TokenClass.FALLING) & np.isin(fits.status_N, (0, 2))):
        half = np.log(9) * fits.width_N[n]
        ends = fits.midpoint_N[n] - half, fits.midpoint_N[n] + half
        inside -= np.diff(np.interp(ends, x, loss_NK[n, 1:]))[0]
    expected = inside / (loss_NK[:, 1] - loss_NK[:, -1]).sum()
    np.testing.assert_allclose(widths.observed.fall_in_windows(weight_RU)[0], expected)


@pytest.mark.parametrize("r", [0, 1, 2])
def test_quartiles_are_those_of_widths_repeated_by_their_drop_and_weight(r):
    widths, weight_RU = widths_of(local(60))
    observed = widths.observed
    unit_N = observed.unit_N[observed.counted_N]
    times_N = np.round(1000 * observed.drop_N).astype(int) * weight_RU[r, unit_N].astype(int)
    repeated = np.repeat(observed.width_N, times_N)
    for name, share in {"p25": 0.25, "p50": 0.5, "p75": 0.75}.items():
        expected = np.quantile(repeated, share, method="inverted_cdf")
        assert observed.quartiles(weight_RU)[name][r] == expected


def test_histograms_sum_to_the_drop_of_the_counted_tokens():
    widths, _ = widths_of(local(200))
    histograms = widths.histograms()
    np.testing.assert_allclose(histograms.edges_W, width_edges(X_K))
    for share_W in (histograms.observed_W, histograms.null_W):
        np.testing.assert_allclose(share_W.sum(), 1.0)


def test_a_run_in_which_nothing_falls_has_no_verdict():
    widths, weight_RU = widths_of(5 + 0.1 * np.random.default_rng(3).standard_normal((40, 61)))
    result = widths.result(weight_RU)
    assert result.local in (None, False)
    assert result.observed.tokens == 40
