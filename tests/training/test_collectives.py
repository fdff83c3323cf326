"""A rank's calls and bytes for the plugin do not grow with the number of ranks.

A process on torch's fake process group stands for a rank of 8 or 128: it runs the plugin's code in
a Megatron job, and gets the values that the ranks of a real job have sent each other.
"""

import pytest
from collectives import LAYOUTS, make_job, run_fake, run_real
from recorded_collectives import DECISION, LOG, PROBE, START
from recorded_job import start

pytestmark = pytest.mark.megatron


def run(n_processes, words):
    job = start(n_processes, *words)
    assert job.code == 0, job.output[-6000:]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return make_job(tmp_path_factory.mktemp("collectives"))


@pytest.fixture(scope="module")
def on_4(corpus, tmp_path_factory):
    """The calls of a real job on 4 ranks, which also writes the values for the others."""
    return run_real(corpus, LAYOUTS[4], tmp_path_factory.mktemp("real") / "run", run)


@pytest.fixture(scope="module")
def on_8(corpus, on_4, tmp_path_factory):
    return run_fake(corpus, LAYOUTS[8], tmp_path_factory.mktemp("on_8") / "run", run)


@pytest.fixture(scope="module")
def on_128(corpus, on_4, tmp_path_factory):
    return run_fake(corpus, LAYOUTS[128], tmp_path_factory.mktemp("on_128") / "run", run)


_DIGITS = 16
"""Bytes by which two jobs may differ: the digits of their numbers of ranks, in the run's record."""


@pytest.mark.parametrize("phase", [START, DECISION, LOG])
def test_calls_and_bytes_are_equal_on_8_and_128_ranks(on_8, on_128, phase):
    for role, many in on_128.items():
        few = on_8[role]
        assert many.calls[phase], role
        assert [row[0] for row in many.calls[phase]] == [row[0] for row in few.calls[phase]]
        for one, other in zip(many.totals(phase), few.totals(phase), strict=True):
            assert abs(one - other) <= _DIGITS


@pytest.mark.parametrize("phase", [START, PROBE, DECISION, LOG])
def test_a_process_that_stands_for_a_rank_makes_the_calls_of_a_real_one(on_4, on_8, phase):
    for role in ("rank 0", "writer"):
        assert on_8[role].names(phase) == on_4[role].names(phase)


def test_a_probe_costs_a_rank_no_more_when_more_ranks_share_it(on_8, on_128):
    for role, record in on_128.items():
        assert record.names(PROBE) == on_8[role].names(PROBE)
        (_, sent, received), few = record.totals(PROBE), on_8[role].totals(PROBE)
        assert sent <= few[1]
        # The writer gets the losses, and with those of each rank the places of a sequence.
        assert received <= few[2] * (1.05 if role == "writer" else 1)
