"""A run that is read while another process writes it, kills it, or rolls it back.

Shapes: N tokens, K probe steps.
"""

import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
from runs import launch, plain_probe_set, probe_steps, write_run

from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.store import LossRecord, RunPaths, RunWriter
from megatron_tokscale.store import progress as progress_module
from megatron_tokscale.store.exchange.import_run import import_run
from megatron_tokscale.store.exchange.sources import ImportSettings
from megatron_tokscale.store.progress import ProgressTracker
from megatron_tokscale.store.watching import RunWatcher

STEPS = [int(step) for step in probe_steps(24)]
N_TOKENS = 64


def losses(seed=0):
    """Losses that fall by steps, (N, K)."""
    rng = np.random.default_rng(seed)
    fall_NK = np.asarray(STEPS) >= rng.choice(STEPS, N_TOKENS)[:, None]
    return (8 - 6 * fall_NK + 0.05 * rng.standard_normal(fall_NK.shape)).astype(np.float32)


def states_of(loss_NK, steps=STEPS):
    tracker = ProgressTracker()
    for step, loss_N in zip(steps, loss_NK.T, strict=True):
        tracker.add(step, loss_N)
    return tracker.progress().state_N


def record_of(step, probe_set):
    return LossRecord(
        step=step,
        consumed_samples=4 * step,
        consumed_tokens=32 * step,
        learning_rate=1e-3,
        lr_sum=1e-3 * step,
        training_loss=3.0,
        wall_time=1e9 + step,
        duration=0.5,
        probe_fingerprint=probe_set.fingerprint,
        versions="test",
    )


def opened(path, launches, resume_step):
    probe_set = plain_probe_set(N_TOKENS)
    writer = RunWriter(path)
    writer.open(probe_set, {"num_layers": 4}, launches, resume_step)
    return writer, probe_set


def write(writer, probe_set, loss_NK, steps):
    for step in steps:
        loss_N = np.ascontiguousarray(loss_NK[:, STEPS.index(step)])
        writer.write(loss_N, record_of(step, probe_set))


def test_each_look_sees_the_probes_so_far_and_reads_only_new_files(tmp_path, monkeypatch):
    loss_NK, read = losses(), []
    original = progress_module.read_losses

    def recorded(path):
        read.append(path.name)
        return original(path)

    monkeypatch.setattr(progress_module, "read_losses", recorded)
    writer, probe_set = opened(tmp_path, [launch()], 0)
    watcher = RunWatcher(tmp_path)
    view = watcher.look()
    assert (view.records, view.progress, view.groups) == ((), None, ())
    assert watcher.look() is None
    for k, step in enumerate(STEPS):
        write(writer, probe_set, loss_NK, [step])
        view = watcher.look()
        assert [record.step for record in view.records] == STEPS[: k + 1]
        assert len(read) == k + 1
        assert watcher.look() is None
    np.testing.assert_array_equal(view.progress.state_N, states_of(loss_NK))
    assert view.groups[0].fall_since_start == pytest.approx(
        float(loss_NK[:, 0].mean() - loss_NK[:, -1].mean()), abs=1e-5
    )
    assert view.probe_seconds == pytest.approx(0.5 * len(STEPS))
    writer.close()


WRITER = """
import sys, time
from pathlib import Path
sys.path.insert(0, {here!r})
from test_watching import STEPS, launch, losses, opened, write
path, start, pause = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
writer, probe_set = opened(path, [launch(0), launch(start)][: 2 if start else 1], start)
for step in STEPS:
    if step > start or start == 0:
        write(writer, probe_set, losses(start), [step])
        time.sleep(pause)
print("done", flush=True)
time.sleep(60)
"""


