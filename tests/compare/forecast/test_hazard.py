"""Hazards against scipy's fits of censored data, and the falls that they foretell.

Shapes: N tokens, E events, K probes, G groups, H horizons.
"""

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy.integrate import quad
from scipy.special import expit
from scipy.stats import CensoredData, ecdf, expon

from megatron_tokscale.compare.forecast.hazard import Census
from megatron_tokscale.core.errors import UndefinedError
from megatron_tokscale.fit import fit_sigmoids
from megatron_tokscale.results.forecast import FACTORS
from megatron_tokscale.spectrum.events import Events
from megatron_tokscale.spectrum.groups import Groups

HAZARD, DROP, BEFORE, SPAN = 0.6, 3.0, 5.0, 2.0
ONE = np.ones((1, 1))


def census(midpoint_N, origin, group_N=None, names=("all",), width=0.02):
    """Tokens that fall by `DROP` at their midpoints; those behind the origin wait."""
    n = len(midpoint_N)
    fallen_E = np.flatnonzero(midpoint_N <= origin)
    shape_E = np.ones(len(fallen_E))
    return Census(
        origin=origin,
        span=SPAN,
        groups=Groups(np.zeros(n, np.int64) if group_N is None else group_N, names),
        remainder_NH=np.zeros((n, len(FACTORS))),
        waiting_N=np.where(midpoint_N > origin, BEFORE, 0.0),
        events=Events(fallen_E, DROP * shape_E, midpoint_N[fallen_E], 0.02 * shape_E, shape_E < 0),
        before_E=BEFORE * shape_E,
        width_W=np.array([width]),
    )


def units(n):
    return np.zeros(n, np.int64)


def test_the_hazard_is_the_exponential_rate_that_scipy_fits_to_censored_times():
    rng = np.random.default_rng(0)
    time_N = rng.exponential(1 / HAZARD, 3000)
    found = census(1 + time_N, 1 + SPAN).rates(units(3000), ONE)
    data = CensoredData(
        uncensored=time_N[time_N <= SPAN], right=np.full((time_N > SPAN).sum(), SPAN)
    )
    _, scale = expon.fit(data, floc=0)
    closed_form = (time_N <= SPAN).sum() / np.minimum(time_N, SPAN).sum()
    for hazard in (found.hazard_RG[0, 0], found.pooled_R[0]):
        assert hazard == pytest.approx(closed_form, rel=1e-9)
        assert hazard == pytest.approx(1 / scale, rel=1e-3)  # scipy's search ends there
    assert found.share_RG[0, 0] == pytest.approx(DROP / BEFORE)


def test_events_before_the_counted_octaves_are_not_counted():
    rng = np.random.default_rng(1)
    time_N = rng.exponential(1 / HAZARD, 3000)
    earlier_N = np.concatenate([1 + time_N, np.full(500, 0.5)])
    with_earlier, without = (
        census(each_N, 1 + SPAN).rates(units(len(each_N)), ONE)
        for each_N in (earlier_N, 1 + time_N)
    )
    assert with_earlier.hazard_RG == pytest.approx(without.hazard_RG)


def test_the_forecast_of_exponential_times_is_kaplan_and_meiers_later_survival():
    rng = np.random.default_rng(2)
    time_N = rng.exponential(1 / HAZARD, 40_000)
    found = census(1 + time_N, 1 + SPAN).rates(units(40_000), ONE)
    later = ecdf(CensoredData(uncensored=time_N)).sf
    came_H = [1 - later.evaluate(SPAN + math.log(each)) / later.evaluate(SPAN) for each in FACTORS]
    np.testing.assert_allclose(found.fallen_RGH[0, 0], came_H, atol=0.02)


