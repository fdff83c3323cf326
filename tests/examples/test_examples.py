"""The launch script of a large job asks for nothing that the plugin or Megatron would not take."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from jobs import job_environment

from megatron_tokscale.probe import ProbeSet

SCRIPT = Path(__file__).parents[2] / "examples/train_6b.sh"
LENGTH, VOCABULARY = 4096, 128256


@pytest.fixture(scope="module")
def probe_set(tmp_path_factory):
    shape = (245, LENGTH)
    zeros = np.zeros(shape, np.int32)
    path = tmp_path_factory.mktemp("six") / "probe.safetensors"
    ProbeSet(
        *(zeros, zeros, np.ones(shape, bool), zeros, zeros, zeros.astype(np.int16)),
        ("web",),
        VOCABULARY,
    ).save(path)
    return path


def run(action, probe_set, tmp_path):
    environment = job_environment() | {
        "ACTION": action,
        "PROBE": str(probe_set),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
    }
    command = ["bash", str(SCRIPT), str(tmp_path / "run"), "1.0", "web"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_the_doctor_refuses_nothing(probe_set, tmp_path):
    job = run("doctor", probe_set, tmp_path)
    assert job.returncode == 0, job.stdout + job.stderr
    assert "REFUSED" not in job.stdout
    assert "the probe supports all of Megatron's settings" in job.stdout
    assert "not among this Megatron's flags" not in job.stdout
    assert f"fits: {245 * LENGTH} tokens" in job.stdout


def test_the_probes_cost_well_under_a_thousandth(probe_set, tmp_path):
    job = run("plan", probe_set, tmp_path)
    assert job.returncode == 0, job.stderr
    assert "71,525 steps, 299,997,593,600 tokens" in job.stdout
    share = float(job.stdout.split("% of the training")[0].split()[-1])
    assert 0.01 < share < 0.03
