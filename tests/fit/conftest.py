"""Planted trajectories, and a run on disk that holds them.

Shapes: N tokens, K probe steps.
"""

from dataclasses import dataclass
from functools import partial

import numpy as np
import pytest
from runs import log_time, probe_steps, write_run
from scipy.special import expit


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
    return partial(write_run, tmp_path / "run")
