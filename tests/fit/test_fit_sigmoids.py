"""The one-sigmoid fit against scipy, the truth and its own invariances.

Shapes: N tokens, K probe steps.
"""

import subprocess
import sys

import numpy as np
import pytest
import torch
from fit_accuracy import compare_with_scipy, scipy_fit, sse_of
from scipy import stats
from scipy.special import expit

from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.fit import (
    FitStatus,
    SigmoidFits,
    TokenClass,
    fit_sigmoids,
)

FAR = -1e4


@pytest.mark.parametrize(
    ("n_probes", "n_tokens", "most_above"),
    [(24, 6000, 0.002), (60, 2000, 0.001), (200, 500, 0.001)],
)
@pytest.mark.slow
def test_sum_of_squares_is_scipys_or_lower(planted, n_probes, n_tokens, most_above):
    """benchmarks/results/fit_accuracy.md has the same comparison of more tokens.

    It found 0.100% above with 24 probes, so 6,000 tokens have six, give or take two or three.
    """
    data = planted(n_tokens, n_probes, seed=1)
    ratio_N, inside_N = compare_with_scipy(data.x_K, data.loss_NK)
    assert inside_N.mean() > 0.99
    assert (ratio_N[inside_N] > 1 + 1e-4).mean() <= most_above


def test_reported_sum_of_squares_belongs_to_the_reported_parameters(planted):
    for n_probes in (24, 200):
        data = planted(500, n_probes, seed=2)
        fits = fit_sigmoids(data.x_K, data.loss_NK)
        np.testing.assert_allclose(fits.sse_N, sse_of(fits, data.x_K, data.loss_NK), rtol=1e-4)


def test_errors_are_scipys(planted):
    data = planted(200, 60, seed=2)
    fits = fit_sigmoids(data.x_K, data.loss_NK)
    compared = 0
    for n in np.flatnonzero(fits.status_N == FitStatus.CONVERGED):
        _, found, covariance = scipy_fit(data.x_K, data.loss_NK[n])
        white = fits.autocorrelation_N[n] == 0
        if not white or abs(found[2] - fits.midpoint_N[n]) > 1e-3 or fits.width_N[n] < 0.1:
            continue
        se = np.sqrt(np.diag(covariance)) * [1, 1, 1, np.exp(found[3])]
        mine = [fits.floor_se_N[n], fits.drop_se_N[n], fits.midpoint_se_N[n], fits.width_se_N[n]]
        np.testing.assert_allclose(mine, se, rtol=0.05)
        compared += 1
    assert compared > 50


def test_intervals_cover_and_midpoints_are_unbiased(planted):
    data = planted(8000, 60, seed=3)
    fits = fit_sigmoids(data.x_K, data.loss_NK)
    known_N = fits.status_N == FitStatus.CONVERGED
    assert known_N.mean() > 0.9
    z_N = ((fits.midpoint_N - data.midpoint_N) / fits.midpoint_se_N)[known_N]
    covered = np.abs(z_N) < stats.t.ppf(0.975, 60 - 4)
    assert abs(covered.mean() - 0.95) < 0.015
    assert abs(np.median(z_N)) < 0.05


@pytest.mark.parametrize(("n_probes", "autocorrelation"), [(60, 0.3), (60, 0.6), (200, 0.6)])
def test_intervals_allow_for_correlated_noise(planted, n_probes, autocorrelation):
    data = planted(6000, n_probes, seed=5, autocorrelation=autocorrelation)
    fits = fit_sigmoids(data.x_K, data.loss_NK)
    assert abs(np.median(fits.autocorrelation_N) - autocorrelation) < 0.07
    resolved_N = (fits.status_N == FitStatus.CONVERGED) & (data.drop_N / data.noise_N > 5)
    z_N = ((fits.midpoint_N - data.midpoint_N) / fits.midpoint_se_N)[resolved_N]
    covered = (np.abs(z_N) < stats.t.ppf(0.975, n_probes - 4)).mean()
    as_if_white = np.sqrt((1 - autocorrelation) / (1 + autocorrelation))
    assert covered > 0.92
    assert (np.abs(z_N) < as_if_white * 1.96).mean() < covered - 0.1


@pytest.mark.parametrize("n_probes", [24, 60])
def test_wrong_basins_are_rare(planted, n_probes):
    data = planted(10_000, n_probes, seed=4)
    fits = fit_sigmoids(data.x_K, data.loss_NK)
    determined_N = data.cramer_rao_N() < 0.1
    wrong_N = np.abs(fits.midpoint_N - data.midpoint_N)[determined_N] > 0.5
    assert determined_N.sum() > 5000
    assert wrong_N.mean() < 0.001


