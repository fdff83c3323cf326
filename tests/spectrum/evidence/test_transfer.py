"""Transfer between runs: the null model in closed form, the alignments, and planted pairs.

Shapes: N tokens, K probe steps, U units.
"""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import planted_pairs
import pytest
from scipy.special import expit

from megatron_tokscale.core.errors import UndefinedError
from megatron_tokscale.fit import fit_sigmoids
from megatron_tokscale.results.estimate import Undefined
from megatron_tokscale.results.verdict import Verdict
from megatron_tokscale.spectrum import SlopeEstimator, Units, events_of
from megatron_tokscale.spectrum.density import default_grid
from megatron_tokscale.spectrum.evidence.transfer import (
    _DROP_EDGES,
    Alignment,
    TransferSums,
    corrected,
)
from megatron_tokscale.spectrum.groups import Groups, groupings
from megatron_tokscale.store import WatchedTokens


@pytest.fixture(scope="module")
def pair():
    """A genuine pair: (text, x_K, losses of A, of B, fits of A, units)."""
    rng = np.random.default_rng(0)
    x_K, text = planted_pairs.axis(), planted_pairs.text_of(30, rng)
    loss_NK, again_NK = planted_pairs.genuine(text, x_K, rng)
    tokens = text.probe_set
    units = Units.from_documents(tokens.dataset_N, tokens.document_N, seed=0)
    return text, x_K, loss_NK, again_NK, fit_sigmoids(x_K, loss_NK), units


def result_of(pair, alignment=None, cuts=(), n_resamples=50):
    text, x_K, loss_NK, again_NK, fits, units = pair
    sums = TransferSums(
        alignment or Alignment.absolute(x_K, again_NK.mean(axis=0)),
        groupings(WatchedTokens(text.probe_set)),
        units,
    )
    own = fit_sigmoids(x_K, again_NK)
    ends = [0, *cuts, len(text)]
    for start, stop in pairwise(ends):
        at = slice(start, stop)
        sums.add(at, fits.rows(at), again_NK[at], loss_NK[at], own.rows(at), x_K)
    return sums.tests(units.weights(n_resamples, seed=0), seed=0)


def skill_of(prediction_NK, measured_NK, group_N, operator_KX):
    """Return the skill by its definition."""
    measured_NX, predicted_NX = measured_NK @ operator_KX, prediction_NK @ operator_KX
    miss = spread = 0.0
    for g in np.unique(group_N):
        own = group_N == g
        measured = measured_NX[own].mean(axis=0) - measured_NX.mean(axis=0)
        predicted = predicted_NX[own].mean(axis=0) - predicted_NX.mean(axis=0)
        miss += own.sum() * ((measured - predicted) ** 2).sum()
        spread += own.sum() * (measured**2).sum()
    return 1 - miss / spread


def curves_of(events, x_K, n_tokens, order=slice(None)):
    """Return every token's sum of drop * s, with the times in another order."""
    s_EK = expit((events.midpoint_E[order, None] - x_K) / events.width_E[order, None])
    curve_NK = np.zeros((n_tokens, len(x_K)))
    np.add.at(curve_NK, events.token_E, events.drop_E[:, None] * s_EK)
    return curve_NK


def slope_weights(x_K, loss_NK):
    """Return the matrix from losses to slopes, as measured on the mean loss of B."""
    slopes = SlopeEstimator.from_curve(x_K, loss_NK.mean(axis=0))
    return slopes.weights(default_grid(x_K)).T


def shuffled(events, rng):
    """Permute the events among those of about the same drop, in a loop."""
    order = np.arange(len(events.drop_E))
    drop_bin = np.searchsorted(_DROP_EDGES, events.drop_E)
    for each in np.unique(drop_bin):
        own = np.flatnonzero(drop_bin == each)
        order[own] = rng.permutation(own)
    return order


