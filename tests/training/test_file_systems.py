"""Jobs on file systems whose folders cannot be synced."""

import os
import subprocess
import sys

import pytest
from jobs import Corpus, free_port, job_environment, job_flags
from planned_jobs import plan_of

from megatron_tokscale.store import Run

pytestmark = pytest.mark.megatron

NO_FSYNC = """
import errno, os, stat
_fsync = os.fsync
def fsync(descriptor):
    if stat.S_ISDIR(os.fstat(descriptor).st_mode):
        raise OSError(errno.EINVAL, "Invalid argument")
    _fsync(descriptor)
os.fsync = fsync
"""


@pytest.fixture
def no_fsync(tmp_path):
    """An environment in which no process can sync a folder."""
    folder = tmp_path / "site"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(NO_FSYNC)
    path = f"{folder}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    return job_environment() | {
        "PYTHONPATH": path,
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }


def test_a_job_with_probes_and_a_plan_keeps_its_files(corpus: Corpus, tmp_path, no_fsync):
    plan = plan_of(corpus.prefixes, {0: (1, 1), 9: (3, 1)})
    plan.save(tmp_path / "plan.json")
    flags = ["--tokscale-probe-set", str(corpus.probe_set), "--tokscale-probe-schedule", "linear:1"]
    flags += ["--tokscale-plan", str(tmp_path / "plan.json"), "--tokscale-dir", str(tmp_path)]
    flags += ["--data-cache-path", str(tmp_path / "cache"), "--train-iters", "2"]
    command = [sys.executable, "-m", "megatron_tokscale.pretrain", *job_flags(corpus, *flags)]
    job = subprocess.run(command, env=no_fsync, capture_output=True, text=True, check=False)
    assert job.returncode == 0, job.stderr[-3000:]
    assert "WITHOUT" not in job.stdout
    assert [record.step for record in Run.open(tmp_path).records] == [0, 1, 2]
    assert (tmp_path / "tokscale/plan.json").exists()
    assert list((tmp_path / "cache").glob("*tokscale*.npy"))