def test_step_zero_counts_as_the_upper_plateau():
    x_K = np.concatenate([[-np.inf], np.linspace(5, 9, 20)])
    noise_NK = 0.05 * np.random.default_rng(0).standard_normal((200, 21))
    loss_NK = 1 + 9 * expit((5.1 - x_K) / 0.5) + noise_NK
    with_zero = fit_sigmoids(x_K, loss_NK)
    without = fit_sigmoids(x_K[1:], loss_NK[:, 1:])
    plateau_N = with_zero.floor_N + with_zero.drop_N
    np.testing.assert_allclose(plateau_N, 10.0, atol=0.25)
    assert np.nanmedian(without.drop_se_N) > 5 * np.median(with_zero.drop_se_N)


def test_scale_and_shift_of_the_losses_change_neither_midpoint_nor_width(planted):
    data = planted(500, 40, seed=5)
    loss_NK = data.loss_NK.astype(np.float64)
    one = fit_sigmoids(data.x_K, loss_NK)
    other = fit_sigmoids(data.x_K, 50 + 1000 * loss_NK)
    same_N = one.status_N == FitStatus.CONVERGED
    np.testing.assert_allclose(other.midpoint_N[same_N], one.midpoint_N[same_N], atol=2e-4)
    np.testing.assert_allclose(other.width_N[same_N], one.width_N[same_N], rtol=5e-3)
    np.testing.assert_allclose(other.drop_N[same_N], 1000 * one.drop_N[same_N], rtol=1e-3)
    flat = (TokenClass.FLAT_KNOWN, TokenClass.FLAT_UNLEARNED)
    np.testing.assert_array_equal(other.is_class(*flat), one.is_class(*flat))


def test_a_shift_along_x_shifts_midpoints_only(planted):
    data = planted(300, 40, seed=6)
    one, other = (fit_sigmoids(data.x_K + shift, data.loss_NK) for shift in (0.0, 7.0))
    same_N = one.status_N == FitStatus.CONVERGED
    np.testing.assert_allclose(other.midpoint_N[same_N], one.midpoint_N[same_N] + 7, atol=1e-3)
    np.testing.assert_array_equal(other.class_N, one.class_N)


@pytest.mark.parametrize("block_tokens", [7, 37, 10_000])
def test_blocks_and_order_do_not_matter(planted, block_tokens):
    data = planted(150, 30, seed=7)
    whole = fit_sigmoids(data.x_K, data.loss_NK)
    order = np.random.default_rng(0).permutation(150)
    shuffled = fit_sigmoids(data.x_K, data.loss_NK[order], block_tokens=block_tokens)
    np.testing.assert_array_equal(shuffled.class_N, whole.class_N[order])
    np.testing.assert_allclose(shuffled.sse_N, whole.sse_N[order], rtol=1e-4)
    off_N = np.abs(shuffled.midpoint_N - whole.midpoint_N[order]) / whole.midpoint_se_N[order]
    assert np.nanmax(off_N) < 0.05


def test_a_torch_tensor_gives_the_same_numpy_columns_as_an_array(planted):
    data = planted(20, 30, seed=8)
    fits = fit_sigmoids(torch.tensor(data.x_K), torch.tensor(data.loss_NK))
    assert isinstance(fits.midpoint_N, np.ndarray)
    np.testing.assert_array_equal(fits.midpoint_N, fit_sigmoids(data.x_K, data.loss_NK).midpoint_N)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_cuda_and_cpu_give_the_same_sums_of_squares(planted):
    data = planted(2000, 60, seed=9)
    cpu, cuda = (fit_sigmoids(data.x_K, data.loss_NK, device=d) for d in ("cpu", "cuda"))
    np.testing.assert_allclose(cuda.sse_N, cpu.sse_N, rtol=1e-3)


