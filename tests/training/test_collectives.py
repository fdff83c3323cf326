"""What a rank sends, receives and calls for the plugin does not grow with the number of ranks.

A process on torch's fake process group stands for a rank of 8 or 128: it runs the plugin's code in
a Megatron job, and gets the values that the ranks of a real job have sent each other.
"""

from collections import Counter

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


@pytest.mark.parametrize("phase", [START, DECISION, LOG])
def test_calls_and_bytes_are_equal_on_8_and_128_ranks(on_4, on_8, on_128, phase):
    for role, record in on_128.items():
        assert record.calls[phase], role
        assert record.calls[phase] == on_8[role].calls[phase]
        assert record.names(phase) == on_4[role].names(phase)


def test_a_probe_grows_on_the_writer_by_nothing_and_elsewhere_shrinks(on_8, on_128):
    """The ranks share the probe set: more ranks, fewer losses of each."""
    for role, record in on_128.items():
        assert Counter(record.names(PROBE)) == Counter(on_8[role].names(PROBE))
        assert record.totals(PROBE)[1] <= on_8[role].totals(PROBE)[1]
    few, many = (jobs["writer"].totals(PROBE)[2] for jobs in (on_8, on_128))
    assert many <= 1.1 * few
