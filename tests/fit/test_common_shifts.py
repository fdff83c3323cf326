"""Common shifts: found on planted worlds, zero where nothing is shared, and never a sharp step.

Shapes: N tokens, D datasets, K probe steps.
"""

from dataclasses import replace

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from planted_worlds import WORLDS, axis, noise, text_of
from runs import log_time, probe_steps

from megatron_tokscale.fit import SigmoidFits, fit_run, fit_sigmoids
from megatron_tokscale.fit.common_shifts import (
    draw_left_over,
    shift_table,
    shifts_of,
    without_shifts,
)
from megatron_tokscale.fit.fit_text import describe_fit
from megatron_tokscale.results import FittedRun

NAMES = ("one", "two")


def world(name, common, n_tokens=3000):
    """Losses with and without a common part of the noise, their datasets, and x."""
    rng = np.random.default_rng(0)
    text, x_K = text_of(n_tokens, rng), axis()
    clean_NK = WORLDS[name].draw(text, x_K, rng)
    own_NK, both_NK = (
        clean_NK + noise(text, len(x_K), np.random.default_rng(1), each) for each in (0.0, common)
    )
    return x_K, own_NK.astype(np.float32), both_NK.astype(np.float32), text.dataset_N


@pytest.mark.parametrize("name", ["A1", "B1", "B2", "B3", "C"])
def test_worlds_without_common_noise_keep_their_losses(name):
    """Unigram phase, bump and decay are common to all tokens, and are no noise."""
    x_K, own_NK, _, dataset_N = world(name, 0.0)
    shifts = shifts_of(x_K, [(own_NK, dataset_N)], NAMES)
    assert np.abs(shift_table(shifts)).max() < 0.02
    assert all(each.share < 0.002 for each in shifts)


@pytest.mark.parametrize("name", ["A1", "B1", "B3"])
@pytest.mark.parametrize("common", [0.05, 0.2])
def test_common_noise_is_found_by_dataset(name, common):
    x_K, own_NK, both_NK, dataset_N = world(name, common)
    shifts = shifts_of(x_K, [(both_NK, dataset_N)], NAMES)
    for d, each in enumerate(shifts):
        truth_K = (both_NK - own_NK)[dataset_N == d][0]
        truth_K[0] = 0
        left_K = np.array(each.shift_K) - truth_K
        assert (left_K**2).sum() < 0.5 * (truth_K**2).sum()
        assert_allclose(each.shared, truth_K[1:].std(), rtol=0.3)
        assert each.tokens == (dataset_N == d).sum()
        assert each.shift_K[0] == 0


@pytest.mark.parametrize("name", ["A1", "B3"])
def test_drawn_noise_is_as_large_as_the_noise_that_is_left(name):
    """Means over four planted noises of each dataset; most of the noise that is left is slow."""
    left, drawn = [], []
    for seed in range(4):
        rng = np.random.default_rng(seed)
        text, x_K = text_of(2000, rng), axis()
        own_NK = WORLDS[name].draw(text, x_K, rng) + noise(text, len(x_K), rng)
        common_DK = 0.05 * rng.standard_normal((2, len(x_K)))
        common_DK[:, 0] = 0
        loss_NK = (own_NK + common_DK[text.dataset_N]).astype(np.float32)
        shifts = shifts_of(x_K, [(loss_NK, text.dataset_N)], NAMES)
        left.append(common_DK - shift_table(shifts))
        mean_DK = np.array([loss_NK[text.dataset_N == d].mean(axis=0) for d in (0, 1)])
        mean_DK -= shift_table(shifts)
        drawn.append(draw_left_over(x_K, mean_DK, shifts, 4, rng))
        assert_array_equal(drawn[-1][..., 0], 0)
    assert_allclose(np.std(drawn), np.std(left), rtol=0.35)


def test_nothing_is_drawn_without_common_noise():
    x_K, own_NK, _, dataset_N = world("A1", 0.0)
    shifts = [replace(each, shared=0.0) for each in shifts_of(x_K, [(own_NK, dataset_N)], NAMES)]
    left_BDK = draw_left_over(x_K, np.zeros((2, len(x_K))), shifts, 3, np.random.default_rng(0))
    assert left_BDK.shape == (3, 2, len(x_K))
    assert not left_BDK.any()


def test_the_share_is_what_the_departures_from_neighbours_lose():
    """The departure of a loss is its distance from the line between its neighbours."""
    x_K, _, both_NK, dataset_N = world("B1", 0.2, 1000)
    shifts = shifts_of(x_K, [(both_NK, dataset_N)], NAMES)
    fitted_NK = without_shifts(both_NK, shift_table(shifts), dataset_N)

    def square(loss_NK):
        total = 0.0
        for k in range(2, len(x_K) - 1):
            after = (x_K[k] - x_K[k - 1]) / (x_K[k + 1] - x_K[k - 1])
            line_N = (1 - after) * loss_NK[:, k - 1] + after * loss_NK[:, k + 1]
            total += ((loss_NK[:, k] - line_N) ** 2).sum()
        return total

    for d, each in enumerate(shifts):
        before, after = (
            square(loss[dataset_N == d].astype(float)) for loss in (both_NK, fitted_NK)
        )
        assert_allclose(each.share, 1 - after / before, rtol=1e-4)


