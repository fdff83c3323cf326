"""The common noise in resamples of mean losses: against loops, and many draws of the fitter's.

Shapes: N tokens, K probe steps, D datasets, G groups, R resamples.
"""

from dataclasses import replace

import numpy as np
import pytest
from runs import log_time, probe_steps, write_run
from scipy.special import expit

from megatron_tokscale.compare import run_compare
from megatron_tokscale.compare.common_noise import LeftOver
from megatron_tokscale.compare.run_compare import compare_runs
from megatron_tokscale.fit import fit_run
from megatron_tokscale.fit.common_shifts import draw_left_over
from megatron_tokscale.fit.summary import DatasetShifts
from megatron_tokscale.spectrum.groups import Groups
from megatron_tokscale.store import Run

STEPS = probe_steps(40, last=2000)
X = log_time(STEPS)
MEAN = np.stack([6 - 0.5 * np.maximum(X, 0), 5 - 0.3 * np.maximum(X, 0)])
DATASETS = Groups(np.array([0, 0, 0, 1, 1, 0]), ("prose", "code"))


def shifts(shared):
    return [
        DatasetShifts(name, 1000, (0.0,) * len(X), each, 0.001, 0.1, ())
        for name, each in zip(DATASETS.names, shared, strict=True)
    ]


def drawn(shared, n_resamples=400):
    rng = np.random.default_rng(0)
    return LeftOver.draw(DATASETS, X, MEAN, shifts(shared), n_resamples, rng)


def test_resamples_have_the_spread_of_many_draws():
    left_RDK = drawn((0.05, 0.02)).left_RDK
    assert not left_RDK[0].any()  # the data as they are
    many_BDK = draw_left_over(X, MEAN, shifts((0.05, 0.02)), 100, np.random.default_rng(1))
    for d in range(2):
        found, expected = (np.sqrt((each[:, d, -8:] ** 2).mean()) for each in (left_RDK, many_BDK))
        assert found == pytest.approx(expected, rel=0.35)  # twelve draws tell a size to 20%


def test_groups_have_the_noise_of_their_tokens():
    left = drawn((0.05, 0.02), 5)
    groups = Groups(np.array([0, 1, 1, 1, 1, 1]), ("first", "rest"))
    found_RGK = left.of_groups(groups)
    of_tokens_RNK = left.left_RDK[:, DATASETS.group_N]
    for g in range(2):
        expected_RK = of_tokens_RNK[:, groups.group_N == g].mean(axis=1)
        np.testing.assert_allclose(found_RGK[:, g], expected_RK, atol=1e-12)


@pytest.mark.parametrize("known", [shifts((0.0, 0.0)), None])
def test_there_is_none_without_common_noise(known):
    left = LeftOver.draw(DATASETS, X, MEAN, known, 5, np.random.default_rng(0))
    assert left.left_RDK.shape == (6, 2, len(X))
    assert not left.left_RDK.any()


def noisy_run(path, seed, common):
    """Sigmoids of 1,600 tokens, with noise that all tokens of a probe share."""
    truth, rng = np.random.default_rng(0), np.random.default_rng([2, seed])
    midpoint_N1 = truth.uniform(1.5, 7, (1600, 1)) + 0.1 * rng.standard_normal((1600, 1))
    loss_NK = 1 + 4 * expit((midpoint_N1 - X) / 0.5) + 0.1 * rng.standard_normal((1600, len(X)))
    loss_NK += common * rng.standard_normal(len(X))
    fit_run(write_run(path, STEPS, loss_NK.astype(np.float32)))
    return Run.open(path)


def test_it_widens_what_is_said_of_these_two_runs_alone(tmp_path, monkeypatch):
    """Intervals over seeds have it from the seeds, and tokens are called without it."""
    a, b, c = (noisy_run(tmp_path / name, seed, 0.05) for seed, name in enumerate("abc"))
    found = compare_runs(a, b, [c], out=tmp_path / "with", n_resamples=100)
    draw = LeftOver.draw

    def draw_nothing(datasets, x_K, mean_DK, _, *rest):
        return draw(datasets, x_K, mean_DK, None, *rest)

    monkeypatch.setattr(run_compare.LeftOver, "draw", draw_nothing)
    bare = compare_runs(a, b, [c], out=tmp_path / "without", n_resamples=100)
    for with_it, without in zip(found.groups["dataset"], bare.groups["dataset"], strict=True):
        assert length(with_it.lower) > 1.5 * length(without.lower)
        assert length(with_it.late_loss.factor) > 1.5 * length(without.late_loss.factor)
        assert with_it.late_loss.factor.uncorrected == without.late_loss.factor.uncorrected
        same = replace(with_it.late_loss, factor=without.late_loss.factor)
        assert same == without.late_loss
        assert with_it.learning_times == without.learning_times
    assert found.gained == bare.gained


def length(estimate):
    return estimate.high - estimate.low
