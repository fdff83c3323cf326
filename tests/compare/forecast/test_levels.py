"""Levels of a mean curve as weights of its probes. K probes."""

import numpy as np
import pytest

from megatron_tokscale.compare.forecast.levels import level_weights, probe_noise
from megatron_tokscale.core.errors import UndefinedError

X_K = np.concatenate([[-np.inf], np.linspace(0, 6, 49)])
FINITE_K = np.where(np.isfinite(X_K), X_K, 0.0)


@pytest.mark.parametrize("at", [2.0, 4.03, 6.0])
def test_the_level_of_a_parabola_is_exact(at):
    curve_K = 3 - 0.7 * FINITE_K + 0.05 * FINITE_K**2
    assert level_weights(X_K, at, 6.0) @ curve_K == pytest.approx(3 - 0.7 * at + 0.05 * at**2)


def test_no_probe_behind_the_origin_and_no_step_0_has_a_weight():
    weight_K = level_weights(X_K, 4.0, 4.0)
    assert (weight_K[X_K > 4 + 1e-9] == 0).all()
    assert weight_K[0] == 0
    assert (weight_K != 0).sum() >= 5


def test_probes_far_apart_give_a_level():
    x_K = np.array([0.0, 2.0, 4.0, 6.0])
    assert level_weights(x_K, 6.0, 6.0) @ (3 - 0.7 * x_K) == pytest.approx(3 - 0.7 * 6)


def test_the_noise_of_the_probes_is_found():
    rng = np.random.default_rng(0)
    found = [
        probe_noise(X_K, np.exp(1 - 0.3 * FINITE_K) + 0.02 * rng.standard_normal(len(X_K)))
        for _ in range(20)
    ]
    assert np.mean(found) == pytest.approx(0.02, rel=0.15)


def test_too_few_probes_have_no_noise():
    with pytest.raises(UndefinedError, match="7 probes are too few"):
        probe_noise(X_K[:8], np.ones(8))
