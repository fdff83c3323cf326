"""The surface of learning-time bins against loops, and in worlds with and without steps.

Shapes: N tokens, K probe steps, J intervals.
"""

from dataclasses import dataclass

import numpy as np
import planted_worlds
import pytest

from megatron_tokscale.core.errors import UndefinedError
from megatron_tokscale.core.resampling import Units
from megatron_tokscale.fit import SigmoidFits, fit_sigmoids
from megatron_tokscale.results.verdict import Verdict
from megatron_tokscale.spectrum.evidence.falls import OCTAVE, fall_weights, intervals
from megatron_tokscale.spectrum.evidence.surface import (
    BINS,
    FITS,
    MEASURED,
    Comparison,
    SurfaceSums,
    moving_times,
    time_bins,
)
from megatron_tokscale.spectrum.evidence.token_groups import groups_by_frequency


@dataclass
class Pair:
    """A planted pair and the sums of its surface."""

    x_K: np.ndarray
    losses: list
    fits: SigmoidFits
    bin_N: np.ndarray
    group_N: np.ndarray
    operator_KJ: np.ndarray
    units: Units
    sums: SurfaceSums


NOISE = planted_worlds.World(False, lambda text, x_K, rng: np.full((len(text), len(x_K)), 4.0))


def pair_of(world, tokens):
    rng = np.random.default_rng(0)
    text, x_K = planted_worlds.text_of(tokens, rng), planted_worlds.axis()
    losses = planted_worlds.seeds(world, text, x_K, rng)
    fits = fit_sigmoids(x_K, losses[0])
    operator_KJ = fall_weights(x_K, intervals(np.log(38), float(x_K[-1]), OCTAVE / 2))
    units = Units.from_documents(text.dataset_N, text.document_N, seed=0)
    bins, groups = (
        time_bins(moving_times(fits), x_K),
        groups_by_frequency(text.dataset_N, text.log_share_N),
    )
    sums = SurfaceSums(bins, groups, Comparison(x_K, x_K, operator_KJ), units)
    for at in (slice(0, tokens // 3), slice(tokens // 3, tokens)):
        sums.add(at, fits.rows(at), losses[0][at], losses[1][at])
    return Pair(x_K, losses, fits, bins.group_N, groups.group_N, operator_KJ, units, sums)


@pytest.fixture(scope="module")
def stepwise():
    return pair_of(planted_worlds.WORLDS["B1"], 3000)


def beyond_groups(fall_NJ, group_N):
    means = [fall_NJ[group_N == g].mean(axis=0) for g in range(group_N.max() + 1)]
    return fall_NJ - np.stack(means)[group_N]


def differences(pair, kept_N):
    """Return the differences of the surface from each prediction, by loops over some tokens.

    Every token of the null model has its group's mean curve, scaled to its own fall.
    """
    bin_N, group_N = pair.bin_N[kept_N], pair.group_N[kept_N]
    losses = [loss_NK[kept_N].astype(float) for loss_NK in pair.losses]
    source_NJ, target_NJ = (loss_NK @ pair.operator_KJ for loss_NK in losses)
    null_NJ = np.empty_like(source_NJ)
    curves = [source_NJ[group_N == g].mean(axis=0) for g in range(group_N.max() + 1)]
    for n, g in enumerate(group_N):
        null_NJ[n] = source_NJ[n].sum() * curves[g] / curves[g].sum()
    fits = pair.fits.rows(kept_N)
    fitted_NJ = fits.predict(np.maximum(pair.x_K, -1e6)) @ pair.operator_KJ
    predictions = {
        "null": null_NJ,
        "nothing": target_NJ * 0,
        MEASURED: source_NJ,
        FITS: fitted_NJ,
    }
    target_NJ = beyond_groups(target_NJ, group_N)
    found = {name: [] for name in predictions}
    for name, fall_NJ in predictions.items():
        away_NJ = target_NJ - beyond_groups(fall_NJ, group_N)
        for b in range(BINS + 1):
            inside_N = bin_N == b
            mean_J = away_NJ[inside_N].mean(axis=0) if inside_N.any() else away_NJ[0] * 0
            found[name].append(np.sqrt(inside_N.mean()) * mean_J)
    return {name: np.concatenate(parts) for name, parts in found.items()}


def test_the_skills_are_those_of_loops_over_tokens(stepwise):
    """The noise of the squares is a jackknife over documents."""
    pair = stepwise
    whole = differences(pair, np.ones(len(pair.bin_N), bool))
    unit_N = pair.units.unit_N
    without = [differences(pair, unit_N != unit) for unit in range(len(pair.units))]
    uncorrected = {name: each @ each for name, each in whole.items()}
    corrected = {}
    for name, square in uncorrected.items():
        left_UC = np.stack([each[name] for each in without])
        error = ((left_UC - left_UC.mean(axis=0)) ** 2).sum() * (1 - 1 / len(pair.units))
        corrected[name] = square - error
    found = pair.sums.result()
    for name in (MEASURED, FITS):
        estimate = found.tests[name].estimate
        for squares, value in ((uncorrected, estimate.uncorrected), (corrected, estimate.value)):
            np.testing.assert_allclose(value, 1 - squares[name] / squares["null"], atol=1e-4)
    explained = 1 - corrected["null"] / corrected["nothing"]
    np.testing.assert_allclose(found.null, explained, atol=1e-4)


def test_bins_of_learning_time_are_as_wide_as_each_other():
    """Tokens without a learning time are the last bin; the range starts after step 0."""
    time_N = np.concatenate([np.random.default_rng(0).uniform(1, 6, 400), [1.0, 6.0, np.nan]])
    groups = time_bins(time_N, np.array([-np.inf, 1.0, 2.0, 6.0]))
    assert len(groups.names) == BINS + 1
    assert groups.group_N[-3:].tolist() == [0, BINS - 1, BINS]
    width = 5 / BINS
    np.testing.assert_array_equal(groups.group_N[:400], np.floor((time_N[:400] - 1) / width))


def test_few_tokens_with_a_learning_time_have_no_surface():
    time_N = np.concatenate([np.linspace(0, 5, 150), np.full(1000, np.nan)])
    with pytest.raises(UndefinedError, match="150 tokens fall in the other run; expected at least"):
        time_bins(time_N, np.linspace(0, 5, 20))


@pytest.mark.parametrize("world", ["A1", "B1"])
def test_where_tokens_fall_in_steps_every_prediction_says_more(world):
    pair = pair_of(planted_worlds.WORLDS[world], 3000)
    found = pair.sums.result()
    assert {test.verdict for test in found.tests.values()} == {Verdict.HOLDS}
    assert found.tests[MEASURED].estimate.value > found.tests[FITS].estimate.value > 0.8


@pytest.mark.parametrize("world", ["C", "D"])
def test_without_steps_no_prediction_says_more(world):
    pair = pair_of(planted_worlds.WORLDS[world], 6000)
    found = pair.sums.result()
    assert {test.verdict for test in found.tests.values()} == {Verdict.FAILS}


def test_noise_has_no_surface():
    """The tokens that seem to fall rise as often: there is no fall of the mean to predict."""
    pair = pair_of(NOISE, 40_000)
    with pytest.raises(UndefinedError, match=r"the mean loss of the other run falls by .* nats"):
        pair.sums.result()
