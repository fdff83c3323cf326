"""The fit's CUDA path on a labelled device: the CPU's classes, full precision, bounded memory.

Shapes: N tokens, K probe steps.
"""

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from labelled_device import labelled_cuda, tf32_allowed
from scipy.special import expit

from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.fit import FitStatus, TokenClass, block, fit_sigmoids, sigmoids
from megatron_tokscale.fit.grid import Grid
from megatron_tokscale.fit.probe_axis import ProbeAxis

N_TOKENS, N_PROBES = 240, 24
X_K = np.log(np.geomspace(1, 1e5, N_PROBES))


@pytest.fixture(scope="module")
def loss_NK():
    """Losses of one sigmoid, of two, of a ramp, and constant ones, with noise of 0.1 nats."""
    rng = np.random.default_rng(1)
    kind_N = np.arange(N_TOKENS) % 4
    midpoint_N1, width_N1 = rng.uniform(2, 9, (N_TOKENS, 1)), rng.uniform(0.1, 1.5, (N_TOKENS, 1))
    one_NK = 3 * expit((midpoint_N1 - X_K) / width_N1)
    two_NK = one_NK + 1.5 * expit((midpoint_N1 + 3 - X_K) / width_N1)
    onset_N1 = rng.uniform(0, 5, (N_TOKENS, 1))
    ramp_NK = -rng.uniform(0.1, 0.4, (N_TOKENS, 1)) * np.maximum(X_K - onset_N1, 0)
    curves = np.stack([one_NK, two_NK, ramp_NK, np.zeros_like(one_NK)])
    noise_NK = rng.normal(0, 0.1, one_NK.shape)
    return (4 + curves[kind_N, np.arange(N_TOKENS)] + noise_NK).astype(np.float32)


@pytest.fixture(scope="module")
def on_cpu(loss_NK):
    return fit_sigmoids(X_K, loss_NK)


@pytest.fixture
def on_cuda(loss_NK):
    """A function () -> the fits of the CUDA path."""

    def fit():
        with labelled_cuda():
            return fit_sigmoids(X_K, loss_NK, device="cuda")

    return fit


@pytest.mark.slow
def test_classes_are_the_cpus(loss_NK):
    """Tokens that miss losses, some too many, are there as well."""
    loss_NK = loss_NK[:160].copy()
    loss_NK[::7, 11] = np.nan
    loss_NK[5, 4:] = np.inf
    on_cpu = fit_sigmoids(X_K, loss_NK)
    with labelled_cuda() as gpu:
        on_cuda = fit_sigmoids(X_K, loss_NK, device="cuda")
        assert gpu.operations > 10_000, "nothing has run on the device"
    assert len(np.unique(on_cpu.class_N)) > 4
    np.testing.assert_array_equal(on_cuda.class_N, on_cpu.class_N)
    is_same_N = np.isclose(on_cuda.sse_N, on_cpu.sse_N, rtol=1e-3, equal_nan=True)
    assert is_same_N.mean() > 0.98
    moves_N = on_cpu.is_class(TokenClass.FALLING) & (on_cpu.status_N == FitStatus.CONVERGED)
    off_N = np.abs(on_cuda.midpoint_N - on_cpu.midpoint_N) / on_cpu.midpoint_se_N
    assert moves_N.sum() > 20
    assert off_N[moves_N].max() < 0.1


@pytest.mark.slow
def test_tf32_changes_no_class(on_cpu, on_cuda, monkeypatch):
    with tf32_allowed():
        np.testing.assert_array_equal(on_cuda().class_N, on_cpu.class_N)
        monkeypatch.setattr(sigmoids, "full_precision", nullcontext)
        assert (on_cuda().class_N != on_cpu.class_N).sum() >= 3, "it would change some"


@pytest.mark.parametrize("is_allowed", [False, True])
def test_tf32_is_off_in_the_fit_and_restored_after_it_and_after_an_error(is_allowed, monkeypatch):
    matmul, seen = torch.backends.cuda.matmul, []

    def fails(*_):
        seen.append((matmul.fp32_precision, matmul.allow_tf32 if not is_allowed else False))
        raise TokscaleError("no block is fitted")

    monkeypatch.setattr(block, "fit_block", fails)
    with tf32_allowed() if is_allowed else nullcontext():
        before = matmul.fp32_precision
        with labelled_cuda(), pytest.raises(TokscaleError, match="no block"):
            fit_sigmoids(X_K, np.zeros((3, N_PROBES), np.float32), device="cuda")
        assert matmul.fp32_precision == before
    assert seen == [("ieee", False)]


@pytest.mark.parametrize("n_tokens", [5 * 2**12, 10**6])
def test_a_block_of_a_gpu_is_divided_for_memory_only(n_tokens, monkeypatch):
    blocks = []
    monkeypatch.setattr(block, "fit_block", lambda axis, grid, loss, _: blocks.append(len(loss)))
    monkeypatch.setattr(sigmoids.SigmoidFits, "concatenate", lambda fits: None)
    loss_NK = torch.zeros(1, N_PROBES).expand(n_tokens, -1)
    with labelled_cuda():
        fit_sigmoids(X_K, loss_NK, device="cuda")
    assert blocks == [n_tokens]
    assert sigmoids._block_tokens(10**9, 60, on_cpu=False) * 60 <= 2**26


@pytest.mark.parametrize("n_probes", [8, 10, 60, 500])
def test_chunks_keep_a_gpu_busy_and_every_table_below_a_gigabyte(n_probes):
    axis = ProbeAxis.from_x(np.log(np.geomspace(1, 1e5, n_probes)))
    n_tokens = block.cuda_chunk_tokens(Grid.over(axis, torch.device("cpu")))
    assert n_tokens * 7 * n_probes * 4 <= 2**30
    assert n_tokens >= 10**5 or n_probes > 60


@pytest.mark.slow
def test_the_largest_table_of_a_fit_has_the_size_that_is_set(monkeypatch):
    """At few probes the search for pairs of cells has it: more than 1,500 values a token."""
    loss_NK = np.random.default_rng(0).normal(size=(600, 8)).astype(np.float32).cumsum(axis=1)
    monkeypatch.setattr(block, "_CUDA_TABLE_VALUES", 2**16)
    with labelled_cuda() as gpu:
        fit_sigmoids(np.arange(8.0), loss_NK, device="cuda")
    assert gpu.largest <= 2**16 * 4
