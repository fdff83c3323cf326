"""A job killed in the middle and resumed leaves what an undisturbed job leaves."""

import dataclasses
import shutil

import numpy as np
import pytest
from checkpoints import checkpoint_differences
from jobs import Corpus, kill_job_at, run_job
from numpy.testing import assert_array_equal
from runs import read_journal

from megatron_tokscale.corpus.bin_idx import IndexedTokens
from megatron_tokscale.data import DatasetIdentity, Plan, Stage, Stratum
from megatron_tokscale.store import Run

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


EIGHT_STEPS = ("--ckpt-format", "torch_dist", "--train-iters", "8", "--save-interval", "4")


@pytest.fixture(scope="module")
def finished(corpus: Corpus, tmp_path_factory):
    """A job of eight steps with checkpoints at 4 and 8, probed after every step."""
    folder = tmp_path_factory.mktemp("finished")
    run_job(corpus, 1, *EIGHT_STEPS, *probe_into(corpus, folder), "--save", str(folder))
    return folder


def probe_into(corpus, folder):
    probe = ("--tokscale-probe-set", str(corpus.probe_set), "--tokscale-probe-schedule", "linear:1")
    return (*probe, "--tokscale-dir", str(folder))


def from_step_4(folder):
    return ("--load", str(folder), "--ckpt-step", "4")


def test_a_branch_leaves_the_run_it_comes_from_alone(corpus, finished, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()}
    run_job(corpus, 1, *EIGHT_STEPS, *probe_into(corpus, tmp_path), *from_step_4(finished))
    assert before == {path: path.stat().st_mtime_ns for path in before}
    branch, trunk = Run.open(tmp_path), Run.open(finished)
    assert branch.step_K.tolist() == [4, 5, 6, 7, 8]
    assert_array_equal(branch.read_losses(), trunk.read_losses()[:, 4:])
    assert branch.info.run_id != trunk.info.run_id


def test_a_rollback_on_more_ranks_takes_the_later_probes_anew(corpus, finished, tmp_path):
    shutil.copytree(finished / "tokscale", tmp_path / "tokscale")
    before = Run.open(tmp_path).read_losses()
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "tokscale/losses").iterdir()}
    flags = (*EIGHT_STEPS, *probe_into(corpus, tmp_path), *from_step_4(finished))
    run_job(corpus, 2, *flags, "--attention-dropout", "0", "--hidden-dropout", "0")
    run = Run.open(tmp_path)
    assert run.step_K.tolist() == list(range(9))
    assert_array_equal(run.read_losses()[:, :5], before[:, :5])
    assert not np.array_equal(run.read_losses()[:, 5], before[:, 5])  # dropout was on then
    is_kept = [path.stat().st_mtime_ns == time for path, time in sorted(files.items())]
    assert is_kept == [True] * 5 + [False] * 4
    abandoned = sorted(path.name for path in (tmp_path / "tokscale/losses/abandoned").iterdir())
    assert abandoned == [f"step_{step:08d}.safetensors.0" for step in (5, 6, 7, 8)]
    started = [event["step"] for event in read_journal(tmp_path) if event["event"] == "started"]
    assert started == [0, 4]
