"""Planted losses with local transitions, and a run on disk that holds them.

Shapes: N tokens, K probe steps.
"""

from functools import partial

import numpy as np
import pytest
from runs import log_time, probe_steps, write_run
from scipy.special import expit


@pytest.fixture
def local_losses():
    """Sigmoids with narrow, spread-out transitions: (steps, loss_NK, midpoint_N, drop_N)."""
    rng = np.random.default_rng(0)
    steps = probe_steps(50, last=5000)
    n_tokens = 1600
    midpoint, drop = rng.normal(5.5, 0.8, n_tokens), rng.uniform(1, 6, n_tokens)
    curve = 1 + drop[:, None] * expit((midpoint[:, None] - log_time(steps)) / 0.15)
    loss = curve + 0.1 * rng.standard_normal(curve.shape)
    return steps, loss.astype(np.float32), midpoint, drop


@pytest.fixture
def make_run(tmp_path):
    """A function (steps, loss_NK) -> an opened run of two datasets, documents of eight tokens."""
    return partial(write_run, tmp_path / "run")
