"""Left-out runs, the jackknife over runs, and the additive law. I runs, P points."""

import numpy as np
import pytest
from scipy import stats

from megatron_tokscale.results.estimate import Estimate
from megatron_tokscale.spectrum.axes.curves import Points
from megatron_tokscale.spectrum.axes.left_out import LeftOut, both_spreads, fit_additive

U = np.array([-3.0, -2.0, -1.0, -0.5, 0.0])
X = np.linspace(1, 6, 12)


def points():
    return Points.of_runs([X] * len(U), U)


def additive(x, u):
    return 1.5 + 0.4 * np.exp(-0.3 * u) + 2 * np.exp(-0.5 * x)


def test_the_jackknife_of_a_mean_is_students_interval():
    value = np.array([1.0, 2.0, 4.0, 3.5, 0.2])
    others = [np.delete(value, i).mean() for i in range(len(value))]
    found = Estimate.from_jackknife(value.mean(), np.array(others))
    low, high = stats.t.interval(0.95, len(value) - 1, value.mean(), stats.sem(value))
    assert (found.low, found.high) == pytest.approx((low, high))
    assert not Estimate.from_jackknife(1.0, np.array([1.0, np.nan, 1.0])).has_interval
    assert not Estimate.from_jackknife(1.0, np.array([])).has_interval
    assert Estimate.from_jackknife(0.9, np.array([0.5, 1.0, 0.7]), most=1).high == 1


def test_both_spreads_add_their_squares():
    both = both_spreads(Estimate(1.0, 0.7, 1.4), Estimate(1.1, 0.7, 1.4))
    assert (both.value, both.low, both.high) == pytest.approx((1.0, 0.5, 1.5))
    once = both_spreads(Estimate(1.0, 0.7, 1.4), Estimate(1.1, 0.7, 1.4), Estimate(1, 0.8, 1.39))
    assert (once.low, once.high) == pytest.approx((1 - np.sqrt(0.09 + 0.16 - 0.04), 1.4))
    assert not both_spreads(Estimate(1.0, 0.7, 1.4), Estimate(1.1)).has_interval
    assert both_spreads(Estimate(1.0), Estimate(1.1, 0.7, 1.4)).low == 0.7


def test_the_additive_law_predicts_runs_of_its_own_form():
    where = points()
    left_out = LeftOut.of(where, additive(where.x_P, where.u_P), fit_additive)
    assert left_out.error < 2e-3
    assert left_out.last_I == pytest.approx(additive(6.0, U), abs=5e-3)


def test_errors_on_left_out_runs_are_those_of_a_loop():
    rng = np.random.default_rng(0)
    where = points()
    loss_P = additive(where.x_P, where.u_P) + 0.1 * rng.standard_normal(len(where.x_P))

    def fit(rows, loss):
        a = np.polyfit(rows.x_P, loss, 1)
        return lambda x, u: np.polyval(a, x)

    found = LeftOut.of(where, loss_P, fit)
    errors, lasts = [], []
    for run in range(len(U)):
        mine = where.run_P == run
        line = stats.linregress(where.x_P[~mine], loss_P[~mine])
        predicted = line.intercept + line.slope * X
        errors.append(np.abs(predicted - loss_P[mine]).mean())
        lasts.append(predicted[-1] - loss_P[mine][-1])
    assert found.error == pytest.approx(np.mean(errors))
    assert found.last_I - found.measured_I == pytest.approx(lasts)
    spread = loss_P[where.x_P == 6]
    assert found.r2().uncorrected == pytest.approx(
        1 - np.sum(np.square(lasts)) / np.sum((spread - spread.mean()) ** 2)
    )