def test_missing_losses_are_left_out(planted):
    """Compare with a fit without those probe steps."""
    data = planted(300, 40, seed=10)
    kept_K = np.ones(40, dtype=bool)
    kept_K[[3, 17, 18, 31]] = False
    without = fit_sigmoids(data.x_K[kept_K], data.loss_NK[:, kept_K])
    loss_NK = data.loss_NK.copy()
    loss_NK[::2, ~kept_K] = np.nan
    loss_NK[0, 17], loss_NK[2, 18] = np.inf, -np.inf
    fits, whole = fit_sigmoids(data.x_K, loss_NK), fit_sigmoids(data.x_K, data.loss_NK)
    np.testing.assert_array_equal(fits.n_probes_N, np.where(np.arange(300) % 2, 40, 36))
    masked, others = np.arange(0, 300, 2), np.arange(1, 300, 2)
    np.testing.assert_allclose(fits.sse_N[others], whole.sse_N[others], rtol=1e-4)
    same = np.isclose(fits.sse_N[masked], without.sse_N[masked], rtol=1e-4)
    assert same.mean() > 0.95  # the grid is laid over other probes: a basin may be missed
    masked = masked[same]
    assert (fits.class_N[masked] == without.class_N[masked]).mean() > 0.98
    np.testing.assert_allclose(fits.level_N[masked], without.level_N[masked], rtol=1e-5)
    np.testing.assert_allclose(fits.fall_N[masked], without.fall_N[masked], rtol=1e-5)
    sure = masked[(without.status_N[masked] == 0) & (without.midpoint_se_N[masked] < 0.1)]
    assert len(sure) > 60
    np.testing.assert_allclose(fits.midpoint_N[sure], without.midpoint_N[sure], atol=2e-3)
    np.testing.assert_allclose(fits.midpoint_se_N[sure], without.midpoint_se_N[sure], rtol=0.2)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_token_with_four_losses_is_not_fitted(planted, bad):
    data = planted(50, 30, seed=10)
    loss_NK = data.loss_NK.copy()
    loss_NK[3, 4:], loss_NK[7], loss_NK[9, 5:] = bad, bad, bad
    fits = fit_sigmoids(data.x_K, loss_NK)
    assert set(np.flatnonzero(fits.status_N == FitStatus.NON_FINITE)) == {3, 7}
    assert (fits.class_N[[3, 7]] == TokenClass.UNFITTED).all()
    assert list(fits.n_probes_N[[3, 7, 9]]) == [4, 0, 5]
    for name in SigmoidFits.columns():
        if getattr(fits, name).dtype.kind == "f":
            assert np.isnan(getattr(fits, name)[[3, 7]]).all(), name
    assert np.isnan(fits.predict(data.x_K)[[3, 7]]).all()


def test_constant_losses_are_flat_with_no_midpoint():
    x_K = np.arange(10.0)
    fits = fit_sigmoids(x_K, np.array([[0.25] * 10, [9.0] * 10, [0.0] * 10], dtype=np.float32))
    assert [TokenClass(c) for c in fits.class_N] == [
        TokenClass.FLAT_KNOWN,
        TokenClass.FLAT_UNLEARNED,
        TokenClass.FLAT_KNOWN,
    ]
    np.testing.assert_array_equal(fits.floor_N, [0.25, 9.0, 0.0])
    np.testing.assert_array_equal(fits.drop_N, 0.0)
    assert np.isnan(fits.midpoint_N).all()
    np.testing.assert_array_equal(fits.predict(x_K)[1], 9.0)


def test_a_step_between_two_probes_is_placed_between_them():
    x_K = np.linspace(0, 8, 30)
    noise = 0.01 * np.random.default_rng(0).standard_normal((1, 30))
    fits = fit_sigmoids(x_K, np.where(x_K < 4.05, 6.0, 1.0)[None] + noise)
    before, after = x_K[x_K < 4.05].max(), x_K[x_K > 4.05].min()
    assert fits.status_N[0] == FitStatus.TOO_FEW_POINTS
    assert before < fits.midpoint_N[0] < after
    np.testing.assert_allclose(fits.midpoint_se_N[0], (after - before) / np.sqrt(12), rtol=1e-5)
    assert np.isnan(fits.width_se_N[0])


def test_a_midpoint_beyond_the_last_probe_is_a_status():
    x_K = np.linspace(0, 8, 40)
    fits = fit_sigmoids(x_K, (5 * expit((10 - x_K) / 0.7))[None])
    assert fits.status_N[0] == FitStatus.AT_BOUND
    assert np.isnan(fits.midpoint_se_N[0])


@pytest.mark.parametrize(
    ("x_K", "loss_shape", "words"),
    [
        (np.arange(4.0), (3, 4), "at least 5 probe steps"),
        (np.arange(6.0), (3, 5), "do not match 6 probes"),
        (np.array([0.0, 1, 1, 1, 3]), (3, 5), "only 3 probes have a finite x of their own"),
        (np.array([0.0, 1, 0.5, 2, 3]), (3, 5), "does not ascend"),
        (np.array([0.0, 1, 2, 3, np.inf]), (3, 5), "NaN or \\+inf"),
        (np.array([0.0, 1, 2, 3, np.nan]), (3, 5), "NaN or \\+inf"),
    ],
)
def test_bad_input_gets_one_line(x_K, loss_shape, words):
    with pytest.raises(TokscaleError, match=words):
        fit_sigmoids(x_K, np.ones(loss_shape))


