"""Probe steps are those that the schedule's text says, whatever the length of the training."""

import pytest

from megatron_tokscale.errors import TokscaleError
from megatron_tokscale.probe import Schedule


@pytest.mark.parametrize("per_octave", [1, 3, 8, 50])
def test_log_points_are_the_rounded_powers(per_octave):
    rounded = {round(2 ** (i / per_octave)) for i in range(15 * per_octave)}
    expected = [0, *sorted(step for step in rounded if step <= 5000)]
    assert Schedule.parse(f"log:per-octave={per_octave}").steps(5000) == expected


def test_points_do_not_move_when_training_gets_longer():
    schedule = Schedule.parse("log:per-octave=8+linear:50")
    assert [step for step in schedule.steps(1000) if step <= 300] == schedule.steps(300)


def test_unions_and_last():
    schedule = Schedule.parse("list:0,10,100 + linear:40 + last")
    assert schedule.steps(90) == [0, 10, 40, 80, 90]


@pytest.mark.parametrize("text", ["", "log:8", "linear:0", "list:", "list:-1", "log:per-octave=0"])
def test_what_cannot_be_read_is_named(text):
    with pytest.raises(TokscaleError, match="cannot read"):
        Schedule.parse(text)