def start_writer(path, start, pause):
    """Another process that writes the run from a step on, and holds its lock."""
    here = str(Path(__file__).parent)
    code = textwrap.dedent(WRITER).format(here=here)
    command = [sys.executable, "-c", code, str(path), str(start), str(pause)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


def look_until(watcher, is_reached, seconds=60):
    """Look until a view fulfils a condition; return it."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            view = watcher.look()
        except TokscaleError:  # the writer has not begun
            view = None
        if view is not None and is_reached(view):
            return view
        time.sleep(0.01)
    raise AssertionError("the run did not come so far")


def test_a_run_that_is_written_killed_and_rolled_back_is_followed(tmp_path):
    run = tmp_path / "run"
    job = start_writer(run, 0, 0.02)
    watcher = RunWatcher(run)
    kill_at = STEPS[15]
    look_until(watcher, lambda view: view.records and view.records[-1].step >= kill_at)
    job.send_signal(signal.SIGKILL)
    job.wait()
    # What a kill leaves: a temporary file, and a torn line in the journal.
    (RunPaths(run).losses / ".step_99999999.safetensors.tmp").write_bytes(b"half")
    with RunPaths(run).journal.open("a") as journal:
        journal.write('{"event": "pro')
    start = STEPS[10]
    job = start_writer(run, start, 0.0)
    try:
        assert job.stdout.readline() == "done\n"
        view = look_until(watcher, lambda view: view.records[-1].step == STEPS[-1])
    finally:
        job.kill()
        job.wait()
    assert [record.step for record in view.records] == STEPS
    assert view.n_abandoned >= 5
    assert not view.unreadable
    loss_NK = np.where(np.asarray(STEPS) <= start, losses(0), losses(start))
    np.testing.assert_array_equal(view.progress.state_N, states_of(loss_NK))


def test_a_run_that_is_started_anew_is_another_run(tmp_path):
    writer, probe_set = opened(tmp_path, [launch()], 0)
    write(writer, probe_set, losses(0), STEPS)
    writer.close()
    watcher = RunWatcher(tmp_path)
    assert len(watcher.look().records) == len(STEPS)
    writer, probe_set = opened(tmp_path, [launch()], 0)
    assert watcher.look().records == ()
    write(writer, probe_set, losses(1), STEPS[:20])
    writer.close()
    view = watcher.look()
    np.testing.assert_array_equal(view.progress.state_N, states_of(losses(1)[:, :20], STEPS[:20]))


def test_a_damaged_file_is_left_out_until_it_is_whole(tmp_path):
    loss_NK = losses()
    run = write_run(tmp_path, STEPS, loss_NK)
    file = run.paths.losses_at(STEPS[12])
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    watcher = RunWatcher(tmp_path)
    view = watcher.look()
    assert list(view.unreadable) == [STEPS[12]]
    assert "truncated or damaged" in view.unreadable[STEPS[12]]
    without = [k for k in range(len(STEPS)) if k != 12]
    steps = [STEPS[k] for k in without]
    np.testing.assert_array_equal(view.progress.state_N, states_of(loss_NK[:, without], steps))
    file.write_bytes(whole)
    view = watcher.look()
    assert not view.unreadable
    np.testing.assert_array_equal(view.progress.state_N, states_of(loss_NK))


def test_losses_with_a_wrong_checksum_are_left_out(tmp_path):
    run = write_run(tmp_path, STEPS, losses())
    file = run.paths.losses_at(STEPS[-1])
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    view = RunWatcher(tmp_path).look()
    assert "wrong checksum" in view.unreadable[STEPS[-1]]
    assert view.records[-1].step == STEPS[-2]


def test_without_step_0_falls_are_since_the_first_probe(tmp_path):
    loss_NK = losses()
    write_run(tmp_path, STEPS[6:], loss_NK[:, 6:])
    view = RunWatcher(tmp_path).look()
    assert view.progress.start == STEPS[6]
    np.testing.assert_array_equal(view.progress.state_N, states_of(loss_NK[:, 6:], STEPS[6:]))


def test_looking_writes_nothing(tmp_path):
    write_run(tmp_path / "run", STEPS, losses())
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    RunWatcher(tmp_path / "run").look()
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}


def imported(tmp_path, axis, values, unit):
    """A run imported from a losses.npz along an axis."""
    source = tmp_path / "losses.npz"
    matrix = {"loss_matrix": losses()[:, : len(values)], "axis_values": np.asarray(values, float)}
    np.savez(source, axis_name=np.array(axis), **matrix)
    import_run(source, tmp_path / "run", ImportSettings(axis=axis, unit=unit))
    return tmp_path / "run"


def test_an_imported_run_is_seen_over_its_own_axis(tmp_path):
    billions = [0.25 * step for step in STEPS]
    view = RunWatcher(imported(tmp_path, "T", billions, "billion-tokens")).look()
    assert (view.unit, view.time_of(view.records[-1].step)) == ("billion-tokens", billions[-1])
    assert view.progress.time == billions[-1]
    np.testing.assert_array_equal(view.progress.state_N, states_of(losses(), billions))


def test_runs_of_several_sizes_have_no_progress(tmp_path):
    watcher = RunWatcher(imported(tmp_path, "M", [1e6, 2e6, 4e6, 8e6], "parameters"))
    with pytest.raises(TokscaleError, match=r"along the axis M, .*; name another run"):
        watcher.look()


def test_a_directory_without_a_run_is_refused(tmp_path):
    with pytest.raises(TokscaleError, match=r"no run in .*; name the directory of a run"):
        RunWatcher(tmp_path).look()
    write_run(tmp_path / "run", STEPS, losses())
    watcher = RunWatcher(tmp_path / "run")
    watcher.look()
    shutil.move(tmp_path / "run", tmp_path / "elsewhere")
    with pytest.raises(TokscaleError, match="no run in"):
        watcher.look()
    shutil.move(tmp_path / "elsewhere", tmp_path / "run")
    assert watcher.look() is None, "a look that failed forgets nothing"
