"""The binned sum of bumps against the loop over transitions.

Shapes: E transitions, G grid points.
"""

import numpy as np
import pytest
from scipy.special import expit

from megatron_tokscale.fit import Transitions
from megatron_tokscale.spectrum import kernel_sum

LOW, HIGH = 0.0, 8.0


def moves_of(midpoint, width, drop):
    midpoint_E, width_E, drop_E = np.broadcast_arrays(*map(np.atleast_1d, (midpoint, width, drop)))
    n = len(midpoint_E)
    columns = (each.astype(float) for each in (drop_E, midpoint_E, width_E))
    return Transitions(np.arange(n), *columns, np.ones(n, bool))


def brute_force(moves, x_G):
    total_G = np.zeros(len(x_G))
    for drop, c, w in zip(moves.drop_E, moves.midpoint_E, moves.width_E, strict=True):
        s_G = expit((x_G - c) / w)
        total_G += drop / w * s_G * (1 - s_G)
    return total_G


def worst(moves):
    x_G, summed_G = kernel_sum(moves, LOW, HIGH)
    exact_G = brute_force(moves, x_G)
    return np.abs(summed_G - exact_G).max() / np.abs(exact_G).max()


@pytest.mark.parametrize("width", [0.0041, 0.008, 0.03, 0.1, 0.5, 2.0, 8.0])
@pytest.mark.parametrize("seed", range(4))
def test_one_bump_is_exact_at_every_width(width, seed):
    """Two widths of the grid's ladder surround any other: a single bump is the worst case."""
    midpoint, factor = np.random.default_rng(seed).uniform([2, 1], [6, 1.09])
    assert worst(moves_of(midpoint, width * factor, 3.0)) < 2e-3


def test_many_bumps_of_all_widths_and_signs():
    rng = np.random.default_rng(2)
    width_E = np.exp(rng.uniform(np.log(0.0041), np.log(8), 2000))
    moves = moves_of(rng.uniform(LOW, HIGH, 2000), width_E, rng.uniform(-2, 6, 2000))
    assert worst(moves) < 1e-3


def test_transitions_outside_the_range_reach_into_it():
    moves = moves_of([-2.0, -0.2, 8.1, 12.0, -1e5], [1.0, 0.05, 0.3, 3.0, 8.0], 2.0)
    assert worst(moves) < 2e-3


def test_narrower_than_the_grid_keeps_its_area():
    x_G, summed_G = kernel_sum(moves_of(4.0001, 1e-4, 5.0), LOW, HIGH)
    np.testing.assert_allclose(np.trapezoid(summed_G, x_G), 5.0, rtol=1e-6)
    np.testing.assert_allclose(x_G[summed_G.argmax()], 4.0, atol=0.01)


def test_nothing_adds_up_to_nothing():
    x_G, summed_G = kernel_sum(moves_of([], 1.0, 1.0), LOW, HIGH)
    assert (x_G[0], x_G[-1]) == (LOW, HIGH)
    assert not summed_G.any()
