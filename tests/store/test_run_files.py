"""A run on disk: whole files or none, nothing twice, nothing mixed up."""

import json
import os

import numpy as np
import pytest
from numpy.testing import assert_array_equal
from privileges import plain_permissions
from runs import launch, read_journal
from small_probe_sets import loss_of, make_probe_set, record

from megatron_tokscale.core import files
from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.store import Run, RunWriter
from megatron_tokscale.store.losses import list_losses, losses_name, read_record

STEPS = [0, 1, 2, 4, 8]


@pytest.fixture
def probe_set():
    return make_probe_set()


MODEL = {"num_layers": 2}


@pytest.fixture
def launches():
    return [launch(seq_length=5)]


@pytest.fixture
def run(tmp_path, probe_set, launches):
    writer = RunWriter(tmp_path)
    writer.open(probe_set, MODEL, launches, 0)
    for step in STEPS:
        writer.write(loss_of(step, probe_set), record(step, probe_set))
    return tmp_path


def test_losses_come_back_as_written(run, probe_set):
    opened = Run.open(run)
    expected_NK = np.stack([loss_of(step, probe_set) for step in STEPS], axis=1)
    assert_array_equal(opened.read_losses(), expected_NK)
    assert_array_equal(opened.read_losses(3, 7), expected_NK[3:7])
    assert_array_equal(opened.read_losses(3, 10**6), expected_NK[3:])
    assert repr(opened.records[3]) == repr(record(4, probe_set))


def test_files_are_as_readable_as_the_umask_lets_them_be(run):
    umask = os.umask(0)
    os.umask(umask)
    modes = {path.stat().st_mode & 0o777 for path in run.rglob("*.*") if path.is_file()}
    assert modes == {0o666 & ~umask}


def test_times_are_logarithms(run):
    opened = Run.open(run)
    assert_array_equal(opened.x_K(), [-np.inf, *np.log(STEPS[1:])])
    assert_array_equal(opened.x_K("tokens"), [-np.inf, *np.log(40.0 * np.array(STEPS[1:]))])
    assert opened.x_K("lr-sum")[1:] == pytest.approx(np.log(0.5 * np.array(STEPS[1:])))


def test_a_time_the_run_does_not_know_is_refused(run, probe_set):
    RunWriter(run).write(loss_of(16, probe_set), record(16, probe_set, lr_sum=float("nan")))
    with pytest.raises(TokscaleError, match="has no record of its lr-sum"):
        Run.open(run).x_K("lr-sum")


def test_half_precision_losses_are_read_as_single(run, probe_set):
    losses = loss_of(16, probe_set)
    RunWriter(run).write(losses.astype(np.float16), record(16, probe_set))
    assert_array_equal(Run.open(run).read_losses()[:, -1], losses.astype(np.float16))


def test_resuming_sets_aside_the_abandoned_branch(run, probe_set, launches):
    RunWriter(run).open(probe_set, MODEL, launches, resume_step=3)
    assert Run.open(run).step_K.tolist() == [0, 1, 2]
    abandoned = run / "tokscale/losses/abandoned"
    assert sorted(path.name for path in abandoned.iterdir()) == [
        losses_name(step) + ".0" for step in (4, 8)
    ]
    RunWriter(run).write(loss_of(4, probe_set), record(4, probe_set))
    RunWriter(run).open(probe_set, MODEL, launches, resume_step=3)
    assert (abandoned / (losses_name(4) + ".1")).exists()
    assert read_journal(run)[-1]["abandoned"] == [4]


def test_a_fresh_start_abandons_everything(run, probe_set, launches):
    run_id = Run.open(run).info.run_id
    RunWriter(run).open(probe_set, MODEL, launches, resume_step=0)
    assert Run.open(run).step_K.tolist() == []
    assert Run.open(run).info.run_id != run_id


def test_another_probe_set_or_model_is_refused(run, probe_set):
    writer = RunWriter(run)
    writer.check(probe_set, MODEL)
    with pytest.raises(TokscaleError, match="of probe set"):
        writer.check(make_probe_set(seed=1), MODEL)
    with pytest.raises(TokscaleError, match="num_layers 2, this job has 3"):
        writer.check(probe_set, {"num_layers": 3})


def test_a_failed_write_leaves_what_was_there(run, probe_set, monkeypatch):
    def full(path):
        raise OSError(28, "No space left on device")

    before = sorted(run.rglob("*"))
    monkeypatch.setattr(files, "_sync", full)
    with pytest.raises(OSError, match="No space"):
        RunWriter(run).write(loss_of(16, probe_set), record(16, probe_set))
    assert sorted(run.rglob("*")) == before
    assert Run.open(run).step_K.tolist() == STEPS


def test_damage_is_named(run, probe_set):
    path = list_losses(run / "tokscale/losses")[4]
    whole = path.read_bytes()
    path.write_bytes(whole[:-3])
    with pytest.raises(TokscaleError, match=r"step_00000004.* truncated"):
        Run.open(run)
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(TokscaleError, match=r"step_00000004.* wrong checksum"):
        Run.open(run).verify()
    path.write_bytes(b"")
    with pytest.raises(TokscaleError, match="step_00000004"):
        Run.open(run)


@pytest.mark.parametrize("name", ["losses/step_00000002.safetensors", "probe.safetensors"])
def test_a_file_without_permission_is_not_said_to_be_missing(run, name):
    path = run / "tokscale" / name
    path.chmod(0)
    with (
        plain_permissions(),
        pytest.raises(TokscaleError, match=rf"cannot read .*{name}: Permission denied$"),
    ):
        opened = Run.open(run)
        opened.probe_set  # noqa: B018
        opened.verify()


def test_a_missing_losses_file_is_said_to_be_missing(tmp_path):
    path = tmp_path / losses_name(2)
    with pytest.raises(TokscaleError, match=r"cannot read losses .*: No such file or directory$"):
        read_record(path)


def test_losses_of_another_set_are_refused(run, probe_set):
    other = make_probe_set(n_sequences=4, seed=2)
    writer = RunWriter(run)
    writer.write(loss_of(16, other), record(16, probe_set))
    with pytest.raises(TokscaleError, match=f"has {other.n_tokens} tokens"):
        Run.open(run)
    writer.write(loss_of(16, probe_set), record(16, other))
    with pytest.raises(TokscaleError, match="another probe set"):
        Run.open(run)


def test_a_newer_schema_is_refused(run):
    path = run / "tokscale/run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema_version": 99}))
    with pytest.raises(TokscaleError, match=r"schema version 99.* up to 3"):
        Run.open(run)


def test_a_directory_without_a_run_gets_one_line(tmp_path):
    with pytest.raises(TokscaleError, match="no run in"):
        Run.open(tmp_path)


def test_a_torn_journal_line_harms_no_other(run):
    journal = run / "tokscale/journal.jsonl"
    journal.write_bytes(journal.read_bytes()[:-20])
    RunWriter(run).journal("later", step=9)
    events = [event["event"] for event in read_journal(run)]
    assert events == ["started", *["probe"] * (len(STEPS) - 1), "later"]
