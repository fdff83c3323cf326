"""A job killed in the middle and resumed leaves what an undisturbed job leaves."""

import dataclasses

import pytest
from jobs import Corpus, kill_job_at, run_job
from numpy.testing import assert_array_equal
from test_isolation import checkpoint_differences

from megatron_tokscale.data import DatasetIdentity, Plan, Stage, Stratum
from megatron_tokscale.indexed import IndexedTokens
from megatron_tokscale.store import Run
from megatron_tokscale.store.writer import read_journal

pytestmark = pytest.mark.megatron


@pytest.fixture
def plan(corpus: Corpus, tmp_path):
    """Weights that change twice, once between two checkpoints."""
    files = [IndexedTokens.open(prefix) for prefix in corpus.prefixes]
    weights = {0: (0.5, 0.5), 40: (0.9, 0.1), 72: (0.2, 0.8)}
    plan = Plan(
        datasets=tuple(DatasetIdentity(f.name, f.n_sequences, f.n_tokens) for f in files),
        seq_length=32,
        seed=1,
        strata=tuple(Stratum(file.name, number) for number, file in enumerate(files)),
        stages=tuple(Stage(start, w) for start, w in weights.items()),
    )
    plan.save(tmp_path / "plan.json")
    return tmp_path / "plan.json"


def deterministic(record):
    return {
        name: value
        for name, value in dataclasses.asdict(record).items()
        if name not in ("wall_time", "duration")
    }


def test_a_killed_and_resumed_job_is_an_undisturbed_job(corpus, plan, tmp_path):
    flags = ("--train-iters", "14", "--save-interval", "4", "--pipeline-model-parallel-size", "2")
    flags = (*flags, "--tokscale-plan", str(plan), "--tokscale-probe-set", str(corpus.probe_set))
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run_job(corpus, 2, *flags, "--save", str(whole))
    flags = (*flags, "--save", str(killed), "--load", str(killed))
    kill_job_at(corpus, 2, "tokscale probe at step 11", tmp_path / "log", *flags)
    assert 10 in Run.open(killed).step_K
    run_job(corpus, 2, *flags)

    expected, found = Run.open(whole), Run.open(killed)
    assert_array_equal(found.read_losses(), expected.read_losses())
    for left, right in zip(found.records, expected.records, strict=True):
        assert repr(deterministic(left)) == repr(deterministic(right))
    assert checkpoint_differences(whole, killed) == []
    resumed = [event for event in read_journal(killed) if event["event"] == "started"][-1]
    assert resumed["step"] == 8
    assert {9, 10} <= set(resumed["abandoned"])
    left_over = list(killed.glob("**/.*tmp"))
    assert left_over == []
