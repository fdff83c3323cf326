"""The covariance of falls against loops over tokens, and in worlds with and without steps.

Shapes: N tokens, K probe steps, J octaves.
"""

import numpy as np
import planted_worlds
import pytest

from megatron_tokscale.core.errors import UndefinedError
from megatron_tokscale.results.verdict import Verdict
from megatron_tokscale.spectrum import Units
from megatron_tokscale.spectrum.evidence.fall_covariance import FallSums, octaves
from megatron_tokscale.spectrum.evidence.falls import fall_weights
from megatron_tokscale.spectrum.evidence.token_groups import groups_by_frequency

FROM_X = np.log(38)


def sums_of(world, tokens=2000, seed=0, common=0.0, from_x=FROM_X):
    """The sums of a planted pair, what they are made of, and their units."""
    rng = np.random.default_rng(seed)
    text, x_K = planted_worlds.text_of(tokens, rng), planted_worlds.axis()
    losses = planted_worlds.seeds(planted_worlds.WORLDS[world], text, x_K, rng, common=common)
    units = Units.from_documents(text.dataset_N, text.document_N, seed=0)
    groups = groups_by_frequency(text.dataset_N, text.log_share_N)
    edges = octaves(from_x, float(x_K[-1]))
    sums = FallSums(edges, x_K, x_K, groups, units)
    for start in range(0, tokens, 700):
        at = slice(start, start + 700)
        sums.add(at, losses[0][at], losses[1][at])
    return sums, (losses, fall_weights(x_K, edges), groups.group_N), units


def covariance_by_loops(losses, weights_KJ, group_N, copies):
    """Loop over groups and tokens; a token counts as often as its document was drawn."""
    falls = [loss_NK.astype(float) @ weights_KJ for loss_NK in losses]
    n_octaves = weights_KJ.shape[1]
    total, count = np.zeros((n_octaves, n_octaves)), 0
    for group in np.unique(group_N):
        drawn = [n for n in np.flatnonzero(group_N == group) for _ in range(copies[n])]
        if not drawn:
            continue
        means = [fall_NJ[drawn].mean(axis=0) for fall_NJ in falls]
        for n in drawn:
            total += np.outer(falls[0][n] - means[0], falls[1][n] - means[1])
        count += len(drawn)
    return (total + total.T) / 2 / count


@pytest.mark.parametrize("row", [0, 1])
def test_the_covariance_is_that_of_loops_over_tokens(row):
    sums, (losses, weights_KJ, group_N), units = sums_of("B2", 1000)
    weight_RU = units.weights(1, seed=3)[[row]]
    found = sums.result(np.concatenate([weight_RU, weight_RU]))
    copies = weight_RU[0, units.unit_N].astype(int)
    expected = covariance_by_loops(losses, weights_KJ, group_N, copies)
    np.testing.assert_allclose(np.array(found.covariance), expected, atol=2e-5)
    diagonal = expected.trace() / len(expected)
    for distance, each in enumerate(found.profile):
        np.testing.assert_allclose(
            each.uncorrected, np.diagonal(expected, distance).mean() / diagonal, atol=1e-4
        )
    far = [(j, k) for j in range(4) for k in range(4) if abs(j - k) >= 2]
    value = np.mean([expected[j, k] for j, k in far]) / diagonal
    np.testing.assert_allclose(found.test.estimate.uncorrected, value, atol=1e-4)


def test_the_reproducible_share_is_that_of_planted_falls_and_noise():
    """Falls that both runs share have the variance of the noiseless world."""
    sums, (losses, weights_KJ, group_N), units = sums_of("B1", 6000)
    rng = np.random.default_rng(0)
    text, x_K = planted_worlds.text_of(6000, rng), planted_worlds.axis()
    clean_NJ = planted_worlds.WORLDS["B1"].draw(text, x_K, rng) @ weights_KJ
    measured_NJ = losses[0].astype(float) @ weights_KJ
    variances = []
    for fall_NJ in (clean_NJ, measured_NJ):
        within = fall_NJ.copy()
        for group in np.unique(group_N):
            within[group_N == group] -= within[group_N == group].mean(axis=0)
        variances.append((within**2).mean())
    found = sums.result(units.weights(100, seed=0)).reproducible
    assert found.low < variances[0] / variances[1] < found.high


@pytest.mark.parametrize(("octaves_measured", "far"), [(4.0, 2), (4.4, 2), (5.0, 3), (9.0, 3)])
def test_far_is_three_octaves_and_two_where_only_four_are_measured(octaves_measured, far):
    edges = octaves(0.0, octaves_measured * np.log(2))
    rng = np.random.default_rng(0)
    x_K, units = np.linspace(0, edges[-1], 40), Units(np.arange(60) % 6, np.zeros(6), 6)
    groups = groups_by_frequency(np.zeros(60, np.int16))
    sums = FallSums(edges, x_K, x_K, groups, units)
    loss_NK = rng.standard_normal((60, 40))
    sums.add(slice(0, 60), loss_NK, loss_NK)
    assert sums.result(units.weights(10, seed=0)).far_octaves == far


def test_below_three_and_a_half_octaves_the_covariance_is_undefined():
    with pytest.raises(UndefinedError, match=r"both runs measure 3\.4 octaves .* at least 3\.5"):
        octaves(0.0, 3.4 * np.log(2))


def test_noise_that_all_tokens_of_a_dataset_share_does_not_count():
    quiet, noisy = (sums_of("B1", common=common) for common in (0.0, 0.3))
    values = [
        sums.result(units.weights(2, seed=0)).test.estimate.uncorrected
        for sums, _, units in (quiet, noisy)
    ]
    np.testing.assert_allclose(*values, atol=1e-5)


@pytest.mark.parametrize(("world", "from_x"), [("A3", 0.0), ("B1", FROM_X), ("B2", FROM_X)])
def test_where_tokens_fall_in_steps_the_claim_holds(world, from_x):
    sums, _, units = sums_of(world, 6000, from_x=from_x)
    assert sums.result(units.weights(200, seed=0)).test.verdict is Verdict.HOLDS


@pytest.mark.parametrize("world", ["C", "D"])
def test_without_steps_the_covariance_is_positive(world):
    sums, _, units = sums_of(world, 12_000)
    found = sums.result(units.weights(200, seed=0))
    assert found.test.verdict is Verdict.FAILS
    assert found.test.estimate.value > 0.4


def test_shifts_of_tokens_that_both_runs_share_are_not_taken_for_steps():
    """World C has no steps. Shifts with a size per token give each octave's fall a sign."""
    rng = np.random.default_rng(0)
    text, x_K = planted_worlds.text_of(4000, rng), planted_worlds.axis()
    losses = planted_worlds.seeds(planted_worlds.WORLDS["C"], text, x_K, rng)
    edges = octaves(FROM_X, float(x_K[-1]))
    # The shift of a checkpoint changes its sign with every edge of the octaves.
    shift_K = np.interp(x_K, edges, (-1.0) ** np.arange(len(edges)))
    size_N1 = rng.normal(size=(4000, 1))
    shifted = [loss_NK + size_N1 * shift_K for loss_NK in losses]
    units = Units.from_documents(text.dataset_N, text.document_N, seed=0)
    sums = FallSums(edges, x_K, x_K, groups_by_frequency(text.dataset_N, text.log_share_N), units)
    sums.add(slice(0, 4000), *shifted)
    found = sums.result(units.weights(100, seed=0))
    assert found.profile[1].value < 0 < found.profile[2].value
    assert found.test.verdict is Verdict.UNDECIDED
    assert "by an amount of its own" in found.test.estimate.undefined
