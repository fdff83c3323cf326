"""Jobs of several launches, and what the records of their runs hold, for tests."""

from pathlib import Path

import pytest
from jobs import EOD, TRAINING, VOCAB_SIZE, Corpus, job_flags, run_forked
from megatrons import INSTALLED, python_path

from megatron_tokscale.probe.build import ProbeSettings, build_probe_set
from megatron_tokscale.store import Run

RATE = 3e-3
CONSTANT = ("--lr-decay-style", "constant", "--lr-warmup-iters", "0", "--lr-decay-iters", "64")
BY_SAMPLES = ("--lr-decay-style", "constant", "--lr-decay-samples", "512")
USE_CHECKPOINT = "--use-checkpoint-opt_param-scheduler"
EVERY_4 = ("--save-interval", "4")
IN_ITERS = ("--lr-decay-iters", "--lr-warmup-iters")


def train(
    corpus: Corpus, *flags: str, without: tuple[str, ...] = (), version: str = INSTALLED
) -> str:
    words = ("-m", "megatron_tokscale.pretrain", *job_flags(corpus, *flags, without=without))
    return run_forked(1, *words, python_path=python_path(version))


def by_samples(
    corpus: Corpus, *flags: str, without: tuple[str, ...] = (), version: str = INSTALLED
) -> str:
    without = (*IN_ITERS, *without)
    return train(corpus, *BY_SAMPLES, *flags, without=without, version=version)


def probe(corpus: Corpus, schedule: str = "linear:4") -> tuple[str, ...]:
    return ("--tokscale-probe-set", str(corpus.probe_set), "--tokscale-probe-schedule", schedule)


def replay(corpus: Corpus, folder: Path, out: Path, *flags: str, version: str = INSTALLED) -> Run:
    words = ("--tokscale-probe-set", str(corpus.probe_set), "--tokscale-replay", str(folder))
    flags = ("--tokscale-dir", str(out), "--lr", "1", "--train-iters", "2", *flags)
    train(corpus, *words, *flags, version=version)
    return Run.open(out)


def sums(run: Run) -> dict[int, float]:
    return {record.step: record.lr_sum for record in run.records}


def tokens(run: Run) -> dict[int, int | None]:
    return {record.step: record.consumed_tokens for record in run.records}


def constant_sums(*steps: int) -> object:
    return pytest.approx({step: RATE * step for step in steps}, rel=1e-12)


def make_probe_set(corpus: Corpus, path: Path, seq_length: int) -> None:
    settings = ProbeSettings(
        data_path=corpus.data_path,
        split=TRAINING["--split"],
        seq_length=seq_length,
        vocab_size=VOCAB_SIZE,
        n_tokens=700,
        eod=EOD,
    )
    build_probe_set(settings).save(path)


def logged_rates(output: str) -> list[float]:
    """The learning rate of each step, as Megatron logs it after the step: the next one's."""
    lines = [line for line in output.splitlines() if " learning rate: " in line]
    return [float(line.split(" learning rate: ")[1].split()[0]) for line in lines]
