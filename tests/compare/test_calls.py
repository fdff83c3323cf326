"""Calls of changed tokens: their level, their power, and the variances behind z.

Shapes: N tokens, J candidates.
"""

from dataclasses import replace

import numpy as np
import pytest
from scipy import stats
from scipy.integrate import quad
from scipy.special import expit
from token_tables import table

from megatron_tokscale.compare.calls import (
    RATE,
    between_seeds,
    call_changes,
    known_variance,
    q_values,
    seed_spread,
    shift_weights,
    standardized,
)
from megatron_tokscale.compare.token_table import SHIFTS
from megatron_tokscale.store.token_state import TokenState

LEARNED, TO_COME = TokenState.LEARNED, TokenState.TO_COME


def run_of(rng, level_N, seed_sd=0.0):
    """A run whose tokens are learned below 1 nat, with noise of 0.1 nats and that between seeds."""
    n_tokens = len(level_N)
    between_N = seed_sd * stats.t.rvs(3, size=n_tokens, random_state=rng)  # heavy tails
    late_N = level_N + between_N + 0.1 * rng.standard_normal(n_tokens)
    state_N = np.where(late_N < 1, LEARNED, TO_COME).astype(np.int8)
    return table(n_tokens, late_N=late_N.astype(np.float32), state_N=state_N)


def groups_of(n_tokens):
    return (np.arange(n_tokens) % 6, np.zeros(n_tokens, int))


@pytest.mark.parametrize("n_noise", [1, 3])
def test_q_values_are_benjamini_and_hochbergs_on_conformal_p_values(n_noise):
    rng = np.random.default_rng(0)
    n_tokens, candidates = 500, 80
    z_J = np.round(rng.normal(2, 2, candidates), 1)  # with ties
    null = np.round(np.abs(rng.normal(0, 1.5, 60 * n_noise)), 1)
    p_N = np.ones(n_tokens)
    trials = n_noise * n_tokens + 1
    p_N[:candidates] = [(1 + np.sum(null >= z)) / trials for z in z_J]
    adjusted = stats.false_discovery_control(p_N)[:candidates] * trials / (trials - 1)
    assert q_values(z_J, null, n_noise) == pytest.approx(np.minimum(adjusted, 1))


def test_another_seed_gains_and_loses_no_token():
    n_tokens = 4000
    for seed in range(20):
        rng = np.random.default_rng(seed)
        level_N = rng.uniform(0, 2, n_tokens)
        a, b, c = (run_of(rng, level_N, 0.2) for _ in range(3))
        gained, lost = call_changes(a, b, [c], groups_of(n_tokens))
        assert gained.candidate_N.sum() > 200  # there is what could be called
        assert not gained.called_N.any() and not lost.called_N.any()


def test_planted_gains_are_called_at_the_rate_of_false_discoveries():
    n_tokens, false, hits, planted = 4000, [], 0, 0
    for seed in range(20):
        rng = np.random.default_rng(seed)
        level_N = rng.uniform(0, 2, n_tokens)
        gain_N = (level_N > 1.3) & (rng.random(n_tokens) < 0.15)
        a, c = (run_of(rng, level_N, 0.1) for _ in range(2))
        b = run_of(rng, np.where(gain_N, 0.2, level_N), 0.1)
        gained, lost = call_changes(a, b, [c], groups_of(n_tokens))
        called_N = gained.called_N
        false.append(np.sum(called_N & ~gain_N) / max(called_N.sum(), 1))
        hits += np.sum(called_N & gain_N)
        planted += gain_N.sum()
        assert not lost.called_N.any()
    assert np.mean(false) < RATE + 2 * stats.sem(false)
    assert hits / planted > 0.8


def test_calls_need_a_second_seed():
    rng = np.random.default_rng(0)
    level_N = np.repeat([0.2, 1.8], 100)
    a, b = run_of(rng, level_N), run_of(rng, level_N[::-1])
    gained, lost = call_changes(a, b, [], groups_of(200))
    assert gained.candidate_N.sum() == lost.candidate_N.sum() == 100
    assert np.isnan(gained.q_value_N).all() and not gained.called_N.any()


