"""Locality: it holds for local transitions, and not for tokens that follow a mean curve.

Shapes: N tokens, K probe steps, U units.
"""

from dataclasses import replace

import numpy as np
import planted_worlds
import pytest
from correlated import correlated_noise
from scipy.special import expit

from megatron_tokscale.fit import TokenClass
from megatron_tokscale.results.verdict import Verdict
from megatron_tokscale.spectrum import Units, Widths
from megatron_tokscale.spectrum.evidence.locality import CommonNoise, width_edges
from megatron_tokscale.spectrum.evidence.token_groups import groups_by_frequency

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
    group_N = np.zeros(len(loss_NK), int)
    widths = Widths.from_losses(X_K, loss_NK, group_N, units.unit_N, seed=0)
    return widths, units.weights(100, seed=0)


def test_local_transitions_are_narrower_than_under_the_null_model():
    widths, weight_RU = widths_of(local())
    result = widths.result(weight_RU)
    observed, null = result.observed, result.group_null
    assert result.test.verdict is Verdict.HOLDS
    np.testing.assert_allclose(observed.width_x.p50.value, 4.394 * 0.15, rtol=0.05)
    np.testing.assert_allclose(
        observed.width_decades.p50.value, observed.width_x.p50.value / np.log(10)
    )
    np.testing.assert_allclose(observed.width_of_range.p50.value, observed.width_x.p50.value / 8)
    assert null.width_x.p25.value > 2 * observed.width_x.p75.value
    assert abs(observed.fall_in_windows.value - 0.8) < 0.04
    ratio = result.test.estimate
    assert ratio.low < ratio.value < ratio.high < 0.5


def test_tokens_that_follow_the_mean_curve_have_the_null_models_widths():
    widths, weight_RU = widths_of(mean_curve())
    result = widths.result(weight_RU)
    assert result.test.verdict is not Verdict.HOLDS
    for quartile in ("p25", "p50", "p75"):
        np.testing.assert_allclose(
            getattr(result.observed.width_x, quartile).value,
            getattr(result.group_null.width_x, quartile).value,
            rtol=0.06,
        )


@pytest.mark.slow
@pytest.mark.parametrize("common", [0.0, 0.05])
@pytest.mark.parametrize(
    ("world", "verdicts"),
    [
        ("B1", {Verdict.HOLDS}),
        ("C", {Verdict.FAILS, Verdict.UNDECIDED}),
        ("D", {Verdict.FAILS, Verdict.UNDECIDED}),
    ],
)
def test_locality_holds_only_where_tokens_fall_in_steps(world, verdicts, common):
    rng = np.random.default_rng(0)
    text, x_K = planted_worlds.text_of(6000, rng), planted_worlds.axis()
    planted = planted_worlds.WORLDS[world]
    loss_NK = planted_worlds.seeds(planted, text, x_K, rng, common=common, runs=1)[0]
    late = x_K >= np.log(38)
    units = Units.from_documents(text.dataset_N, text.document_N, seed=0)
    group_N = groups_by_frequency(text.dataset_N, text.log_share_N).group_N
    widths = Widths.from_losses(x_K[late], loss_NK[:, late], group_N, units.unit_N, seed=0)
    result = widths.result(units.weights(200, seed=0))
    assert result.test.verdict in verdicts
    assert (result.from_x, result.to_x) == (x_K[late][0], x_K[-1])
    if world != "B1":
        assert abs(result.test.estimate.value - 1) < 0.12


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
    assert result.test.verdict is Verdict.UNDECIDED
    assert result.observed.tokens == 40


def test_the_ratio_allows_for_the_null_models_error_and_the_null_model_has_no_intervals():
    """Few documents: the null model's curves, and so its widths, are those of few tokens."""
    widths, weight_RU = widths_of(local(400))
    result = widths.result(weight_RU)
    alone = replace(widths, null_error=0.0).result(weight_RU)
    assert 0 < widths.null_error < 0.2
    lengths = [each.test.estimate.high - each.test.estimate.low for each in (result, alone)]
    assert lengths[0] > lengths[1]
    assert result.test.estimate.uncorrected == alone.test.estimate.uncorrected
    assert not result.group_null.width_x.p50.has_interval
    assert result.observed.width_x.p50.has_interval


def test_the_null_models_error_is_the_spread_over_other_samples():
    """Tokens with one curve: samples of 600 give median widths that differ by this error."""
    errors, medians = [], []
    for seed in range(8):
        rng = np.random.default_rng(seed)
        mean_K = 3 * expit((4 - X_K) / 1.2)
        noise_NK = 0.3 * correlated_noise(rng, (600, len(X_K)), 0.5)
        loss_NK = rng.uniform(0.5, 2, (600, 1)) * mean_K + noise_NK
        widths, weight_RU = widths_of(loss_NK)
        errors.append(widths.null_error)
        medians.append(np.log(widths.null.quartiles(weight_RU[:1])["p50"][0]))
    assert 0.4 < np.sqrt(np.mean(np.square(errors))) / np.std(medians, ddof=1) < 2.5


def test_the_error_by_common_noise_is_the_spread_under_other_noise():
    """The same tokens with twelve other slow noises: their median widths differ by as much."""
    loss_NK, rng = local(1000), np.random.default_rng(3)
    left_BDK = np.cumsum(rng.normal(0, 0.03, (16, 1, len(X_K))), axis=2)
    left_BDK[..., 0] = 0
    group_N = unit_N = np.zeros(len(loss_NK), int)
    medians = []
    for left_DK in left_BDK[4:]:
        sample = Widths.from_losses(X_K, loss_NK + left_DK, group_N, unit_N, seed=0).observed
        medians.append(np.log(sample.quartiles(np.ones((1, 1)))["p50"][0]))
    common = CommonNoise(left_BDK[:4], np.zeros(len(loss_NK), np.int16))
    widths = Widths.from_losses(X_K, loss_NK, group_N, unit_N, seed=0, common=common)
    assert 0.5 < widths.common_error["p50"] / np.std(medians) < 2


def test_common_noise_that_is_left_makes_the_intervals_longer_and_keeps_the_values():
    widths, weight_RU = widths_of(local(400))
    moved = replace(widths, common_error=dict.fromkeys(widths.common_error, 0.05))
    alone, wider = widths.result(weight_RU), moved.result(weight_RU)
    assert set(widths.common_error.values()) == {0.0}
    pairs = [(each.test.estimate, each.observed.width_x.p50) for each in (alone, wider)]
    for before, after in zip(*pairs, strict=True):
        error = np.hypot((before.high - before.low) / 2, 1.96 * 0.05 * before.value)
        np.testing.assert_allclose((after.high - after.low) / 2, error, rtol=0.25)
        assert after.uncorrected == before.uncorrected