@pytest.mark.parametrize("grouping", ["dataset", "frequency decile", "document"])
def test_skills_agree_with_their_definition(pair, grouping):
    text, x_K, loss_NK, again_NK, fits, units = pair
    weights_KX = slope_weights(x_K, again_NK)
    groups = groupings(WatchedTokens(text.probe_set))
    group_N = units.unit_N if grouping == "document" else groups[grouping].group_N
    found = result_of(pair)[grouping]
    x_K = np.maximum(x_K, -1e6)
    for name, prediction_NK in {
        "events": curves_of(events_of(fits), x_K, len(text)),
        "full": fits.predict(x_K),
        "own": curves_of(events_of(fit_sigmoids(pair[1], again_NK)), x_K, len(text)),
    }.items():
        expected = skill_of(prediction_NK, again_NK.astype(float), group_N, weights_KX)
        np.testing.assert_allclose(getattr(found, name).uncorrected, expected, atol=1e-4)
    source = skill_of(loss_NK.astype(float), again_NK.astype(float), group_N, weights_KX)
    np.testing.assert_allclose(found.source.uncorrected, source, atol=1e-3)


def test_the_null_model_is_the_mean_over_real_permutations(pair):
    """Permute events within bins of drop, and average every group's predicted curve."""
    text, x_K, _, again_NK, fits, _ = pair
    weights_KX = slope_weights(x_K, again_NK)
    x_K = np.maximum(x_K, -1e6)
    rng = np.random.default_rng(1)
    events = events_of(fits)
    drawn = [curves_of(events, x_K, len(text), shuffled(events, rng)) for _ in range(400)]
    group_N = groupings(WatchedTokens(text.probe_set))["frequency decile"].group_N
    expected = skill_of(np.mean(drawn, axis=0), again_NK.astype(float), group_N, weights_KX)
    found = result_of(pair)["frequency decile"].permuted.uncorrected
    np.testing.assert_allclose(found, expected, atol=5e-3)


def test_the_p_value_is_the_share_of_real_permutations():
    """Take so few tokens with so similar times that permutations often have as much skill."""
    rng = np.random.default_rng(2)
    x_K, text = planted_pairs.axis(), planted_pairs.text_of(6, rng)
    loss_NK, again_NK = planted_pairs.permuted(text, x_K, rng)
    fits, tokens = fit_sigmoids(x_K, loss_NK), text.probe_set
    units = Units.from_documents(tokens.dataset_N, tokens.document_N, seed=0)
    small = text, x_K, loss_NK, again_NK, fits, units
    found = result_of(small, n_resamples=2)["document"].p_value
    weights_KX = slope_weights(x_K, again_NK)
    x_K, events = np.maximum(x_K, -1e6), events_of(fits)
    skills = [
        skill_of(
            curves_of(events, x_K, len(text), order),
            again_NK.astype(float),
            units.unit_N,
            weights_KX,
        )
        for order in (slice(None), *(shuffled(events, rng) for _ in range(400)))
    ]
    np.testing.assert_allclose(found, np.mean(np.array(skills) >= skills[0]), atol=0.12)


def test_sums_do_not_depend_on_the_cuts_between_blocks(pair):
    whole, cut = result_of(pair), result_of(pair, cuts=(1, 200, 201))
    for grouping, each in whole.items():
        assert each.p_value == cut[grouping].p_value
        for name in ("events", "permuted", "full", "source", "own"):
            np.testing.assert_allclose(
                getattr(each, name).value,
                getattr(cut[grouping], name).value,
                rtol=1e-5,
                atol=1e-6,
            )


def test_alignment_by_loss_finds_the_same_run_with_its_time_stretched():
    """B's x is A's, stretched by a half and moved: the order alone is tested."""
    rng = np.random.default_rng(3)
    x_K, text = planted_pairs.axis(), planted_pairs.text_of(30, rng)
    shape_NK = planted_pairs.local_shape(x_K, planted_pairs.times(text), rng)
    loss_NK = planted_pairs.losses(text, shape_NK, rng, noise=0.02)
    mean_K, tokens = loss_NK.mean(axis=0, dtype=float), text.probe_set
    alignment = Alignment.by_loss(x_K, mean_K, 1.5 * x_K + 2, mean_K)
    lowest = mean_K[1:] <= np.minimum.accumulate(mean_K[1:])
    np.testing.assert_allclose(alignment.x_K[1:][lowest], x_K[1:][lowest], atol=1e-9)
    units = Units.from_documents(tokens.dataset_N, tokens.document_N, seed=0)
    sums = TransferSums(alignment, groupings(WatchedTokens(tokens)), units)
    sums.add(slice(0, len(text)), fit_sigmoids(x_K, loss_NK), loss_NK)
    for name, each in sums.tests(units.weights(50, seed=0), seed=0).items():
        assert each.events.value > 0.9, name


