"""The skill by its definition, with loops over groups.

Shapes: N tokens, K probe steps, G groups, U units, R resamples.
"""

import numpy as np
import pytest

from megatron_tokscale.spectrum import Units
from megatron_tokscale.spectrum.evidence.skill import DocumentGroups, GroupSums
from megatron_tokscale.spectrum.groups import Groups, deciles

N_TOKENS, N_PROBES, N_GROUPS, N_UNITS = 400, 6, 5, 20


@pytest.fixture
def curves():
    """Measured and predicted curves, groups that cut across documents, and their units."""
    rng = np.random.default_rng(0)
    measured_NK = rng.standard_normal((N_TOKENS, N_PROBES)).cumsum(axis=1)
    predicted_NK = measured_NK + rng.standard_normal((N_TOKENS, N_PROBES))
    group_N = rng.integers(0, N_GROUPS - 1, N_TOKENS)
    unit_N = np.sort(rng.integers(0, N_UNITS, N_TOKENS)).astype(np.int32)
    units = Units(unit_N, np.zeros(N_UNITS, np.int16), N_UNITS)
    return measured_NK, predicted_NK, Groups(group_N, tuple("abcde")), units


def filled(sums, measured_NK, predicted_NK):
    """Sums of the curves, added in two blocks."""
    for at in (slice(0, 150), slice(150, N_TOKENS)):
        cell_N = sums.cells(at)
        for name, values_NK in (
            ("tokens", np.ones((N_TOKENS, 1))),
            ("measured", measured_NK),
            ("events", predicted_NK),
        ):
            total_CK = np.zeros((sums.n_cells, values_NK.shape[1]))
            np.add.at(total_CK, cell_N, values_NK[at])
            sums.add(name, total_CK)
    return sums


def skill_by_loops(measured_NK, predicted_NK, group_N, weight_N):
    curves = measured_NK, predicted_NK
    everything = [np.average(each_NK, axis=0, weights=weight_N) for each_NK in curves]
    miss = spread = 0.0
    for g in np.unique(group_N):
        own = (group_N == g) & (weight_N > 0)
        if not own.any():
            continue
        measured_K, predicted_K = (
            np.average(each[own], axis=0, weights=weight_N[own]) - mean_K
            for each, mean_K in zip(curves, everything, strict=True)
        )
        share = weight_N[own].sum() / weight_N.sum()
        miss += share * ((measured_K - predicted_K) ** 2).sum()
        spread += share * (measured_K**2).sum()
    return 1 - miss / spread


def test_skill_of_groups_agrees_with_its_definition_in_every_resample(curves):
    measured_NK, predicted_NK, groups, units = curves
    operator_KX = np.random.default_rng(1).standard_normal((N_PROBES, 9))
    weight_RU = units.weights(4, seed=2)
    sums = filled(GroupSums(groups, units), measured_NK, predicted_NK)
    skill_R = sums.skill("events", "measured", weight_RU, operator_KX)
    for r, weight_U in enumerate(weight_RU):
        expected = skill_by_loops(
            measured_NK @ operator_KX,
            predicted_NK @ operator_KX,
            groups.group_N,
            weight_U[units.unit_N],
        )
        np.testing.assert_allclose(skill_R[r], expected, rtol=1e-9)


def test_skill_of_documents_agrees_with_its_definition(curves):
    measured_NK, predicted_NK, _, units = curves
    sums = filled(DocumentGroups(units), measured_NK, predicted_NK)
    skill_R = sums.skill("events", "measured", np.ones((1, N_UNITS)), np.eye(N_PROBES))
    expected = skill_by_loops(measured_NK, predicted_NK, units.unit_N, np.ones(N_TOKENS))
    np.testing.assert_allclose(skill_R, [expected], rtol=1e-9)


def test_documents_are_drawn_with_their_errors(curves):
    """A weight of w counts a document's error and spread w times, around the mean of the data."""
    measured_NK, predicted_NK, _, units = curves
    sums = filled(DocumentGroups(units), measured_NK, predicted_NK)
    weight_RU = units.weights(1, seed=3)
    skill_R = sums.skill("events", "measured", weight_RU, np.eye(N_PROBES))
    miss = spread = 0.0
    for u, weight in enumerate(weight_RU[1]):
        own = units.unit_N == u
        measured_K = measured_NK[own].mean(axis=0) - measured_NK.mean(axis=0)
        predicted_K = predicted_NK[own].mean(axis=0) - predicted_NK.mean(axis=0)
        miss += weight * own.sum() * ((measured_K - predicted_K) ** 2).sum()
        spread += weight * own.sum() * (measured_K**2).sum()
    np.testing.assert_allclose(skill_R[1], 1 - miss / spread, rtol=1e-9)


def test_a_perfect_prediction_has_skill_one_and_one_curve_for_all_groups_zero(curves):
    measured_NK, _, groups, units = curves
    mean_NK = np.broadcast_to(measured_NK.mean(axis=0), measured_NK.shape)
    for predicted_NK, expected in ((measured_NK, 1.0), (mean_NK, 0.0)):
        sums = filled(GroupSums(groups, units), measured_NK, predicted_NK)
        skill_R = sums.skill("events", "measured", np.ones((1, N_UNITS)), np.eye(N_PROBES))
        np.testing.assert_allclose(skill_R, [expected], atol=1e-12)


def test_deciles_are_equal_and_keep_ties_and_missing_values_together():
    value_N = np.concatenate([np.arange(1000.0), np.full(100, np.nan)])
    groups = deciles(value_N)
    assert np.bincount(groups.group_N).tolist() == [100] * 11
    assert groups.names[-1] == "none"
    tied = deciles(np.repeat([1.0, 2.0, 3.0], 100))
    assert len(np.unique(tied.group_N)) == 3
    assert all(len(set(tied.group_N[i : i + 100])) == 1 for i in (0, 100, 200))
