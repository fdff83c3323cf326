"""Training outlives a disk that cannot be written, or stops with one line if told to."""

import pytest
from jobs import Corpus, run_alone

from megatron_tokscale.store import Run

pytestmark = pytest.mark.megatron


def broken_job(corpus: Corpus, tmp_path, *flags):
    """A job whose losses folder is a file."""
    run = tmp_path / "run"
    (run / "tokscale").mkdir(parents=True)
    (run / "tokscale" / "losses").write_text("in the way")
    probe = ("--tokscale-probe-set", str(corpus.probe_set), "--tokscale-dir", str(run))
    save = ("--save", str(tmp_path / "checkpoints"), "--save-interval", "3", "--train-iters", "3")
    return run_alone(corpus, *probe, *save, *flags)


def test_by_default_training_goes_on_without_probes(corpus, tmp_path):
    job = broken_job(corpus, tmp_path)
    assert job.returncode == 0, job.stderr[-3000:]
    assert "training goes on WITHOUT probes" in job.stdout
    assert "File exists" in job.stdout + job.stderr
    assert (tmp_path / "checkpoints/latest_checkpointed_iteration.txt").read_text() == "3"


def test_abort_stops_the_job_with_one_line(corpus, tmp_path):
    job = broken_job(corpus, tmp_path, "--tokscale-on-write-error", "abort")
    assert job.returncode == 2
    ours = [line for line in job.stderr.splitlines() if line.startswith("megatron-tokscale:")]
    assert len(ours) == 1
    assert "losses cannot be written" in ours[0]


def test_half_precision_on_request(corpus, tmp_path):
    flags = ("--tokscale-probe-set", str(corpus.probe_set), "--tokscale-dir", str(tmp_path))
    job = run_alone(corpus, *flags, "--train-iters", "1", "--tokscale-loss-dtype", "float16")
    assert job.returncode == 0, job.stderr[-3000:]
    size = (tmp_path / "tokscale/losses/step_00000001.safetensors").stat().st_size
    n_tokens = Run.open(tmp_path).n_tokens
    assert 2 * n_tokens < size < 2 * n_tokens + 2000
