"""Planted trajectories, and a run on disk that holds them.

Shapes: N tokens, K probe steps.
"""

from dataclasses import dataclass

import numpy as np
import pytest
from scipy.special import expit

from megatron_tokscale.files import write_json
from megatron_tokscale.probe import ProbeSet
from megatron_tokscale.store import Run
from megatron_tokscale.store.losses import LossRecord, losses_name, write_losses


def probe_steps(n_probes, last=20_000):
    """Step 0 and n_probes - 1 distinct steps, evenly spaced in ln step as far as whole steps go."""
    steps = np.unique(np.round(np.geomspace(1, last, int(1.6 * n_probes))))
    chosen = np.linspace(0, len(steps) - 1, n_probes - 1).round().astype(int)
    return np.concatenate([[0], steps[chosen]]).astype(int)


def log_time(steps):
    with np.errstate(divide="ignore"):
        return np.log(np.asarray(steps, dtype=float))


@dataclass
class Planted:
    x_K: np.ndarray
    loss_NK: np.ndarray
    floor_N: np.ndarray
    drop_N: np.ndarray
    midpoint_N: np.ndarray
    width_N: np.ndarray
    noise_N: np.ndarray


@pytest.fixture(scope="session")
def planted():
    """A function (n_tokens, n_probes, seed) -> sigmoids over wide ranges, with white noise."""

    def plant(n_tokens, n_probes, seed=0):
        rng = np.random.default_rng(seed)
        x_K = log_time(probe_steps(n_probes))
        floor, drop = rng.uniform(0, 3, n_tokens), rng.uniform(0.5, 8, n_tokens)
        midpoint = rng.uniform(2.5, 8.0, n_tokens)
        width = np.exp(rng.uniform(np.log(0.05), np.log(1.0), n_tokens))
        noise = np.exp(rng.uniform(np.log(0.05), np.log(0.4), n_tokens))
        clean = floor[:, None] + drop[:, None] * expit((midpoint[:, None] - x_K) / width[:, None])
        loss = clean + noise[:, None] * rng.standard_normal(clean.shape)
        return Planted(x_K, loss.astype(np.float32), floor, drop, midpoint, width, noise)

    return plant


@pytest.fixture
def make_run(tmp_path):
    """A function (steps, loss_NK) -> an opened run of two domains, documents of eight tokens."""

    def make(steps, loss_NK):
        n_tokens = len(loss_NK)
        shape = (n_tokens // 8, 8)
        assert n_tokens == shape[0] * shape[1]
        rows = np.arange(shape[0], dtype=np.int32)[:, None] * np.ones(8, dtype=np.int32)
        probe_set = ProbeSet(
            tokens_BS=np.zeros(shape, np.int32),
            labels_BS=np.arange(n_tokens, dtype=np.int32).reshape(shape),
            mask_BS=np.ones(shape, bool),
            document_BS=rows,
            position_BS=np.tile(np.arange(8, dtype=np.int32), (shape[0], 1)),
            domain_BS=(rows % 2).astype(np.int16),
            domains=("prose", "code"),
            vocab_size=n_tokens,
        )
        folder = tmp_path / "run" / "tokscale"
        probe_set.save(folder / "probe.safetensors")
        write_json(
            folder / "run.json", {"schema_version": 1, "probe_fingerprint": probe_set.fingerprint}
        )
        for k, step in enumerate(steps):
            record = LossRecord(
                step=int(step),
                consumed_samples=int(step) * 4,
                consumed_tokens=int(step) * 32,
                learning_rate=1e-3,
                lr_sum=float("nan"),
                training_loss=1.0,
                wall_time=0.0,
                duration=0.0,
                probe_fingerprint=probe_set.fingerprint,
                versions="test",
            )
            losses = np.ascontiguousarray(loss_NK[:, k], dtype=np.float32)
            write_losses(folder / "losses" / losses_name(int(step)), losses, record)
        return Run.open(tmp_path / "run")

    return make
