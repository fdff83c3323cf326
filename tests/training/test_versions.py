"""The plugin in older Megatrons: real jobs on the wheels that `make env` lays over one torch."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoints import checkpoint_differences
from jobs import Corpus, job_environment, job_flags, run_forked
from megatrons import INSTALLED, OLD, python_path
from numpy.testing import assert_allclose

from megatron_tokscale.store import Run, RunPaths
from megatron_tokscale.store.sample_losses import SampleLosses
from megatron_tokscale.training.plugin import HOOKS

pytestmark = pytest.mark.megatron

TP2_PP2 = ("--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2")
SHARDED = ("--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather")
OVERFLOWING = ("--fp16", "--initial-loss-scale", str(2**20), "--hysteresis", "1")
STEPS = [0, 1, 2, 4, 6]


def train(version: str, corpus: Corpus, n_processes: int, *flags: str) -> str:
    """Train under a Megatron of this version and return the job's output."""
    flags = job_flags(corpus, "--train-iters", "6", "--save-interval", "6", *flags)
    words = ("-m", "megatron_tokscale.pretrain", *flags)
    return run_forked(n_processes, *words, python_path=python_path(version))


def probed(corpus: Corpus, run: Path) -> tuple[str, ...]:
    return (
        *("--tokscale-probe-set", str(corpus.probe_set), "--save", str(run)),
        *("--tokscale-probe-schedule", "linear:2+list:1", "--tokscale-verify-isolation"),
        "--tokscale-sample-losses",
    )


def check_samples(run: Path) -> None:
    """Each step has its samples, skipped or not, and their sum is the loss that Megatron logs."""
    losses = SampleLosses.of_training(RunPaths(run).samples)
    assert losses.read(1, 6)["sample"].tolist() == list(range(6 * 8))
    logged = {record.step: record.training_loss for record in Run.open(run).records[1:]}
    mean = dict(zip(range(1, 7), losses.step_sums().mean_T, strict=True))
    assert_allclose([mean[step] for step in logged], list(logged.values()), rtol=2e-6)


def recorded_version(run: Path) -> str:
    content = json.loads((run / "tokscale/run.json").read_text())
    return content["launches"][-1]["versions"]["megatron-core"]


@pytest.fixture(scope="module")
def losses_NK(corpus: Corpus, tmp_path_factory):
    """What the probes of the installed Megatron give."""
    run = tmp_path_factory.mktemp("installed")
    train(INSTALLED, corpus, 4, *TP2_PP2, *probed(corpus, run))
    assert recorded_version(run) == INSTALLED
    return Run.open(run).read_losses()


@pytest.mark.parametrize("version", OLD)
def test_probes_give_the_same_losses_and_leave_no_trace(corpus, tmp_path, losses_NK, version):
    with_probes, without = tmp_path / "with", tmp_path / "without"
    train(version, corpus, 4, *TP2_PP2, *probed(corpus, with_probes))
    train(version, corpus, 4, *TP2_PP2, "--save", str(without))
    run = Run.open(with_probes)
    assert recorded_version(with_probes) == version
    assert run.step_K.tolist() == STEPS
    assert checkpoint_differences(without, with_probes) == []
    check_samples(with_probes)
    assert losses_NK[:, -1].mean() < losses_NK[:, 0].mean() - 0.1
    assert_allclose(run.read_losses(), losses_NK, rtol=0, atol=1e-5)


@pytest.mark.parametrize("version", OLD)
def test_parameters_are_gathered_whether_or_not_a_step_was_taken(corpus, tmp_path, version):
    """fp16 skips the first steps here, and until one is taken Megatron gathers nothing itself."""
    output = train(version, corpus, 2, *SHARDED, *OVERFLOWING, *probed(corpus, tmp_path))
    assert "number of skipped iterations:   1" in output
    run = Run.open(tmp_path)
    assert recorded_version(tmp_path) == version
    assert run.step_K.tolist() == STEPS
    mean_K = run.read_losses().mean(axis=0)
    assert mean_K[1] == mean_K[0]
    check_samples(tmp_path)
    assert mean_K[-1] < mean_K[0] - 0.01


@pytest.mark.parametrize("version", [*OLD, INSTALLED])
def test_the_doctor_finds_every_hook(version):
    command = [sys.executable, "-m", "megatron_tokscale.cli", "doctor"]
    environment = job_environment() | {"PYTHONPATH": python_path(version)}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    lines = result.stdout.splitlines()
    assert sum(line.split()[:1] == ["found"] for line in lines) == len(HOOKS)
    assert any(line.split()[:3] == ["megatron-core", f"{version},", "wheel"] for line in lines)
    assert result.returncode == 0
