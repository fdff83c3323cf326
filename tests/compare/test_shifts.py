"""Factors by which a run is sooner: against brute force, closed forms and Student's t.

Shapes: N tokens, K probe steps, G groups, R resamples.
"""

import numpy as np
import pytest
from scipy import stats
from token_tables import table

from megatron_tokscale.compare.shifts import (
    LEAST_TOKENS,
    MARGIN,
    WIDEST,
    as_factors,
    comparable,
    median_sooner,
    sooner_at_loss,
)
from megatron_tokscale.core.resampling import Units
from megatron_tokscale.results.comparison import NO_SECOND_SEED
from megatron_tokscale.results.estimate import Undefined
from megatron_tokscale.spectrum.groups import Groups


def timed(rng, time_N, drop_N=None):
    drop_N = rng.uniform(1, 5, len(time_N)) if drop_N is None else drop_N
    return table(len(time_N), time_N=np.float32(time_N), drop_N=np.float32(drop_N))


def test_median_is_that_of_a_list_in_which_tokens_are_repeated():
    rng = np.random.default_rng(0)
    n_tokens = 400
    document_N = np.arange(n_tokens) // 20
    units = Units.from_documents(np.zeros(n_tokens, int), document_N, seed=0)
    weight_RU = units.weights(6, seed=0)
    drop_N = rng.integers(1, 4, n_tokens).astype(float)
    a = timed(rng, rng.uniform(2, 5, n_tokens), drop_N)
    b = timed(rng, a.time_N - 0.1 + 0.3 * rng.standard_normal(n_tokens), drop_N)
    groups = Groups(np.arange(n_tokens) % 2, ("even", "odd"))
    median_RG, count_G = median_sooner(a, b, np.ones(n_tokens, bool), groups, units, weight_RU)
    assert count_G.tolist() == [200, 200]
    earlier_N = (a.time_N - b.time_N).astype(float)
    for r, weight_U in enumerate(weight_RU):
        for g in range(2):
            repeats = (weight_U[document_N] * drop_N).astype(int) * (groups.group_N == g)
            listed = np.sort(np.repeat(earlier_N, repeats))
            assert median_RG[r, g] == listed[(len(listed) - 1) // 2]


def test_group_of_few_tokens_has_no_median():
    rng = np.random.default_rng(0)
    n_tokens = LEAST_TOKENS - 1
    units = Units.from_documents(np.zeros(n_tokens, int), np.arange(n_tokens), seed=0)
    run = timed(rng, np.full(n_tokens, 3.0))
    groups = Groups(np.zeros(n_tokens, int), ("all",))
    every = np.ones(n_tokens, bool)
    assert np.isnan(median_sooner(run, run, every, groups, units, np.ones((1, n_tokens)))[0])
    (found,) = as_factors(np.array([n_tokens]), np.full((3, 1), np.nan), [], "too few")
    assert found.factor == Undefined("too few")


def test_choice_of_tokens_does_not_move_the_median():
    rng = np.random.default_rng(0)
    n_tokens, end, shift = 200_000, 6.0, 0.3
    time_N = rng.uniform(1, 8, n_tokens)  # many tokens around the end, where a choice could bias
    a = timed(rng, time_N + 0.2 * rng.standard_normal(n_tokens))
    b = timed(rng, time_N - shift + 0.2 * rng.standard_normal(n_tokens))
    counted_N = comparable(a, b, 2.0, end)
    assert counted_N.sum() > 50_000
    assert ((a.time_N + b.time_N)[counted_N] / 2).max() <= end - MARGIN
    assert np.median((a.time_N - b.time_N)[counted_N]) == pytest.approx(shift, abs=0.005)


@pytest.mark.parametrize("shift", [0.4, -0.4])
def test_factor_at_the_late_loss_of_straight_curves_is_their_shift(shift):
    x_K, other_x_J = np.linspace(0, 6, 40), np.linspace(0, 6, 57)
    a, b = 9 - 1.3 * x_K, 9 - 1.3 * (other_x_J + shift)
    found = sooner_at_loss(a[None, None], x_K, b[None, None], other_x_J, 6.0)
    assert found[0, 0] == pytest.approx(shift)
    back = sooner_at_loss(b[None, None], other_x_J, a[None, None], x_K, 6.0)
    assert back[0, 0] == pytest.approx(-shift)


def test_factor_is_undefined_where_the_lower_run_was_never_above():
    x_K = np.linspace(0, 6, 40)
    a, b = np.full(40, 9.0), np.full(40, 3.0)
    assert np.isnan(sooner_at_loss(a[None, None], x_K, b[None, None], x_K, 6.0))


@pytest.mark.parametrize("n_noise", [1, 4])
def test_interval_over_seeds_is_students_prediction_interval(n_noise):
    seeds = np.linspace(-0.03, 0.08, n_noise)
    still = np.zeros((3, 1))
    (found,) = as_factors(np.array([100]), still + 0.2, [still + each for each in seeds], "")
    sample = np.array([0.0, *seeds])
    half = stats.t.ppf(0.975, n_noise) * sample.std(ddof=1) * np.sqrt(1 + 1 / len(sample))
    centre = 0.2 - sample.mean()
    assert np.log([found.recipe.value, found.recipe.low, found.recipe.high]) == pytest.approx(
        [centre, centre - half, centre + half]
    )
    assert found.seeds == pytest.approx(np.exp(seeds))


@pytest.mark.parametrize("n_noise", [1, 2])
@pytest.mark.parametrize("seeds_sd", [0.02, 0.06])
def test_interval_over_documents_and_seeds_covers(n_noise, seeds_sd):
    """By Satterthwaite's degrees of freedom it would cover 88% with one noise run."""
    rng = np.random.default_rng(0)
    covered, trials, n_runs = 0, 2000, n_noise + 2
    for _ in range(trials):
        # Each run has an error over documents of its own, which the resamples show.
        drawn_RI = 0.02 * rng.standard_normal((60, n_runs))
        value_RI = np.concatenate([np.zeros((1, n_runs)), drawn_RI])
        value_RI += (0.02**2 + seeds_sd**2) ** 0.5 * rng.standard_normal(n_runs)
        against_RI = value_RI - value_RI[:, :1]
        seed_SR1 = [against_RI[:, i : i + 1] for i in range(2, n_runs)]
        (found,) = as_factors(np.array([100]), against_RI[:, 1:2], seed_SR1, "")
        # A factor that is not determined has an interval of 100 or more, which holds 1.
        covered += isinstance(found.recipe, Undefined) or found.recipe.low <= 1 <= found.recipe.high
    assert 0.94 < covered / trials <= 1


def test_group_takes_the_larger_spread_of_seeds_of_its_own_and_of_all_tokens():
    seeds = [np.array([[0.1, 0.001]] * 3)]
    _, group = as_factors(np.array([100, 50]), np.full((3, 2), 0.2), seeds, "")
    half = stats.t.ppf(0.975, 1) * 0.1 / np.sqrt(2) * np.sqrt(1.5)
    assert np.log(group.recipe.high / group.recipe.value) == pytest.approx(half)


@pytest.mark.parametrize(("apart", "determined"), [(0.1, True), (1.5, False)])
def test_factor_over_seeds_that_differ_much_is_not_determined(apart, determined):
    (found,) = as_factors(np.array([100]), np.full((3, 1), 0.2), [np.full((3, 1), apart)], "")
    ratio = np.exp(2 * stats.t.ppf(0.975, 1) * apart / np.sqrt(2) * np.sqrt(1.5))
    assert (ratio <= WIDEST) == determined
    assert isinstance(found.recipe, Undefined) != determined
    assert found.factor.value == pytest.approx(np.exp(0.2))  # of these two runs, it is known
    assert found.seeds == pytest.approx([np.exp(apart)])


def test_factor_over_documents_that_differ_much_is_not_determined():
    value_R = np.array([0.0, *np.linspace(-1, 1, 100) * np.log(WIDEST)])
    (found,) = as_factors(np.array([100]), value_R[:, None], [], "")
    assert "wider than a factor of 100" in found.factor.undefined


def test_without_noise_runs_the_interval_over_seeds_is_undecided():
    (found,) = as_factors(np.array([100]), np.full((3, 1), 0.2), [], "")
    assert found.recipe == NO_SECOND_SEED