def test_alignment_by_loss_leaves_out_losses_that_the_other_run_never_had():
    x_K = np.array([-np.inf, *np.linspace(0, 8, 41)])
    loss_K = np.concatenate([[8.0], 8 - np.linspace(0, 8, 41) / 2])
    deeper_K = loss_K * 1.5 - 4
    alignment = Alignment.by_loss(x_K, loss_K, x_K, deeper_K)
    outside = deeper_K < loss_K[-1] - 1e-9
    assert outside.any()
    assert not alignment.operator_KX[outside].any()
    with pytest.raises(UndefinedError):
        Alignment.by_loss(x_K, loss_K, x_K, loss_K - 100)


def test_one_group_has_no_skill(pair):
    text, x_K, _, again_NK, fits, units = pair
    sums = TransferSums(
        Alignment.absolute(x_K, again_NK.mean(axis=0)),
        {"all": Groups(np.zeros(len(text), int), ("all",))},
        units,
    )
    sums.add(slice(0, len(text)), fits, again_NK)
    found = sums.tests(units.weights(20, seed=0), seed=0)["all"]
    assert found.test.verdict is Verdict.UNDECIDED
    assert np.isnan([found.p_value, found.events.value]).all()


def test_times_of_documents_that_agree_hold_and_permuted_ones_do_not(pair):
    holds = result_of(pair, n_resamples=200)
    assert holds["document"].test.verdict is Verdict.HOLDS
    text, x_K, _, _, _, units = pair
    loss_NK, again_NK = planted_pairs.permuted(text, x_K, np.random.default_rng(1))
    other = text, x_K, loss_NK, again_NK, fit_sigmoids(x_K, loss_NK), units
    found = [each.test for each in result_of(other, n_resamples=200).values() if each.test]
    assert len(found) == 3
    assert all(test.verdict is not Verdict.HOLDS for test in found)


def test_frequency_deciles_have_skills_and_no_test(pair):
    found = result_of(pair)["frequency decile"]
    assert found.test is None
    assert found.gain_over_permuted.has_interval


def test_runs_that_learn_in_one_order_agree_where_their_losses_do():
    """Run B is six times as late: at the same time its groups do not fall as predicted."""
    rng = np.random.default_rng(5)
    x_K, text = planted_pairs.axis(), planted_pairs.text_of(40, rng)
    loss_NK, again_NK = planted_pairs.later(text, x_K, rng)
    tokens = text.probe_set
    units = Units.from_documents(tokens.dataset_N, tokens.document_N, seed=0)
    pair = text, x_K, loss_NK, again_NK, fit_sigmoids(x_K, loss_NK), units
    mean_K, again_K = loss_NK.mean(axis=0), again_NK.mean(axis=0)
    by_loss = result_of(pair, Alignment.by_loss(x_K, mean_K, x_K, again_K), n_resamples=200)
    absolute = result_of(pair, n_resamples=200)
    assert by_loss["document"].test.verdict is Verdict.HOLDS
    assert absolute["document"].test.verdict is not Verdict.HOLDS


def test_both_alignments_are_one_family(pair):
    """Holm's correction over six tests: the smallest p-value must be below a sixth of 5%."""
    tests = result_of(pair, n_resamples=200)
    p_values = {"dataset": 0.0084, "position decile": 0.6, "document": 0.02}
    family = [
        {
            name: replace(each, test=each.test and replace(each.test, p_value=p_values[name]))
            for name, each in tests.items()
        }
    ] * 2
    for each in corrected(family):
        verdicts = {name: row.test.verdict for name, row in each.items() if row.test}
        assert set(verdicts.values()) == {Verdict.UNDECIDED}
    reason = Undefined("no loss in common")
    alone, undefined = corrected([family[0], reason])
    assert undefined is reason
    assert alone["dataset"].test.verdict is tests["dataset"].test.verdict
