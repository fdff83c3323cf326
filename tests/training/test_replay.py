"""A run that was trained without the plugin, probed from its checkpoints."""

import shutil
from argparse import Namespace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from jobs import Corpus, run_alone, run_job
from megatron.training import global_vars
from numpy.testing import assert_allclose, assert_array_equal

from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.probe import ProbeSchedule
from megatron_tokscale.store import Run
from megatron_tokscale.training import replay as replaying
from megatron_tokscale.training.events import TrainingState

pytestmark = pytest.mark.megatron

CHECKPOINTS = ("--ckpt-format", "torch_dist", "--save-interval", "3", "--train-iters", "9")
LAYOUT = ("--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2")


@pytest.fixture(scope="module")
def plain(corpus: Corpus, tmp_path_factory):
    """Checkpoints of a job without the plugin, and the losses that a probed twin of it records."""
    folder = tmp_path_factory.mktemp("plain")
    run_job(corpus, 1, *CHECKPOINTS, "--save", str(folder / "plain"))
    probe = (
        "--tokscale-probe-set",
        str(corpus.probe_set),
        "--tokscale-probe-schedule",
        "checkpoints",
    )
    run_job(corpus, 1, *CHECKPOINTS, *probe, "--save", str(folder / "twin"))
    return folder / "plain", Run.open(folder / "twin")


def replay(corpus, folder, n_processes, *extra):
    flags = ("--ckpt-format", "torch_dist", "--train-iters", "9", "--lr", "1")
    probe = ("--tokscale-probe-set", str(corpus.probe_set), "--tokscale-replay", str(folder))
    return run_job(corpus, n_processes, *flags, *probe, *extra)


def test_replayed_losses_are_those_of_the_probed_twin(corpus, plain, tmp_path):
    folder, twin = plain
    before = sorted(folder.rglob("*"))
    replay(corpus, folder, 1, "--tokscale-dir", str(tmp_path))
    assert sorted(folder.rglob("*")) == before
    run = Run.open(tmp_path)
    assert run.step_K.tolist() == twin.step_K.tolist() == [3, 6, 9]
    assert_array_equal(run.read_losses(), twin.read_losses())
    for time in ("tokens", "lr-sum"):
        assert_allclose(run.x_K(time), twin.x_K(time), rtol=1e-12)
    assert run.info.is_replay and not twin.info.is_replay
    assert run.launches[0].learning_rate == twin.launches[0].learning_rate


def test_a_replay_in_another_layout_goes_on_where_it_was_stopped(corpus, plain, tmp_path):
    folder, twin = plain
    shutil.copytree(folder, tmp_path / "saved")
    replay(corpus, tmp_path / "saved", 1, "--tokscale-probe-schedule", "list:6")
    run = Run.open(tmp_path / "saved")
    assert run.step_K.tolist() == [6]
    times = run.path / "tokscale/losses/step_00000006.safetensors"
    written = times.stat().st_mtime_ns
    output = replay(corpus, tmp_path / "saved", 4, *LAYOUT)
    assert "replay of 2 of the 3 checkpoints" in output
    assert times.stat().st_mtime_ns == written
    run = Run.open(tmp_path / "saved")
    assert run.step_K.tolist() == [3, 6, 9]
    assert_allclose(run.read_losses(), twin.read_losses(), rtol=0, atol=1e-5)


def test_a_schedule_chooses_among_the_checkpoints(tmp_path):
    def wanted(spec):
        return replaying.wanted_steps(tmp_path, [3, 6, 9], ProbeSchedule.parse(spec))

    assert wanted("list:3+last") == [3, 9]
    assert wanted("linear:6+tokens:list:5") == [6]
    with pytest.raises(TokscaleError, match="lists step 0, 7; expected steps with a checkpoint in"):
        wanted("list:0,3,7+checkpoints")
    with pytest.raises(TokscaleError, match=r"no checkpoint in .* is on the schedule; drop"):
        wanted("linear:5")


def test_a_replay_flushes_its_scalars_before_it_ends_the_job(monkeypatch, tmp_path):
    """Megatron flushes them after a training, which the end of a replay skips."""
    calls = []
    writer = SimpleNamespace(flush=lambda: calls.append("flushed"))
    monkeypatch.setattr(global_vars, "_GLOBAL_TENSORBOARD_WRITER", writer)
    monkeypatch.setattr(torch.distributed, "barrier", lambda: calls.append("barrier"))
    monkeypatch.setattr(replaying, "from_rank_0", lambda action: action())
    monkeypatch.setattr(replaying, "while_others_wait", lambda action, where: None)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("3")
    (tmp_path / "iter_0000003").mkdir()
    prober = SimpleNamespace(
        lacks=lambda step: False, check_launches=lambda *_: None, is_writer=False
    )
    schedule = ProbeSchedule.parse("checkpoints")
    part = replaying.Replay(tmp_path, schedule, prober, Namespace())
    with pytest.raises(SystemExit, match="0"):
        part.on_setup(TrainingState(step=0, consumed_samples=0, args=Namespace()))
    assert calls == ["flushed", "barrier"]


def test_weights_that_are_not_loaded_are_named():
    """Megatron leaves out in silence what it does not find, e.g. a chunk of a virtual pipeline."""
    from megatron_tokscale.training.replay import _mark_parameters, _unloaded_parameter

    saved = torch.nn.Linear(3, 2)
    chunks = [torch.nn.Linear(3, 2), torch.nn.Sequential(torch.nn.Linear(3, 2))]
    _mark_parameters(chunks)
    chunks[0].load_state_dict(saved.state_dict())
    assert "the parameter 0.weight" in _unloaded_parameter(chunks)
    chunks[1][0].load_state_dict({"weight": saved.weight}, strict=False)
    assert "the parameter 0.bias" in _unloaded_parameter(chunks)
    chunks[1][0].load_state_dict(saved.state_dict())
    assert _unloaded_parameter(chunks) is None


def test_a_folder_without_checkpoints_gets_one_line(corpus, tmp_path):
    probe = ("--tokscale-probe-set", str(corpus.probe_set), "--tokscale-replay", str(tmp_path))
    job = run_alone(corpus, *probe, "--train-iters", "2")
    assert job.returncode == 2
    assert job.stderr.count("megatron-tokscale:") == 1
    assert "no checkpoints there" in job.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_replay_that_cannot_write_stops_with_one_line(corpus, plain, tmp_path):
    (tmp_path / "tokscale").mkdir()
    (tmp_path / "tokscale" / "losses").write_text("in the way")
    probe = ("--tokscale-probe-set", str(corpus.probe_set), "--tokscale-replay", str(plain[0]))
    flags = (*probe, "--tokscale-dir", str(tmp_path), "--train-iters", "9")
    job = run_alone(corpus, *flags, "--ckpt-format", "torch_dist")
    assert job.returncode == 2
    assert job.stderr.count("megatron-tokscale: losses cannot be written") == 1
    assert "tokscale probe at step" not in job.stdout


def test_checkpoints_of_a_run_that_diverged_are_replayed(corpus, tmp_path):
    huge = ("--lr", "1e9", "--lr-warmup-iters", "0", "--no-check-for-nan-in-loss-and-grad")
    run_job(corpus, 1, *CHECKPOINTS, *huge, "--save", str(tmp_path))
    output = replay(corpus, tmp_path, 1)
    run = Run.open(tmp_path)
    assert sorted([*run.step_K.tolist(), *run.left_out]) == [3, 6, 9]
    assert np.isnan(run.read_losses_at(9)).any()
    assert "tokens without finite loss" in output
