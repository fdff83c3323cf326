"""The rule by which back-tests refute a method."""

import math

import pytest
from analyses import blank

from megatron_tokscale.compare.forecast.judge import judge
from megatron_tokscale.results.estimate import Estimate, Undefined
from megatron_tokscale.results.forecast import Horizon, Method, Origin, Standing


def estimate(value, reach=0.05):
    return Estimate(value, value - reach, value + reach)


def back_test(came, reach=0.05, **said):
    """A back-test with one horizon; said are the forecasts by the names of the methods."""
    falls = {Method.NOTHING: Estimate(0.0, 0.0, 0.0)}
    said.setdefault("COMBINATION", Undefined("not made"))
    falls |= {
        Method[name]: each if isinstance(each, Undefined) else estimate(each, reach)
        for name, each in said.items()
    }
    return blank(Origin, share=0.5, horizons=(Horizon(2.0, 2.0, falls, estimate(came, 0.01)),))


def standing(found):
    return {each.method: each.standing for each in found}


def test_the_method_with_the_smallest_error_comes_first():
    found = judge([back_test(0.4, HAZARD=0.42, POWER_LAW=0.36, SLOPE=0.45)])
    assert [each.method for each in found] == [
        Method.HAZARD, Method.POWER_LAW, Method.SLOPE, Method.NOTHING, Method.COMBINATION,
    ]  # fmt: skip
    assert [each.error for each in found[:4]] == pytest.approx([0.05, 0.1, 0.125, 1.0])
    assert standing(found)[Method.HAZARD] is Standing.STANDS


def test_a_combination_comes_first_if_its_back_test_wins():
    found = judge([back_test(0.4, COMBINATION=0.41, HAZARD=0.46, POWER_LAW=0.36, SLOPE=0.6)])
    assert [each.method for each in found[:2]] == [Method.COMBINATION, Method.POWER_LAW]


def test_a_refuted_method_comes_behind_one_that_stands_with_a_larger_error():
    """The slope's error is smaller, but the fall that came lies outside its interval."""
    came, wide, narrow = estimate(0.4, 0.01), estimate(0.5, 0.15), estimate(0.44, 0.01)
    falls = dict.fromkeys(Method, wide) | {Method.SLOPE: narrow}
    test = blank(Origin, share=0.5, horizons=(Horizon(2.0, 2.0, falls, came),))
    found = judge([test])
    assert found[-1].method is Method.SLOPE and found[-1].error < found[0].error
    assert standing(found)[Method.SLOPE] is Standing.REFUTED


def test_a_fall_outside_of_the_interval_refutes():
    found = judge([back_test(0.4, HAZARD=0.33, POWER_LAW=0.35, SLOPE=0.4)])
    assert standing(found)[Method.HAZARD] is Standing.REFUTED
    assert standing(found)[Method.POWER_LAW] is Standing.STANDS
    (hazard,) = (each for each in found if each.method is Method.HAZARD)
    assert "1 of 1 falls that came lie outside its interval" in hazard.reason


def test_an_error_larger_than_that_of_nothing_refutes_however_wide_the_interval():
    found = judge([back_test(0.2, reach=1.0, HAZARD=0.45, POWER_LAW=0.3, SLOPE=0.5)])
    assert standing(found)[Method.HAZARD] is Standing.REFUTED
    assert standing(found)[Method.SLOPE] is Standing.REFUTED
    assert standing(found)[Method.NOTHING] is Standing.REFUTED  # by the margin


def test_a_much_better_rival_refutes_and_a_slightly_better_one_does_not():
    wide = {"reach": 1.0, "POWER_LAW": 0.4, "SLOPE": 0.4}
    assert standing(judge([back_test(0.4, HAZARD=0.51, **wide)]))[Method.HAZARD] is Standing.REFUTED
    assert standing(judge([back_test(0.4, HAZARD=0.49, **wide)]))[Method.HAZARD] is Standing.STANDS


def test_nothing_is_best_where_the_loss_did_not_fall_as_foretold():
    found = judge([back_test(0.05, HAZARD=0.3, POWER_LAW=0.3, SLOPE=0.3)])
    assert found[0].method is Method.NOTHING


def test_without_a_back_test_the_power_law_comes_first_untested():
    found = judge([Undefined("too few probes")])
    assert found[0].method is Method.POWER_LAW
    assert {each.standing for each in found} == {Standing.UNTESTED}
    assert all(math.isnan(each.error) for each in found)


def test_a_method_without_a_forecast_is_untested():
    found = judge([back_test(0.4, HAZARD=Undefined("no hazard"), POWER_LAW=0.4, SLOPE=0.4)])
    assert standing(found)[Method.HAZARD] is Standing.UNTESTED
    assert Method.HAZARD in [each.method for each in found[-2:]]


def test_a_method_without_a_forecast_from_now_on_is_not_the_first():
    silent = [Method.POWER_LAW, Method.COMBINATION]
    assert judge([Undefined("too few probes")], silent)[0].method is Method.HAZARD
    tested = [back_test(0.4, HAZARD=0.41, POWER_LAW=0.4, SLOPE=0.4)]
    assert judge(tested, [Method.POWER_LAW, Method.SLOPE])[0].method is Method.HAZARD