def test_variance_between_seeds_is_that_of_each_group():
    rng = np.random.default_rng(0)
    group_N = np.repeat([0, 1], 20_000)
    sd_N = np.array([0.2, 0.6])[group_N]
    late = [(sd_N * rng.standard_normal(40_000) / np.sqrt(2)) for _ in range(2)]
    noisy = [each + 0.1 * rng.standard_normal(40_000) for each in late]
    a, c = (table(40_000, late_N=each.astype(np.float32)) for each in noisy)
    found_N = between_seeds(a, [c], (group_N,), 0.0)
    assert found_N[0] == pytest.approx(0.04, rel=0.1)
    assert found_N[-1] == pytest.approx(0.36, rel=0.1)


def test_group_of_few_tokens_takes_the_variance_of_the_wider_group():
    rng = np.random.default_rng(0)
    n_tokens = 10_000
    difference_N = rng.standard_normal(n_tokens)
    difference_N[:3] = 0  # three tokens that happen to agree
    group_N = np.zeros(n_tokens, int)
    group_N[:3] = 1
    a, c = table(n_tokens), table(n_tokens, late_N=difference_N.astype(np.float32))
    found_N = between_seeds(a, [c], (group_N,), 0.0)
    assert found_N[0] == pytest.approx(50 / 53 * found_N[-1], rel=0.02)


def test_shift_weights_average_over_a_normal_shift_of_the_clock():
    square = dict.fromkeys(SHIFTS, 0.0) | {0.2: 2.0, -0.4: 1.0, 0.8: 3.0}
    node = sorted([0.0, *SHIFTS])
    value = [square.get(h, 0.0) for h in node]
    density = stats.norm(scale=0.3).pdf
    expected, _ = quad(lambda h: np.interp(h, node, value) * density(h), -3, 3, points=node)
    assert shift_weights(0.3) @ list(square.values()) == pytest.approx(expected, rel=0.01)
    assert not shift_weights(0.0).any()


def test_token_learned_just_before_the_end_counts_for_less():
    a = table(2, late_N=np.float32([4, 4]))
    recent = np.where(np.array(SHIFTS) < 0, 3, 0)  # a slightly later clock would undo its fall
    moved_NH = np.stack([recent, np.zeros(len(SHIFTS))]).astype(np.float32)
    z_N = standardized(a, table(2, late_N=np.float32([1, 1]), moved_NH=moved_NH), np.zeros(2), 0.3)
    assert z_N[1] == pytest.approx(3 / np.sqrt(0.02))
    assert z_N[0] < z_N[1] / 3


@pytest.mark.parametrize("width", [0.05, 0.2, 0.5])
def test_variance_by_the_clock_is_that_of_two_seeds_with_independent_clocks(width):
    rng = np.random.default_rng(0)
    n_tokens, spread = 100_000, 0.3
    time_N = rng.uniform(-6, 6, n_tokens)  # the end is at 0

    def seed_of():
        own_N = time_N + spread / np.sqrt(2) * rng.standard_normal(n_tokens)
        late_NH = 4 * expit((own_N[:, None] - np.array([0.0, *SHIFTS])) / width)
        moved_NH = late_NH[:, 1:] - late_NH[:, :1]
        run = table(n_tokens, late_N=late_NH[:, 0], moved_NH=moved_NH)
        return replace(run, variance_N=np.zeros(n_tokens))

    a, b = seed_of(), seed_of()
    apart = np.mean((a.late_N - b.late_N) ** 2)
    assert known_variance(a, b, spread).mean() == pytest.approx(apart, rel=0.1)


def test_spread_between_seeds_is_robust():
    rng = np.random.default_rng(0)
    time_N = rng.uniform(2, 5, 20_000)
    other_N = time_N + 0.3 * rng.standard_normal(20_000)
    other_N[:1000] += 3
    a, c = (table(20_000, time_N=each.astype(np.float32)) for each in (time_N, other_N))
    assert seed_spread(a, [c]) == pytest.approx(0.3, rel=0.1)
    assert seed_spread(a, []) == 0
