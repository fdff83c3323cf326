"""Training outlives a store that cannot be written, or stops with one line if told to."""

import shutil
import subprocess
import sys
import time

import pytest
from disks import small_disk
from jobs import Corpus, job_environment, job_flags, run_alone, torchrun

from megatron_tokscale.store import Run
from megatron_tokscale.store.losses import list_losses

pytestmark = pytest.mark.megatron


def flags_for(corpus: Corpus, run, checkpoints, *extra):
    probe = ("--tokscale-probe-set", str(corpus.probe_set), "--tokscale-dir", str(run))
    save = ("--save", str(checkpoints), "--save-interval", "3", "--train-iters", "3")
    return (*probe, *save, *extra)


def is_trained(checkpoints, steps=3):
    name = "latest_checkpointed_iteration.txt"
    return (checkpoints / name).read_text() == str(steps)


def test_a_full_disk(corpus, tmp_path):
    """There is room for two files of losses, not for four."""
    size = files_size(corpus) + 2 * 4096
    with small_disk(tmp_path / "run", size) as run:
        job = run_alone(corpus, *flags_for(corpus, run, tmp_path / "checkpoints"))
        assert job.returncode == 0, job.stderr[-3000:]
        assert "No space left" in job.stdout
        assert "training continues WITHOUT probes" in job.stdout
        assert is_trained(tmp_path / "checkpoints")
        whole = Run.open(run)
        assert 0 < len(whole.records) < 4
        whole.verify()
        assert not list(run.rglob("*.tmp"))


def files_size(corpus):
    """Bytes that the files of a run take before its first losses, in whole pages."""
    fixed = [corpus.probe_set.stat().st_size, 2000, 1, 4000]
    return sum(-(-size // 4096) * 4096 for size in fixed)


def test_a_read_only_directory(corpus, tmp_path):
    with small_disk(tmp_path / "run", "1m", "ro") as run:
        job = run_alone(corpus, *flags_for(corpus, run, tmp_path / "checkpoints"))
    assert job.returncode == 0, job.stderr[-3000:]
    assert "Read-only file system" in job.stdout
    assert "training continues WITHOUT probes" in job.stdout
    assert is_trained(tmp_path / "checkpoints")


@pytest.mark.parametrize("policy", ["continue", "abort"])
def test_a_run_directory_deleted_in_mid_training(corpus, tmp_path, policy):
    run, log = tmp_path / "run", tmp_path / "log"
    flags = flags_for(corpus, run, tmp_path / "checkpoints", "--tokscale-on-write-error", policy)
    flags = (*flags, "--train-iters", "60", "--tokscale-probe-schedule", "linear:1")
    target = ["-m", "megatron_tokscale.pretrain", *job_flags(corpus, *flags)]
    with log.open("w") as output:
        job = subprocess.Popen(
            torchrun(1, target), env=job_environment(), stdout=output, stderr=output
        )
        while 2 not in list_losses(run / "tokscale/losses"):
            assert job.poll() is None, log.read_text()[-3000:]
            time.sleep(0.01)
        shutil.rmtree(run)
        status = job.wait(timeout=300)
    text = log.read_text()
    assert text.count("the run directory is gone") == 1, text[-3000:]
    assert not run.exists()
    if policy == "continue":
        assert status == 0
        assert is_trained(tmp_path / "checkpoints", 60)
    else:
        assert status != 0
        assert text.count("megatron-tokscale: losses cannot be written") == 1


def test_abort_stops_the_job_with_one_line(corpus, tmp_path):
    run = tmp_path / "run"
    (run / "tokscale").mkdir(parents=True)
    (run / "tokscale" / "losses").write_text("in the way")
    flags = flags_for(corpus, run, tmp_path / "c", "--tokscale-on-write-error", "abort")
    job = run_alone(corpus, *flags)
    assert job.returncode == 2
    ours = [line for line in job.stderr.splitlines() if line.startswith("megatron-tokscale:")]
    assert len(ours) == 1
    assert "losses cannot be written" in ours[0]


HOLDER = """
import sys, time, pathlib
from megatron_tokscale.store.lock import RunLock
lock = RunLock(pathlib.Path(sys.argv[1]))
assert lock.acquire()
print("held", flush=True)
time.sleep(600)
"""


def test_a_second_job_on_the_same_directory_is_refused(corpus, tmp_path):
    folder = tmp_path / "run" / "tokscale"
    folder.mkdir(parents=True)
    command = [sys.executable, "-c", HOLDER, str(folder / ".lock")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout.readline() == "held\n"
            flags = flags_for(corpus, tmp_path / "run", tmp_path / "checkpoints")
            job = run_alone(corpus, *flags)
        finally:
            holder.kill()
        assert job.returncode == 2
        ours = [line for line in job.stderr.splitlines() if line.startswith("megatron-tokscale:")]
        assert len(ours) == 1
        assert f"process {holder.pid}" in ours[0]
        assert sorted(path.name for path in folder.iterdir()) == [".lock", "losses"]
        assert not (tmp_path / "checkpoints").exists()
    # The lock ended with its holder, though nobody gave it back.
    job = run_alone(corpus, *flags)
    assert job.returncode == 0, job.stderr[-3000:]


def test_half_precision_on_request(corpus, tmp_path):
    flags = ("--tokscale-probe-set", str(corpus.probe_set), "--tokscale-dir", str(tmp_path))
    job = run_alone(corpus, *flags, "--train-iters", "1", "--tokscale-loss-dtype", "float16")
    assert job.returncode == 0, job.stderr[-3000:]
    size = (tmp_path / "tokscale/losses/step_00000001.safetensors").stat().st_size
    n_tokens = Run.open(tmp_path).n_tokens
    assert 2 * n_tokens < size < 2 * n_tokens + 2000