def test_five_probes_or_an_empty_array_can_be_fitted():
    fits = fit_sigmoids(np.arange(5.0), np.array([[5.0, 4.9, 2.0, 0.1, 0.0]]))
    np.testing.assert_allclose(fits.predict(np.arange(5.0)).mean(), 12 / 5, rtol=0.05)
    assert len(fit_sigmoids(np.arange(5.0), np.empty((0, 5)))) == 0


def test_importing_the_room_loads_no_torch():
    code = "import sys, megatron_tokscale.fit; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_several_probes_may_come_before_time_starts(planted):
    """On the axis of summed learning rates, a first step at learning rate 0 has x = -inf too."""
    truth = planted(200, 40)
    clean_NK = truth.floor_N[:, None] + truth.drop_N[:, None] * expit(
        (truth.midpoint_N[:, None] - truth.x_K) / truth.width_N[:, None]
    )
    x_K = np.concatenate([[-np.inf], truth.x_K])
    fits = fit_sigmoids(x_K, np.concatenate([clean_NK[:, :1], clean_NK], axis=1))
    inside = (truth.midpoint_N > 3) & (truth.midpoint_N < 7) & (truth.width_N > 0.2)
    assert inside.sum() > 50
    np.testing.assert_allclose(fits.midpoint_N[inside], truth.midpoint_N[inside], atol=1e-3)
    with pytest.raises(TokscaleError, match="does not ascend"):
        fit_sigmoids(np.array([0.0, -np.inf, 1, 2, 3, 4]), np.ones((2, 6)))


def test_a_burst_of_late_probes_leaves_the_rest_to_be_found():
    """60 probes at successive steps make their median distance 1e-6 of the range."""
    early = np.geomspace(1, 1e5, 30).round()
    x_K = np.log(np.unique(np.concatenate([early, 1e5 + np.arange(60)])))
    midpoint_N = np.random.default_rng(0).uniform(2, 9, 200)
    noise_NK = 0.1 * np.random.default_rng(1).standard_normal((200, len(x_K)))
    fits = fit_sigmoids(x_K, 1 + 4 * expit((midpoint_N[:, None] - x_K) / 0.5) + noise_NK)
    assert (np.abs(fits.midpoint_N - midpoint_N) < 0.3).mean() > 0.98


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_losses_may_have_any_float_type(planted, dtype):
    data = planted(400, 60, seed=12)
    loss_NK = data.loss_NK.astype(np.float16)
    exact = fit_sigmoids(data.x_K, loss_NK.astype(np.float64))
    fits = fit_sigmoids(data.x_K, loss_NK.astype(dtype))
    np.testing.assert_allclose(fits.sse_N, exact.sse_N, rtol=2e-3)
    assert (fits.class_N == exact.class_N).mean() > 0.995


def test_one_bad_token_does_not_touch_the_others(planted):
    data = planted(300, 60, seed=13)
    whole = fit_sigmoids(data.x_K, data.loss_NK)
    loss_NK = data.loss_NK.copy()
    loss_NK[5], loss_NK[6], loss_NK[7, ::2], loss_NK[8] = np.nan, 3e38, -np.inf, 0.0
    fits = fit_sigmoids(data.x_K, loss_NK)
    others = np.setdiff1d(np.arange(300), [5, 6, 7, 8])
    np.testing.assert_array_equal(fits.class_N[others], whole.class_N[others])
    np.testing.assert_allclose(fits.sse_N[others], whole.sse_N[others], rtol=1e-4)


def test_threads_and_blocks_do_not_change_the_fit(planted):
    data = planted(3000, 30, seed=14)
    whole = fit_sigmoids(data.x_K, data.loss_NK)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        blocks = fit_sigmoids(data.x_K, data.loss_NK, block_tokens=400)
    finally:
        torch.set_num_threads(threads)
    np.testing.assert_array_equal(blocks.class_N, whole.class_N)
    np.testing.assert_allclose(blocks.sse_N, whole.sse_N, rtol=1e-4)


def test_a_midpoint_that_five_probes_do_not_determine_has_the_status_undetermined():
    rng = np.random.default_rng(0)
    x_K = np.arange(1.0, 6.0)
    midpoint, drop = rng.uniform(1.5, 4.5, (600, 1)), rng.uniform(2, 6, (600, 1))
    clean_NK = 1 + drop * expit((midpoint - x_K) / 0.7)
    fits = fit_sigmoids(x_K, clean_NK + 0.1 * rng.standard_normal(clean_NK.shape))
    assert (fits.status_N == FitStatus.UNDETERMINED).mean() > 0.1