@pytest.mark.parametrize("width", [0.05, 0.5])
def test_a_later_drop_takes_the_time_of_its_sigmoid(width):
    rng = np.random.default_rng(3)
    time_N = rng.exponential(1 / HAZARD, 500)
    found = census(1 + time_N, 1 + SPAN, width=width).rates(units(500), ONE)
    hazard = float(found.hazard_RG[0, 0])
    for h, factor in enumerate(FACTORS):

        def rate(u, factor=factor):
            begun, done = expit(u / width), expit((u - math.log(factor)) / width)
            return hazard * math.exp(-hazard * u) * (begun - done)

        expected = quad(rate, 0, 6, points=[math.log(factor)], limit=200)[0]
        assert found.fallen_RGH[0, 0, h] == pytest.approx(expected, rel=2e-3)


def test_small_groups_have_the_hazard_of_all_tokens_and_large_ones_their_own():
    rng = np.random.default_rng(4)
    hazard_G = np.array([1.2, 0.3])
    group_N = np.repeat(np.arange(3), [6000, 6000, 3])
    time_N = np.concatenate([rng.exponential(1 / hazard_G[group_N[:-3]]), [0.1, 0.2, 0.3]])
    found = census(1 + time_N, 1 + SPAN, group_N, ("a", "b", "c")).rates(units(12_003), ONE)
    assert found.hazard_RG[0, :2] == pytest.approx(hazard_G, rel=0.06)
    own, pooled = 3 / 0.6, found.pooled_R[0]  # three events in a time at risk of 0.6
    expected = (3 * own + 20 * pooled) / 23
    assert found.hazard_RG[0, 2] == pytest.approx(expected)


def test_a_group_without_events_has_the_share_of_all_tokens_and_at_most_their_hazard():
    rng = np.random.default_rng(5)
    time_N = np.concatenate([rng.exponential(1 / HAZARD, 2000), np.full(50, 99.0)])
    group_N = np.repeat([0, 1], [2000, 50])
    found = census(1 + time_N, 1 + SPAN, group_N, ("a", "b")).rates(units(2050), ONE)
    assert 0 < found.hazard_RG[0, 1] <= found.pooled_R[0] * (1 + 1e-9)
    assert found.share_RG[0, 1] == pytest.approx(DROP / BEFORE)


def test_the_classes_of_any_grouping_add_up_to_all_tokens():
    rng = np.random.default_rng(6)
    n = 2000
    time_N, group_N = rng.exponential(1 / HAZARD, n), rng.integers(0, 3, n)
    taken = replace(
        census(1 + time_N, 1 + SPAN, group_N, ("a", "b", "c")),
        remainder_NH=rng.random((n, len(FACTORS))),
    )
    unit_N = rng.integers(0, 5, n)
    weight_RU = rng.poisson(1.0, (4, 5)) + 1.0
    rates = taken.rates(unit_N, weight_RU)
    whole = taken.falls(Groups(np.zeros(n, np.int64), ("all",)), unit_N, weight_RU, rates)
    parts = taken.falls(Groups(rng.integers(0, 7, n), tuple("abcdefg")), unit_N, weight_RU, rates)
    np.testing.assert_allclose(parts.sum(axis=1), whole[:, 0], rtol=1e-12)


def test_the_falls_are_those_of_a_loop_over_the_tokens():
    rng = np.random.default_rng(7)
    n = 300
    time_N, group_N = rng.exponential(1 / HAZARD, n), rng.integers(0, 2, n)
    taken = replace(
        census(1 + time_N, 1 + SPAN, group_N, ("a", "b")),
        remainder_NH=rng.random((n, len(FACTORS))),
    )
    unit_N, weight_U = rng.integers(0, 3, n), np.array([2.0, 0.0, 1.0])
    rates = taken.rates(unit_N, weight_U[None])
    found_H = taken.falls(Groups(np.zeros(n, np.int64), ("all",)), unit_N, weight_U[None], rates)[
        0, 0
    ]
    total_H = np.zeros(len(FACTORS))
    for i in range(n):
        expected_H = taken.remainder_NH[i].copy()
        if time_N[i] > SPAN:
            expected_H += BEFORE * rates.share_RG[0, group_N[i]] * rates.fallen_RGH[0, group_N[i]]
        total_H += weight_U[unit_N[i]] * expected_H
    np.testing.assert_allclose(found_H, total_H / weight_U[unit_N].sum())


