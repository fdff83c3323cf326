"""Small probe sets, and losses of them with their record."""

import numpy as np

from megatron_tokscale.probe import ProbeSet
from megatron_tokscale.store import LossRecord


def make_probe_set(n_sequences=3, seed=0):
    generator = np.random.default_rng(seed)
    shape = (n_sequences, 5)
    return ProbeSet(
        generator.integers(0, 9, shape, dtype=np.int32),
        generator.integers(0, 9, shape, dtype=np.int32),
        generator.random(shape) < 0.8,
        np.zeros(shape, np.int32),
        np.tile(np.arange(1, 6, dtype=np.int32), (n_sequences, 1)),
        np.zeros(shape, np.int16),
        ("only",),
        9,
    )


def record(step, probe_set, **changes):
    values = {
        "step": step,
        "consumed_samples": 8 * step,
        "consumed_tokens": 40 * step,
        "learning_rate": 1e-3,
        "lr_sum": step * 5e-4,
        "training_loss": float("nan"),
        "wall_time": 1.5e9,
        "duration": 0.25,
        "probe_fingerprint": probe_set.fingerprint,
        "versions": "torch 2",
    }
    return LossRecord(**values | changes)


def loss_of(step, probe_set):
    return np.random.default_rng(step).random(probe_set.n_tokens).astype(np.float32)
