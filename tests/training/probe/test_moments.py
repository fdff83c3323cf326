"""Probes at checkpoints, token counts and the exit, and their metrics in the log."""

import os
import signal
import subprocess
import time

import numpy as np
import pytest
from jobs import SEQ_LENGTH, TRAINING, Corpus, job_environment, job_flags, run_job, torchrun

from megatron_tokscale.store import Run
from megatron_tokscale.store.progress import ProgressTracker
from megatron_tokscale.store.token_state import TokenState

pytestmark = pytest.mark.megatron

BATCH = int(TRAINING["--global-batch-size"])


def probe_flags(corpus, run, schedule):
    flags = ("--tokscale-probe-set", str(corpus.probe_set), "--tokscale-dir", str(run))
    return (*flags, "--tokscale-probe-schedule", schedule)


def test_checkpoints_tokens_and_an_exit_interval(corpus: Corpus, tmp_path):
    tokens = BATCH * SEQ_LENGTH
    schedule = f"checkpoints+tokens:list:0,{4 * tokens},{4 * tokens + 1}"
    save = ("--save", str(tmp_path / "save"), "--save-interval", "3", "--exit-interval", "8")
    flags = (*probe_flags(corpus, tmp_path, schedule), *save, "--train-iters", "16")
    run_job(corpus, 2, *flags, "--load", str(tmp_path / "save"))
    # 0, and 4 and 5 for their tokens; 3 and 6 are saved regularly, 8 at the exit.
    assert Run.open(tmp_path).step_K.tolist() == [0, 3, 4, 5, 6, 8]
    run_job(
        corpus, 2, *flags, "--load", str(tmp_path / "save"), "--tokscale-probe-schedule", "list:10"
    )
    assert Run.open(tmp_path).step_K.tolist() == [0, 3, 4, 5, 6, 8, 10]


def test_one_more_probe_after_a_signal(corpus: Corpus, tmp_path):
    log = tmp_path / "log"
    flags = (*probe_flags(corpus, tmp_path, "list:0"), "--tokscale-probe-at-exit")
    flags = (*flags, "--exit-signal-handler", "--train-iters", "5000", "--lr-decay-iters", "5000")
    command = torchrun(2, ["-m", "megatron_tokscale.pretrain", *job_flags(corpus, *flags)])
    with log.open("w") as output:
        job = subprocess.Popen(command, env=job_environment(), stdout=output, stderr=output)
        deadline = time.monotonic() + 300
        while "iteration        3/" not in log.read_text():
            assert job.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.05)
        for rank in rank_processes(job.pid):
            os.kill(rank, signal.SIGTERM)
        assert job.wait(timeout=120) == 0, log.read_text()[-3000:]
    assert "exiting program after receiving SIGTERM" in log.read_text()
    first, last = Run.open(tmp_path).step_K.tolist()
    assert first == 0
    assert 3 <= last < 5000


def rank_processes(launcher):
    import psutil

    return [process.pid for process in psutil.Process(launcher).children()]


def test_metrics_in_tensorboard_are_those_of_the_losses(corpus: Corpus, tmp_path):
    """The second job resumes at step 6: its first metrics depend on losses from disk."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    save = str(tmp_path / "save")
    flags = (*probe_flags(corpus, tmp_path, "linear:1"), "--save", save, "--load", save)
    flags = (*flags, "--save-interval", "6")
    board = ("--tensorboard-dir", str(tmp_path / "board"), "--tokscale-fall-threshold", "0.01")
    layout = ("--train-iters", "8", "--tensor-model-parallel-size", "2")
    run_job(corpus, 2, *flags, *board, *layout, "--exit-interval", "6")
    run_job(corpus, 2, *flags, *board, *layout)
    run = Run.open(tmp_path)
    steps = run.step_K.tolist()
    assert steps == list(range(9))
    loss_NK = run.read_losses().astype(np.float64)
    of_datasets = {
        f"/{dataset}": run.probe_set.dataset_N == number
        for number, dataset in enumerate(run.probe_set.datasets)
    }

    events = EventAccumulator(str(tmp_path / "board")).Reload()

    def logged(name):
        return {event.step: event.value for event in events.Scalars(f"tokscale/{name}")}

    def expected(values_K, steps=steps):
        return pytest.approx(dict(zip(steps, values_K, strict=True)), rel=1e-5)

    for name, of_N in {"": run.probe_set.dataset_N >= 0, **of_datasets}.items():
        mean_K = loss_NK[of_N].mean(axis=0)
        assert logged(f"probe loss{name}") == expected(mean_K)
        octave_ago = [step // 2 for step in steps[1:]]  # all steps have probes
        fall_K = mean_K[octave_ago] - mean_K[1:]
        assert logged(f"nats learned in the last octave{name}") == expected(fall_K, steps[1:])
    fallen_K = (loss_NK[:, :-1] - loss_NK[:, 1:] > 0.01).mean(axis=0)
    assert 0 < fallen_K[-1] < 1
    assert logged("share of tokens fallen by 0.01 nats") == expected(fallen_K, steps[1:])
    for state in (TokenState.UNDER_WAY, TokenState.FORGOTTEN):
        share_K = [(states_at(loss_NK, step) == state).mean() for step in steps[5:]]
        assert logged(f"share of tokens {state.label}") == expected(share_K, steps[5:])
    by_samples = logged("probe loss vs samples")
    assert list(by_samples) == [step * BATCH for step in steps]
    assert not any("bits per byte" in tag for tag in events.Tags()["scalars"])  # ids are no text


def states_at(loss_NK, step):
    tracker = ProgressTracker()
    for before in range(step + 1):
        tracker.add(before, loss_NK[:, before].astype(np.float32))
    return tracker.progress().state_N