X_K = np.concatenate([[-np.inf], np.linspace(0, 7, 57)])


def losses(midpoint_N, drop_N, floor=0.2, width=0.3, noise=0.01):
    u_NK = (midpoint_N[:, None] - np.maximum(X_K, -1e6)) / width
    noise_NK = noise * np.random.default_rng(0).standard_normal(u_NK.shape)
    return (floor + drop_N[:, None] * expit(u_NK) + noise_NK).astype(np.float32)


def test_the_remainder_is_what_the_sigmoid_has_still_to_do():
    midpoint_N = np.array([4.0, 6.0, 6.8])
    loss_NK = losses(midpoint_N, np.full(3, 4.0), width=0.5, noise=1e-4)
    fits = fit_sigmoids(X_K, loss_NK)
    taken = Census.of(fits, loss_NK, Groups(np.zeros(3, np.int64), ("all",)), 2.0)
    after = 7 + np.log(FACTORS)
    expected_NH = 4 * (
        expit((midpoint_N[:, None] - 7) / 0.5) - expit((midpoint_N[:, None] - after) / 0.5)
    )
    np.testing.assert_allclose(taken.remainder_NH, expected_NH, atol=0.05)


def test_a_token_waits_if_it_has_not_fallen_in_the_scored_range_and_is_not_known():
    """In turn: fallen; fallen in the unigram phase alone; never fallen; known; fallen to 0.2."""
    midpoint_N = np.array([4.0, 1.0, 99.0, 99.0, 5.0])
    drop_N = np.array([3.0, 3.0, 0.0, 0.0, 3.0])
    loss_NK = losses(midpoint_N, drop_N) + np.array([[0.0], [3.0], [6.0], [0.1], [0.0]])
    loss_NK = loss_NK.astype(np.float32)
    fits = fit_sigmoids(X_K, loss_NK)
    taken = Census.of(fits, loss_NK, Groups(np.zeros(5, np.int64), ("all",)), 2.0)
    assert (taken.waiting_N > 0).tolist() == [False, True, True, False, False]
    assert taken.waiting_N[1:3] == pytest.approx([3.2, 6.2], abs=0.02)
    assert sorted(taken.events.token_E.tolist()) == [0, 4]
    assert taken.before_E == pytest.approx([3.2, 3.2], abs=0.05)
    assert (taken.learned, taken.censored) == (2 / 5, 2 / 5)


def test_a_token_that_is_still_under_way_has_lost_the_share_of_a_fallen_one():
    """Half of the drop is still in the loss at the origin: it must not count twice."""
    midpoint_N = np.array([4.0, 6.6, 6.8])
    loss_NK = losses(midpoint_N, np.full(3, 4.0), noise=1e-4)
    groups = Groups(np.zeros(3, np.int64), ("all",))
    taken = Census.of(fit_sigmoids(X_K, loss_NK), loss_NK, groups, 2.0)
    assert taken.before_E == pytest.approx(np.full(3, 4.2), abs=0.03)
    assert taken.rates(units(3), ONE).share_RG[0, 0] == pytest.approx(4 / 4.2, abs=0.005)


def test_less_than_an_octave_or_no_fall_has_no_hazard():
    loss_NK = losses(np.full(4, 4.0), np.full(4, 3.0))
    fits, groups = fit_sigmoids(X_K, loss_NK), Groups(np.zeros(4, np.int64), ("all",))
    with pytest.raises(UndefinedError, match="less than a factor of two"):
        Census.of(fits, loss_NK, groups, 6.5)
    with pytest.raises(UndefinedError, match="no token has fallen"):
        Census.of(fits, loss_NK, groups, 6.0)
