"""Probe steps are those that the schedule's text says, whatever the length of the training."""

import time
from decimal import Decimal
from itertools import pairwise

import numpy as np
import pytest

from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.probe import JobPoint, ProbeSchedule


def points(final_step, tokens_per_step=0, save_interval=None):
    """Every point of an unbroken job, as the training loop would tell them."""
    for step in range(final_step + 1):
        at_interval = save_interval is not None and step % save_interval == 0
        yield JobPoint(
            step=step,
            tokens=step * tokens_per_step,
            tokens_before=(step - 1) * tokens_per_step if step else -1,
            is_last=step == final_step,
            is_checkpoint=step > 0
            and save_interval is not None
            and (at_interval or step == final_step),
        )


def log_points(per_octave, end):
    rounded = {round(2 ** (i / per_octave)) for i in range(50 * per_octave)}
    return [0, *sorted(point for point in rounded if point <= end)]


@pytest.mark.parametrize(
    ("spec", "many"),
    [
        ("linear:2", {"final_step": 10**9}),
        ("tokens:linear:3000", {"final_step": 10**9, "tokens_per_step": 1000}),
        ("tokens:linear:1", {"final_step": 10**9, "tokens_per_step": 1000}),
        ("checkpoints", {"final_step": 10**9, "save_interval": 3}),
    ],
)
def test_more_probes_than_a_list_holds_are_refused(spec, many):
    schedule = ProbeSchedule.parse(spec)
    with pytest.raises(TokscaleError, match="expected 10,000,000 at most"):
        schedule.steps(**many)
    few = schedule.steps(**many | {"final_step": 600})
    assert 200 <= len(few) <= 601


@pytest.mark.parametrize("per_octave", [1, 3, 8, 50])
def test_log_points_are_the_rounded_powers(per_octave):
    expected = log_points(per_octave, 5000)
    schedule = ProbeSchedule.parse(f"log:per-octave={per_octave}")
    assert schedule.steps(5000) == expected
    assert [point.step for point in points(5000) if schedule.is_due(point)] == expected


def test_points_do_not_move_when_training_gets_longer():
    schedule = ProbeSchedule.parse("log:per-octave=8+linear:50+tokens:log:per-octave=3")
    longer = schedule.steps(1000, tokens_per_step=7)
    assert [step for step in longer if step <= 300] == schedule.steps(300, tokens_per_step=7)


def test_unions_and_last():
    schedule = ProbeSchedule.parse("list:0,10,100 + linear:40 + last")
    assert schedule.steps(90) == [0, 10, 40, 80, 90]


def test_checkpoints_are_those_of_the_job():
    schedule = ProbeSchedule.parse("first+checkpoints")
    assert schedule.steps(10, save_interval=4) == [0, 4, 8, 10]
    assert schedule.steps(10) == [0]


def test_token_points_are_due_at_the_first_step_that_reaches_them():
    steps = ProbeSchedule.parse("tokens:list:0,1,1e3,1001,2.5e3").steps(10, tokens_per_step=500)
    assert steps == [0, 1, 2, 3, 5]


SPECS = [
    "log:per-octave=8+last",
    "linear:7+checkpoints",
    "first+list:3,50,1e2",
    "tokens:log:per-octave=8",
    "tokens:linear:1e3",
    "tokens:linear:1500+tokens:linear:64",
    "tokens:list:0,1,999,2.5e3,1e6",
    "tokens:log:per-octave=2+linear:100+tokens:list:12345+last+checkpoints",
]


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("tokens_per_step", [1, 37, 1000, 4096])
@pytest.mark.parametrize("save_interval", [None, 1, 25, 60])
def test_steps_are_those_at_which_a_probe_is_due(spec, tokens_per_step, save_interval):
    schedule = ProbeSchedule.parse(spec)
    job = list(points(300, tokens_per_step, save_interval))
    expected = [point.step for point in job if schedule.is_due(point)]
    assert schedule.steps(300, tokens_per_step, save_interval) == expected


@pytest.mark.parametrize(
    ("spec", "points"),
    [
        ("tokens:log:per-octave=5", log_points(5, 10**7)),
        ("tokens:linear:2.5e4", range(0, 10**7, 25_000)),
        ("tokens:list:17,4e4,4e4", [17, 40_000]),
    ],
)
def test_every_token_point_is_probed_once_under_a_growing_batch(spec, points):
    """With a batch-size ramp the tokens of a step change: the points stay."""
    schedule = ProbeSchedule.parse(spec)
    consumed = np.cumsum(np.random.default_rng(0).integers(1, 20_000, 500)).tolist()
    due = [
        now
        for step, (before, now) in enumerate(pairwise([-1, 0, *consumed]))
        if schedule.is_due(JobPoint(step=step, tokens=now, tokens_before=before))
    ]
    reached = [min((now for now in [0, *consumed] if now >= point), default=0) for point in points]
    assert due == sorted({now for now, point in zip(reached, points, strict=True) if now >= point})


def test_points_in_steps_that_are_skipped_are_due_at_the_next_point():
    """As in a job that skips steps 4, 5 and 16 of 16."""
    schedule = ProbeSchedule.parse("linear:4+last")
    taken = [0, 1, 2, 3, *range(6, 16), 16]
    due = [
        step
        for before, step in pairwise([-1, *taken])
        if schedule.is_due(JobPoint(step=step, step_before=before, is_last=step == 16))
    ]
    assert due == [0, 6, 8, 12, 16]


def test_a_million_steps_take_no_time():
    spec = "log:per-octave=8+linear:3+tokens:linear:5e6+tokens:log:per-octave=50+checkpoints"
    started = time.perf_counter()
    steps = ProbeSchedule.parse(spec).steps(10**6, tokens_per_step=4 * 10**6, save_interval=1000)
    assert time.perf_counter() - started < 5
    assert len(steps) > 333_333


BAD = [
    *("", "log:8", "linear:0", "list:", "list:-1", "log:per-octave=0", "steps", "tokens:"),
    *("tokens:last", "linear:2.5", "tokens:list:1.5e0", "tokens:linear:0", "list:1e+3", "tokens"),
]


@pytest.mark.parametrize("text", BAD)
def test_an_unreadable_term_of_a_schedule_is_named(text):
    with pytest.raises(TokscaleError, match="cannot read"):
        ProbeSchedule.parse(text)


@pytest.mark.parametrize("number", ["2e9", "2.5e9", "1000", "0"])
def test_numbers_are_exact(number):
    schedule = ProbeSchedule.parse(f"tokens:list:{number}")
    assert schedule.in_tokens.listed == (int(Decimal(number)),)


def test_counting_tokens_needs_the_tokens_of_a_step():
    with pytest.raises(TokscaleError, match="counts tokens"):
        ProbeSchedule.parse("tokens:linear:1e9").steps(100)
