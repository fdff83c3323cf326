"""Planted trajectories, and a run on disk that holds them."""

import multiprocessing
from functools import partial

import pytest
from planted import sigmoids
from runs import write_run


@pytest.fixture(scope="session")
def planted():
    """A function (n_tokens, n_probes, seed) -> sigmoids over wide ranges, with white noise."""
    return sigmoids


@pytest.fixture(scope="session")
def forkserver():
    """Starts processes that have imported everything, and computed nothing."""
    context = multiprocessing.get_context("forkserver")
    rooms = ["megatron_tokscale.cli.fit", "megatron_tokscale.fit.block"]
    context.set_forkserver_preload([*rooms, "pyarrow.parquet", "torch.distributed"])
    return context


@pytest.fixture
def make_run(tmp_path):
    """A function (steps, loss_NK) -> an opened run of two datasets, documents of eight tokens."""
    return partial(write_run, tmp_path / "run")