def test_blocks_of_tokens_give_the_same_shifts_and_tokens_with_a_missing_loss_do_not_count():
    x_K, _, both_NK, dataset_N = world("B1", 0.1, 1000)
    whole = shifts_of(x_K, [(both_NK, dataset_N)], NAMES)
    missing_NK = np.concatenate([both_NK, np.full((3, len(x_K)), 50, np.float32)])
    missing_NK[-3:, 7] = np.nan
    of_N = np.concatenate([dataset_N, [0, 0, 1]]).astype(np.int16)
    blocks = [(missing_NK[at], of_N[at]) for at in (slice(0, 300), slice(300, None))]
    assert_allclose(shift_table(shifts_of(x_K, blocks, NAMES)), shift_table(whole), atol=1e-6)


def test_a_sharp_fall_of_all_tokens_stays_in_their_losses():
    rng = np.random.default_rng(2)
    x_K = np.concatenate([[-np.inf], np.linspace(0, 6, 60)])
    own_NK = 0.3 * rng.standard_normal((2000, 61))
    fall_K = 1.5 * (x_K < 3)
    shifts = shifts_of(
        x_K, [((own_NK + fall_K).astype(np.float32), np.zeros(2000, np.int16))], ("all",)
    )
    assert np.abs(shifts[0].shift_K).max() < 0.03
    assert shifts[0].jumps == (int((x_K >= 3).argmax()),)


def test_losses_that_never_change_have_no_shifts():
    loss_NK = np.full((150, 20), 2.7, np.float32)
    (found,) = shifts_of(np.arange(20.0), [(loss_NK, np.zeros(150, np.int16))], ("all",))
    assert_array_equal(found.shift_K, 0)


def test_few_probes_have_no_shifts():
    loss_NK = np.random.default_rng(3).standard_normal((150, 7)).astype(np.float32)
    (found,) = shifts_of(np.arange(7.0), [(loss_NK, np.zeros(150, np.int16))], ("all",))
    assert_array_equal(found.shift_K, 0)


def test_few_tokens_have_no_shifts():
    """A dataset of 40 tokens is beside one of 400."""
    rng = np.random.default_rng(3)
    loss_NK = (rng.standard_normal((440, 30)) + rng.standard_normal(30)).astype(np.float32)
    dataset_N = (np.arange(440) < 40).astype(np.int16)
    many, few = shifts_of(np.arange(30.0), [(loss_NK, dataset_N)], NAMES)
    assert few.tokens == 40
    assert_array_equal(few.shift_K, 0)
    assert np.std(many.shift_K) > 0.5


@pytest.fixture
def run(make_run):
    """A run of two datasets, each with common noise of its own."""
    rng = np.random.default_rng(4)
    steps = probe_steps(40)
    midpoint_N = rng.uniform(3, 7, (800, 1))
    loss_NK = 1 + 4 / (1 + np.exp((log_time(steps) - midpoint_N) / 0.4))
    loss_NK += 0.2 * rng.standard_normal(loss_NK.shape)
    shared_2K = 0.3 * rng.standard_normal((2, len(steps)))
    loss_NK += np.repeat(shared_2K[np.arange(100) % 2], 8, axis=0)
    return make_run(steps, loss_NK.astype(np.float32))


def test_a_run_is_fitted_without_the_shifts_and_says_so(run):
    summary = fit_run(run, block_tokens=300)
    shift_DK = shift_table(summary.common_shifts)
    assert [each.dataset for each in summary.common_shifts] == ["prose", "code"]
    assert 0.2 < summary.common_shifts[0].shared < 0.4
    dataset_N = run.tokens.dataset_N
    loss_NK = run.read_losses() - shift_DK.astype(np.float32)[dataset_N]
    expected = fit_sigmoids(run.x_K(), loss_NK)
    found = SigmoidFits.load(run.paths.fits)
    assert_array_equal(found.class_N, expected.class_N)
    assert_allclose(found.midpoint_N, expected.midpoint_N, atol=1e-4)
    size = f"{summary.common_shifts[0].shared:.2g}"
    assert f"common shifts taken out of prose: {size} nats" in describe_fit(summary)


def test_analyses_get_the_losses_that_were_fitted_and_the_shifts_that_the_mean_has(run):
    fit_run(run)
    source = FittedRun.open(run)
    loss_NK = np.concatenate([block_NK for _, _, block_NK in source.blocks()])
    dataset_N, raw_NK = run.tokens.dataset_N, run.read_losses()
    assert_allclose(loss_NK + source.shift_DK[dataset_N], raw_NK, atol=1e-5)
    assert np.abs(loss_NK - raw_NK).max() > 0.1


def test_shifts_that_are_kept_are_another_fit(run):
    fit_id = fit_run(run).identity.fit_id
    kept = fit_run(run, keep_common_shifts=True)
    assert kept.common_shifts is None
    assert kept.identity.fit_id != fit_id
    expected = fit_sigmoids(run.x_K(), run.read_losses())
    assert_array_equal(SigmoidFits.load(run.paths.fits).class_N, expected.class_N)
    source = FittedRun.open(run)
    assert not source.shift_DK.any()
    for at, _, loss_NK in source.blocks():
        assert_array_equal(loss_NK, run.read_losses(at.start, at.stop))
    assert "common shifts taken out" not in describe_fit(kept)
    assert "common shifts are kept" in describe_fit(kept)


def test_fewer_classes_change_than_with_the_common_noise_left_in():
    x_K, own_NK, both_NK, dataset_N = world("B1", 0.2)
    shifts = shifts_of(x_K, [(both_NK, dataset_N)], NAMES)
    fitted_NK = without_shifts(both_NK, shift_table(shifts), dataset_N)
    class_N, left_N, out_N = (
        fit_sigmoids(x_K, loss_NK).class_N for loss_NK in (own_NK, both_NK, fitted_NK)
    )
    assert np.mean(out_N != class_N) < 0.85 * np.mean(left_N != class_N)
