"""The clock of two runs: sums of learning rates, or the time of the fits.

Shapes: K probe steps.
"""

import math
from dataclasses import replace

import numpy as np
import pytest
from runs import write_run

from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.fit import fit_run
from megatron_tokscale.results import FittedRun
from megatron_tokscale.spectrum.common_clock import common_clock
from megatron_tokscale.spectrum.evidence.shared_clock import SharedClock
from megatron_tokscale.store import Run
from megatron_tokscale.store.exchange.import_run import import_run
from megatron_tokscale.store.exchange.sources import ImportSettings

STEPS = np.array([0, 1, 2, 4, 8, 16, 32])


def clock(source_K, target_K, fit_K):
    return SharedClock("lr-sum", np.log(source_K), np.log(target_K), np.log(fit_K))


def test_places_are_interpolated_on_the_sources_axis_and_go_on_beyond_it():
    """The source's steps are worth twice as much from step 8 on."""
    source_K = np.array([1.0, 2, 4, 8, 16, 32])
    found = clock(source_K, np.array([0.5, 4, 8, 128]), np.array([1.0, 2, 4, 8, 12, 20]))
    expected = [np.log(0.5), np.log(4), np.log(8), np.log(20) + np.log(128 / 32)]
    np.testing.assert_allclose(found.place_K(), expected)


def test_step_0_stays_before_training():
    with np.errstate(divide="ignore"):
        found = clock(np.array([0.0, 1, 2]), np.array([0.0, 1.5]), np.array([0.0, 1, 2]))
    assert found.place_K()[0] == -np.inf
    np.testing.assert_allclose(found.place_K()[1], np.log(1.5))


@pytest.fixture
def fitted(tmp_path):
    def make(name, time="step", lr_sums_known=True):
        run = write_run(tmp_path / name, STEPS, np.ones((40, len(STEPS))))
        fit_run(run, time=time)
        if not lr_sums_known:
            records = tuple(replace(record, lr_sum=math.nan) for record in run.records)
            run = replace(run, records=records)
        return FittedRun.open(run)

    return make


def test_runs_with_learning_rates_share_their_sum_whatever_their_fits_count(fitted):
    source, target = fitted("a"), fitted("b", time="tokens")
    found = SharedClock.of(source, target)
    assert found.time == "lr-sum"
    np.testing.assert_allclose(found.source_x_K, source.run.x_K("lr-sum"))
    np.testing.assert_allclose(found.place_K(), source.x_K)


def test_without_learning_rates_the_clock_is_that_of_the_fits_or_there_is_none(fitted):
    source, target = fitted("a"), fitted("b", lr_sums_known=False)
    found = SharedClock.of(source, target)
    assert found.time == "step"
    np.testing.assert_allclose(found.target_x_K, target.x_K)
    with pytest.raises(
        TokscaleError, match=r"learning rates .* not known; fit both with --time tokens"
    ):
        SharedClock.of(source, fitted("c", time="tokens", lr_sums_known=False))


def test_imported_runs_of_other_units_have_no_clock(tmp_path):
    """An epoch is no token, and a number of tokens no number of billions of them."""
    runs = []
    for name, unit in (("a", "tokens"), ("b", "tokens"), ("c", "billion-tokens"), ("d", "epochs")):
        loss_NK = np.random.default_rng(len(runs)).gamma(4, 1, (40, len(STEPS)))
        np.savez(tmp_path / "losses.npz", loss_matrix=loss_NK, axis_values=STEPS, axis_name="T")
        import_run(tmp_path / "losses.npz", tmp_path / name, ImportSettings(axis="T", unit=unit))
        run = Run.open(tmp_path / name)
        fit_run(run)
        runs.append(FittedRun.open(run))
    first, second, *others = runs
    np.testing.assert_array_equal(SharedClock.of(first, second).target_x_K, second.x_K)
    for other in others:
        with pytest.raises(TokscaleError, match=r"counts .*tokens.*; expected one unit of time"):
            SharedClock.of(other, first)
        with pytest.raises(TokscaleError, match=r"counts .*tokens.*; expected one unit of time"):
            common_clock([other.run, first.run], ("lr-sum", "axis"))
