"""Runs on disk as a training job would leave them, with losses made by hand.

Shapes: N tokens, K probe steps.
"""

import json
from pathlib import Path

import numpy as np

from megatron_tokscale.probe import ProbeSet
from megatron_tokscale.store import (
    Batch,
    Identity,
    Launch,
    LearningRates,
    LossRecord,
    Run,
    RunPaths,
)
from megatron_tokscale.store.losses import write_losses

GLOBAL_BATCH = 4
PEAK_LEARNING_RATE = 1e-3


def probe_steps(n_probes, last=20_000):
    """Step 0 and n_probes - 1 distinct steps, evenly spaced in ln step as far as whole steps go."""
    steps = np.unique(np.round(np.geomspace(1, last, int(1.6 * n_probes))))
    chosen = np.linspace(0, len(steps) - 1, n_probes - 1).round().astype(int)
    return np.concatenate([[0], steps[chosen]]).astype(int)


def log_time(steps):
    with np.errstate(divide="ignore"):
        return np.log(np.asarray(steps, dtype=float))


def plain_probe_set(n_tokens):
    """Two datasets in turn, documents of eight tokens, every token another id."""
    shape = (n_tokens // 8, 8)
    assert n_tokens == shape[0] * shape[1]
    rows = np.arange(shape[0], dtype=np.int32)[:, None] * np.ones(8, dtype=np.int32)
    return ProbeSet(
        tokens_BS=np.zeros(shape, np.int32),
        labels_BS=np.arange(n_tokens, dtype=np.int32).reshape(shape),
        mask_BS=np.ones(shape, bool),
        document_BS=rows,
        position_BS=np.tile(np.arange(8, dtype=np.int32), (shape[0], 1)),
        dataset_BS=(rows % 2).astype(np.int16),
        datasets=("prose", "code"),
        vocab_size=n_tokens,
    )


def launch(step=0, *, seq_length=8, train_iters=None, batch=None, **changes):
    """A launch at a constant learning rate and batch size; `changes` replace its attributes."""
    batch = batch or Batch(
        global_batch_size=GLOBAL_BATCH, micro_batch_size=GLOBAL_BATCH, train_iters=train_iters
    )
    values = {
        "step": step,
        "consumed_samples": step * GLOBAL_BATCH,
        "consumed_tokens": step * GLOBAL_BATCH * seq_length,
        "lr_sum": step * PEAK_LEARNING_RATE,
        "scheduler_samples": step * GLOBAL_BATCH,
        "past": "the run's first job",
        "seq_length": seq_length,
        "batch": batch,
        "learning_rate": constant_rate(PEAK_LEARNING_RATE),
        "seed": 1234,
        "layout": {"world_size": 2, "tensor": 2, "pipeline": 1, "virtual_pipeline": None},
        "schedule": "log:per-octave=3",
        "versions": {"megatron-core": "0.19.2"},
    }
    return Launch(**values | changes)


def constant_rate(peak):
    return LearningRates(
        peak=peak,
        minimum=peak / 10,
        initial=0.0,
        decay_style="constant",
        warmup_samples=0.0,
        decay_samples=1.0,
    )


def write_run(path: Path, steps, loss_NK, probe_set: ProbeSet | None = None) -> Run:
    """A run as the training job leaves it, opened."""
    probe_set = probe_set or plain_probe_set(len(loss_NK))
    paths = RunPaths(path)
    probe_set.save(paths.probe_set)
    first = launch(seq_length=probe_set.seq_length, train_iters=int(steps[-1]))
    Identity(
        "0123456789abcdef",
        probe_set.fingerprint,
        model={"num_layers": 4, "hidden_size": 64, "num_experts": None},
        launches=(first,),
    ).save(paths.identity)
    for k, step in enumerate(map(int, steps)):
        record = LossRecord(
            step=step,
            consumed_samples=step * GLOBAL_BATCH,
            consumed_tokens=step * GLOBAL_BATCH * probe_set.seq_length,
            learning_rate=PEAK_LEARNING_RATE,
            lr_sum=step * PEAK_LEARNING_RATE,
            training_loss=float("nan") if step == 0 else float(loss_NK[:, k].mean()) + 0.1,
            wall_time=0.0,
            duration=0.5,
            probe_fingerprint=probe_set.fingerprint,
            versions="test",
        )
        losses_N = np.ascontiguousarray(loss_NK[:, k], dtype=np.float32)
        write_losses(paths.losses_at(step), losses_N, record)
    return Run.open(path)


def read_journal(path):
    """Read the events of a run in `path`, skipping a torn line."""
    file = RunPaths(path).journal
    if not file.exists():
        return []
    events = []
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            events.append(json.loads(line))
        except ValueError:
            continue
    return events
