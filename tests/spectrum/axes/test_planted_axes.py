"""Planted worlds: larger models learn the same earlier, or learn other tokens.

Shapes: N tokens, P points, R resamples.
"""

import numpy as np
import planted_axes
import pytest

from megatron_tokscale.core.errors import UndefinedError
from megatron_tokscale.results.axis import Top
from megatron_tokscale.results.verdict import Verdict
from megatron_tokscale.spectrum.axes.curves import Points
from megatron_tokscale.spectrum.axes.groups import GroupCurves, corrected, predict_groups
from megatron_tokscale.spectrum.axes.measured import Curves, Fitted, measure_shift
from megatron_tokscale.spectrum.axes.tops import choose_top, highest_first
from megatron_tokscale.spectrum.groups import deciles

N_TOKENS, DOCUMENTS, RESAMPLES = 2000, 50, 20


class World:
    """Runs of a planted world, with their tokens, curves and groups by true learning time."""

    def __init__(self, sizes, kappa, missing, seed=0):
        rng = np.random.default_rng(seed)
        self.tokens = planted_axes.Tokens.draw(N_TOKENS, rng)
        x, u = planted_axes.clock(), planted_axes.log_sizes(sizes)
        loss = [self.tokens.losses(x, v, rng, kappa=kappa, missing=missing) for v in u]
        self.points = Points.of_runs([x[1:]] * len(u), u)
        self.loss_NP = np.concatenate([run[:, 1:] for run in loss], axis=1).astype(float)
        self.top_N = np.mean([run[:, 0] for run in loss], axis=0)
        drawn = rng.poisson(1, (RESAMPLES, DOCUMENTS)).astype(float)
        self.weight_RN = np.concatenate([np.ones((1, DOCUMENTS)), drawn])[
            :, np.arange(N_TOKENS) % DOCUMENTS
        ]

    def means(self, group_N, groups):
        count = np.stack([self.weight_RN[:, group_N == g].sum(axis=1) for g in range(groups)], 1)
        chosen = [group_N == g for g in range(groups)]
        loss = np.stack([self.weight_RN[:, g] @ self.loss_NP[g] for g in chosen], 1)
        top = np.stack([self.weight_RN[:, g] @ self.top_N[g] for g in chosen], 1)
        return count, loss / count[:, :, None], top / count

    def fitted(self):
        _, loss, top = self.means(np.zeros(N_TOKENS, int), 1)
        return Fitted.of(Curves(self.points, loss[:, 0], top[:, 0], Top.BEFORE))

    def groups(self):
        groups = deciles(self.tokens.midpoint_N)
        count, loss, top = self.means(groups.group_N, len(groups.names))
        return GroupCurves(groups.names, count / count.sum(axis=1, keepdims=True), loss, top)

    def measured(self):
        fitted = self.fitted()
        found = corrected({"time": predict_groups(fitted, self.groups())})
        names = [f"m{i}" for i in range(self.points.n_runs)]
        return measure_shift(fitted, names, found)


@pytest.fixture(scope="module")
def earlier():
    return World(5, kappa=1.0, missing=0.0).measured()


@pytest.fixture(scope="module")
def others():
    return World(5, kappa=0.0, missing=0.2).measured()


def test_a_world_that_learns_the_same_earlier(earlier):
    assert earlier.kappa.both.low < 1 < earlier.kappa.both.high
    assert earlier.kappa.both.high - earlier.kappa.both.low < 0.2
    assert earlier.share.both.value == pytest.approx(1, abs=0.1)
    assert earlier.earlier_test.verdict is Verdict.HOLDS
    assert earlier.errors.last_r2.value > 0.95
    late = [run.delta.value for run in earlier.runs]
    assert late == pytest.approx(-planted_axes.log_sizes(5), abs=0.15)


def test_a_world_that_learns_other_tokens(others):
    assert others.kappa.both.value == pytest.approx(0, abs=0.05)
    assert others.share.both.value == pytest.approx(0, abs=0.1)
    assert others.earlier_test.verdict is Verdict.FAILS
    assert others.errors.last_r2.value > 0.9
    assert others.errors.plain_shift > 3 * others.errors.shift_and_floor


def test_groups_by_learning_time_gain_as_the_shift_predicts(earlier):
    prediction = earlier.groups["time"]
    assert prediction.skill.both.value > 0.8
    assert prediction.test.verdict is Verdict.HOLDS
    assert prediction.error < prediction.null_error


def test_the_parts_of_each_group_add_up_to_its_measured_gain(earlier):
    world = World(5, kappa=1.0, missing=0.0)
    first, *_, last = np.flatnonzero(world.points.x_P == world.points.x_P.max())
    measured = world.groups().loss_RCP[0, :, first] - world.groups().loss_RCP[0, :, last]
    groups = earlier.groups["time"].groups
    gains = np.array([each.earlier.uncorrected + each.never.uncorrected for each in groups])
    assert np.abs(gains - measured).max() < 0.15
    assert measured.max() > 2 and measured[-1] < 0.2
    # All learn the same: the part that is never learned is 0 in every group.
    assert sum(each.never.low <= 0 <= each.never.high for each in groups) >= 8


def test_a_model_without_shift_and_floor_is_the_null_model():
    world = World(4, kappa=0.5, missing=0.1)
    fitted = world.fitted()
    for model in fitted.without:
        object.__setattr__(model, "kappa", 0.0)
        model.floor_C[:] = 0
    prediction = predict_groups(fitted, world.groups())
    # The null model reads the largest run at its last probe; so does the prediction.
    assert prediction.skill.documents.uncorrected == pytest.approx(0, abs=1e-12)
    assert prediction.error == pytest.approx(prediction.null_error)


def test_a_mixed_world_is_divided_as_it_was_planted():
    world = World(6, kappa=0.5, missing=0.1)
    shift = world.measured()
    truth = planted_axes.true_share(world.tokens, 0.5, 0.1, points=9)
    assert shift.share.both.value == pytest.approx(truth, abs=0.1)
    assert np.isnan(shift.seed_noise)


def test_an_unknown_top_is_the_first_loss_where_the_curves_begin_on_it():
    world = World(5, kappa=0.0, missing=0.2)
    mean_P = world.loss_NP.mean(axis=0)
    assert choose_top(world.points, mean_P) is Top.FIRST
    first = world.points.x_P == world.points.x_P.min()
    assert highest_first(world.points, mean_P[None])[0] == mean_P[first].max()


def test_one_group_is_no_prediction():
    world = World(4, kappa=0.5, missing=0.0)
    curves = world.groups()
    curves.share_RC[:, 1:] = 0
    with pytest.raises(UndefinedError, match="one group holds all tokens"):
        predict_groups(world.fitted(), curves)
