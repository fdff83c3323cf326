"""The map from one time of a run to another.

Shapes: K probes.
"""

import numpy as np
import pytest
from runs import PEAK_LEARNING_RATE, log_time, write_run

from megatron_tokscale.core.errors import UndefinedError
from megatron_tokscale.spectrum.clock import between_clocks, map_clock


def test_a_power_law_between_clocks_is_found_between_and_beyond_the_probes():
    given_K = np.concatenate([[-np.inf], np.linspace(0, 6, 13)])
    wanted_K = 1 + 1.5 * given_K
    x = np.array([-np.inf, -0.7, 0.0, 2.2, 6.0, 7.5])
    np.testing.assert_allclose(map_clock(x, given_K, wanted_K), 1 + 1.5 * x)


def test_probes_are_mapped_to_themselves_and_the_map_ascends():
    rng = np.random.default_rng(0)
    given_K, wanted_K = (np.cumsum(rng.exponential(1, 30)) for _ in range(2))
    np.testing.assert_allclose(map_clock(given_K, given_K, wanted_K), wanted_K)
    fine = map_clock(np.linspace(given_K[0] - 1, given_K[-1] + 1, 500), given_K, wanted_K)
    assert (np.diff(fine) > 0).all()
    np.testing.assert_allclose(map_clock(wanted_K, wanted_K, given_K), given_K)


def test_a_run_maps_steps_to_summed_learning_rates_over_the_peak(tmp_path):
    run = write_run(tmp_path / "run", [0, 1, 4, 16, 64], np.ones((16, 5)))
    steps = np.array([0, 2, 64])
    found = between_clocks(run, log_time(steps), given="step", wanted="lr-sum")
    np.testing.assert_allclose(found, log_time(steps * PEAK_LEARNING_RATE / PEAK_LEARNING_RATE))
    tokens = between_clocks(run, log_time(steps), given="step", wanted="tokens")
    np.testing.assert_allclose(tokens, log_time(steps * 4 * run.probe_set.seq_length))
    np.testing.assert_array_equal(
        between_clocks(run, log_time(steps), given="step", wanted="step"), log_time(steps)
    )


def test_one_probe_makes_no_map():
    with pytest.raises(UndefinedError, match="1 probes after step 0 have both times"):
        map_clock(np.array([1.0]), np.array([-np.inf, 0.0]), np.array([-np.inf, 0.0]))
