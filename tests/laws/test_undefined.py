"""Bad input raises TokscaleError; an undefined number becomes a reason."""

import numpy as np
import pytest

from megatron_tokscale.core.errors import TokscaleError, UndefinedError, exit_with_one_line
from megatron_tokscale.core.resampling import percentile_interval
from megatron_tokscale.laws import fit_power_law
from megatron_tokscale.laws.deceleration import fit_deceleration
from megatron_tokscale.laws.power_law.tail import tail_exponent
from megatron_tokscale.results.estimate import Estimate, Undefined, defined_or_reason

T_K = np.geomspace(1, 1000, 30)
FALLING_K = 2 + T_K**-0.5


def test_neither_error_is_a_kind_of_the_other():
    assert not issubclass(UndefinedError, TokscaleError)
    assert not issubclass(TokscaleError, UndefinedError)


@pytest.mark.parametrize(
    "compute",
    [
        lambda: fit_power_law(T_K, FALLING_K[::-1]),
        lambda: fit_power_law(T_K[:5], FALLING_K[:5]),
        lambda: fit_power_law(T_K, np.where(T_K > 500, np.nan, FALLING_K)),
        lambda: fit_deceleration(T_K[:9], FALLING_K[:9]),
        lambda: tail_exponent(np.arange(20.0), np.zeros((1, 20)), from_x=1, to_x=9),
    ],
)
def test_a_number_that_the_data_do_not_define_has_a_reason(compute):
    found = defined_or_reason(compute)
    assert isinstance(found, Undefined) and found.undefined


@pytest.mark.parametrize(
    "compute",
    [
        lambda: fit_power_law(T_K, FALLING_K[:5]),
        lambda: fit_power_law(T_K[::-1], FALLING_K),
        lambda: fit_deceleration(T_K, FALLING_K, window=0.5),
        lambda: tail_exponent(np.arange(20.0), np.zeros((1, 3)), from_x=1, to_x=9),
    ],
)
def test_bad_input_is_raised_and_not_recorded(compute):
    with pytest.raises(TokscaleError):
        defined_or_reason(compute)


def test_an_undefined_number_that_nobody_catches_ends_a_program_with_one_line(capsys):
    with pytest.raises(SystemExit) as ended, exit_with_one_line():
        raise UndefinedError("too few\nprobes")
    assert ended.value.code == 2
    assert capsys.readouterr().err == "megatron-tokscale: too few probes\n"


def test_a_value_is_in_its_interval_whatever_the_bias():
    rng = np.random.default_rng(0)
    for bias in (-3.0, -0.5, 0.0, 0.5, 3.0):
        drawn = 1 + bias + 0.1 * rng.standard_normal(200)
        found = Estimate.from_resamples([1.0, *drawn])
        assert found.low <= found.value <= found.high
        assert found.uncorrected == 1.0
        assert found.value == pytest.approx(2 - np.median(drawn), abs=1e-9)


def test_an_estimate_keeps_to_the_range_of_its_number():
    drawn = np.linspace(0.003, 0.005, 201)
    error = Estimate.from_resamples([0.002, *drawn], least=0)
    assert 0 <= error.low <= error.value <= error.high < 0.002
    skill = Estimate.from_resamples([0.9, *np.linspace(0.7, 0.85, 201)], most=1)
    assert skill.low <= skill.value <= skill.high == 1
    beyond = Estimate.from_resamples([0.1, *np.linspace(0.9, 1.0, 201)], least=0)
    assert np.isnan([beyond.low, beyond.high]).all() and beyond.value == 0.1


def test_an_estimate_outside_of_its_interval_cannot_be_made():
    with pytest.raises(ValueError, match="is not in"):
        Estimate(0.944, 1.128, 2.778)


def test_percentiles_that_do_not_surround_the_number_are_no_interval():
    drawn = np.linspace(2, 3, 101)
    assert percentile_interval(2.5, drawn) == pytest.approx((2.025, 2.975))
    assert np.isnan(percentile_interval(1.0, drawn)).all()
