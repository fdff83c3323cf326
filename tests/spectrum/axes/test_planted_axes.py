"""Planted worlds: larger models learn the same earlier, or learn other tokens.

Shapes: N tokens, P points, R resamples.
"""

import numpy as np
import planted_axes
import pytest
from planted_axes import World

from megatron_tokscale.core.errors import UndefinedError
from megatron_tokscale.results.axis import Top
from megatron_tokscale.results.verdict import Verdict
from megatron_tokscale.spectrum.axes.groups import predict_groups
from megatron_tokscale.spectrum.axes.tops import choose_top, highest_first


@pytest.fixture(scope="module")
def earlier():
    return World.draw(5, kappa=1.0).measured()


@pytest.fixture(scope="module")
def others():
    return World.draw(5, kappa=0.0, missing=0.2).measured()


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
    world = World.draw(5, kappa=1.0)
    first, *_, last = np.flatnonzero(world.points.x_P == world.points.x_P.max())
    measured = world.groups().loss_RCP[0, :, first] - world.groups().loss_RCP[0, :, last]
    groups = earlier.groups["time"].groups
    gains = np.array([each.earlier.uncorrected + each.never.uncorrected for each in groups])
    assert np.abs(gains - measured).max() < 0.15
    assert measured.max() > 2 and measured[-1] < 0.2
    # All learn the same: the part that is never learned is 0 in every group.
    assert sum(each.never.low <= 0 <= each.never.high for each in groups) >= 8


def test_a_model_without_shift_and_floor_is_the_null_model():
    world = World.draw(4, kappa=0.5, missing=0.1)
    fitted = world.fitted()
    for model in fitted.without:
        object.__setattr__(model, "kappa", 0.0)
        model.floor_C[:] = 0
    prediction = predict_groups(fitted, world.groups())
    # The null model reads the largest run at its last probe; so does the prediction.
    assert prediction.skill.documents.uncorrected == pytest.approx(0, abs=1e-12)
    assert prediction.error == pytest.approx(prediction.null_error)


def test_a_mixed_world_is_divided_as_it_was_planted():
    world = World.draw(6, kappa=0.5, missing=0.1)
    shift = world.measured()
    truth = planted_axes.true_share(world.tokens, 0.5, 0.1, points=9)
    assert shift.share.both.value == pytest.approx(truth, abs=0.1)
    assert np.isnan(shift.seed_noise)


def test_an_unknown_top_is_the_first_loss_where_the_curves_begin_on_it():
    world = World.draw(5, kappa=0.0, missing=0.2)
    mean_P = world.loss_NP.mean(axis=0)
    assert choose_top(world.points, mean_P) is Top.FIRST
    first = world.points.x_P == world.points.x_P.min()
    assert highest_first(world.points, mean_P[None])[0] == mean_P[first].max()


def test_one_group_is_no_prediction():
    world = World.draw(4, kappa=0.5)
    curves = world.groups()
    curves.share_RC[:, 1:] = 0
    with pytest.raises(UndefinedError, match="one group holds all tokens"):
        predict_groups(world.fitted(), curves)


def test_sizes_without_a_gain_have_no_share():
    shift = World.draw(5, kappa=0.0).measured()
    assert shift.gain.both.low < 0 < shift.gain.both.high
    assert np.isnan(shift.share.both.value)
    assert shift.earlier_test.verdict is Verdict.UNDECIDED
    assert "it has no parts" in shift.earlier_test.estimate.undefined
