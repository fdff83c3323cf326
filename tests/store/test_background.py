"""Losses written on a thread, by one writer per directory."""

import errno
import os
import subprocess
import sys
import threading

import numpy as np
import pytest
from numpy.testing import assert_array_equal
from runs import launch
from small_probe_sets import loss_of, make_probe_set, record

from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.store import BackgroundWriter, Run, RunWriter
from megatron_tokscale.store.lock import RunLock


@pytest.fixture
def probe_set():
    return make_probe_set()


@pytest.fixture
def writer(tmp_path, probe_set):
    writer = RunWriter(tmp_path)
    writer.open(probe_set, {}, [launch()], 0)
    return writer


def test_a_joined_probe_is_on_disk(tmp_path, writer, probe_set):
    background = BackgroundWriter(writer.write)
    for step in (0, 1, 2):
        background.submit(loss_of(step, probe_set), record(step, probe_set))
        assert background.join() is None
    expected_NK = np.stack([loss_of(step, probe_set) for step in (0, 1, 2)], axis=1)
    assert_array_equal(Run.open(tmp_path).read_losses(), expected_NK)
    assert background.join() is None


def test_writing_does_not_block_the_caller(monkeypatch, writer, probe_set):
    may_go_on = threading.Event()
    threads = []

    def write(loss_N, record):
        threads.append(threading.current_thread().name)
        assert may_go_on.wait(60)

    monkeypatch.setattr(writer, "write", write)
    background = BackgroundWriter(writer.write)
    background.submit(loss_of(1, probe_set), record(1, probe_set))  # comes back, or hangs here
    may_go_on.set()
    assert background.join() is None
    assert threads == ["tokscale-losses_0"]


def test_join_returns_the_error_of_the_write(tmp_path, writer, probe_set):
    background = BackgroundWriter(writer.write)
    (tmp_path / "tokscale" / "run.json").unlink()
    background.submit(loss_of(1, probe_set), record(1, probe_set))
    background.wait()
    assert isinstance(background.join(), FileNotFoundError)
    assert background.join() is None
    assert not list((tmp_path / "tokscale" / "losses").iterdir())


def test_the_interpreter_writes_a_pending_probe_before_it_ends(tmp_path, writer, probe_set):
    code = (
        "import sys, time; sys.path[:0] = ['tests/support']\n"
        "from pathlib import Path\n"
        "from small_probe_sets import loss_of, make_probe_set, record\n"
        "from megatron_tokscale.store import BackgroundWriter, RunWriter\n"
        "writer = RunWriter(Path(sys.argv[1])); write = writer.write\n"
        "writer.write = lambda *args: (time.sleep(0.5), write(*args))\n"
        "s = make_probe_set(); BackgroundWriter(writer.write).submit(loss_of(4, s), record(4, s))\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    assert Run.open(tmp_path).step_K.tolist() == [4]


def test_opening_removes_what_a_killed_writer_left(tmp_path, writer, probe_set):
    left_over = tmp_path / "tokscale/losses/.step_00000001.safetensors.0a1b.tmp"
    left_over.write_bytes(b"half")
    RunWriter(tmp_path).open(probe_set, {}, [launch()], 0)
    assert not left_over.exists()


def test_a_replay_abandons_nothing(tmp_path, writer, probe_set):
    for step in (0, 4, 8):
        writer.write(loss_of(step, probe_set), record(step, probe_set))
    RunWriter(tmp_path).open(probe_set, {}, [launch()], None)
    assert Run.open(tmp_path).step_K.tolist() == [0, 4, 8]


def test_the_latest_losses_before_a_step(tmp_path, writer, probe_set):
    assert writer.latest(5) is None
    for step in (0, 4, 8):
        writer.write(loss_of(step, probe_set), record(step, probe_set))
    assert_array_equal(writer.latest(7), loss_of(4, probe_set))
    assert_array_equal(writer.latest(8), loss_of(8, probe_set))
    path = tmp_path / "tokscale/losses/step_00000008.safetensors"
    path.write_bytes(path.read_bytes()[:-3])
    assert writer.latest(8) is None


def test_a_lock_is_not_inherited_by_forked_children(tmp_path):
    """Data-loader workers outlive a killed rank by seconds; the next job must not wait for them."""
    code = (
        "import os, sys, time, pathlib\n"
        "from megatron_tokscale.store.lock import RunLock\n"
        "lock = RunLock(pathlib.Path(sys.argv[1])); assert lock.acquire()\n"
        "pid = os.fork()\n"
        "if pid == 0: time.sleep(600)\n"
        "print(pid, flush=True); os._exit(0)\n"
    )
    path = tmp_path / ".lock"
    command = [sys.executable, "-c", code, str(path)]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    child = int(parent.stdout.readline())
    parent.wait()
    try:
        lock = RunLock(path)
        assert lock.acquire()
        with pytest.raises(TokscaleError, match="in use by another job"):
            raise_from_another_process(path)
        lock.release()
        raise_from_another_process(path)
    finally:
        subprocess.run(["kill", "-9", str(child)], check=True)


def test_a_lock_is_released_where_closing_its_file_reports_a_full_disk(tmp_path, monkeypatch):
    """NFS reports at the close what it could not write, here the holder's name."""
    path, close = tmp_path / ".lock", os.close
    lock = RunLock(path)
    assert lock.acquire()

    def close_and_fail(descriptor):
        close(descriptor)
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "close", close_and_fail)
        lock.release()
    lock.release()  # once: the descriptor may be another file's by now
    raise_from_another_process(path)


def raise_from_another_process(path):
    code = (
        "import sys, pathlib\n"
        "from megatron_tokscale.core.errors import exit_with_one_line\n"
        "from megatron_tokscale.store.lock import RunLock\n"
        "with exit_with_one_line(): RunLock(pathlib.Path(sys.argv[1])).acquire()\n"
    )
    command = [sys.executable, "-c", code, str(path)]
    job = subprocess.run(command, capture_output=True, text=True, check=False)
    if job.returncode:
        raise TokscaleError(job.stderr)
