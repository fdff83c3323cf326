"""Falls between edges of x against straight lines, numpy's weighted fits and interpolation.

Shapes: K probe steps, J intervals.
"""

import numpy as np
import pytest

from megatron_tokscale.spectrum.evidence.falls import OCTAVE, fall_weights, intervals

X_K = np.concatenate([[-np.inf], np.log(np.unique(np.round(2 ** (np.arange(0, 73) / 8))))])


def test_intervals_fill_the_range_with_about_the_length():
    edges = intervals(1.0, 1.0 + 4.4 * OCTAVE, OCTAVE)
    assert len(edges) == 5
    assert (edges[0], edges[-1]) == (1.0, 1.0 + 4.4 * OCTAVE)
    np.testing.assert_allclose(np.diff(edges), 1.1 * OCTAVE)


def test_the_falls_of_a_straight_line_are_exact_and_step_0_does_not_count():
    edges = intervals(X_K[1], X_K[-1], OCTAVE)
    loss_K = np.where(np.isfinite(X_K), 9 - 0.7 * X_K, 1e6)
    np.testing.assert_allclose(loss_K @ fall_weights(X_K, edges), 0.7 * np.diff(edges), rtol=1e-9)


def test_a_level_is_that_of_the_weighted_line_through_the_probes_nearby():
    rng = np.random.default_rng(0)
    loss_K = rng.standard_normal(len(X_K))
    edges = np.array([3.0, 4.5])
    levels = []
    for edge in edges:
        near = np.abs(X_K - edge) < OCTAVE / 2
        weight = 1 - np.abs(X_K[near] - edge) / (OCTAVE / 2)
        line = np.polynomial.Polynomial.fit(
            X_K[near] - edge, loss_K[near], 1, w=np.sqrt(weight), domain=[-1, 1], window=[-1, 1]
        )
        levels.append(line(0))
    np.testing.assert_allclose(loss_K @ fall_weights(X_K, edges), levels[0] - levels[1])


def test_between_probes_far_apart_losses_are_interpolated():
    x_K, loss_K = np.array([0.0, 2.0, 5.0, 9.0]), np.array([7.0, 6.0, 3.0, 2.5])
    edges = np.array([1.0, 4.0, 8.0])
    expected = -np.diff(np.interp(edges, x_K, loss_K))
    np.testing.assert_allclose(loss_K @ fall_weights(x_K, edges), expected)


@pytest.mark.parametrize("far", [2, 3])
def test_falls_two_octaves_apart_have_no_probe_in_common(far):
    weights_KJ = fall_weights(X_K, intervals(X_K[1], X_K[-1], OCTAVE))
    for j in range(weights_KJ.shape[1] - far):
        assert not (weights_KJ[:, j] * weights_KJ[:, j + far]).any()
