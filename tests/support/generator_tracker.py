"""A stand-in for Transformer Engine's tracker: its states are generators, changed in place."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from megatron_tokscale import cpu

cpu.enable()

from megatron.core.tensor_parallel import random as megatron_random  # noqa: E402


class GeneratorTracker(megatron_random.CudaRNGStatesTracker):
    """A tracker whose states are `torch.Generator`s, from which CUDA graphs could draw."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.use_cudagraphable_rng = True

    def add(self, name: str, seed: int) -> None:
        self._is_initialized = True
        self.states_[name] = torch.Generator().manual_seed(seed)

    @contextmanager
    def fork(self, name: str = "model-parallel-rng") -> Iterator[None]:
        outer = torch.get_rng_state()
        torch.set_rng_state(self.states_[name].get_state())
        try:
            yield
        finally:
            self.states_[name].set_state(torch.get_rng_state())
            torch.set_rng_state(outer)


def install() -> None:
    """Let Megatron make this tracker in the place of its own."""
    megatron_random.CudaRNGStatesTracker = GeneratorTracker


def draw() -> None:
    """Draw from the tracker, as cuDNN's attention does in any mode."""
    tracker = megatron_random.get_cuda_rng_tracker()
    assert isinstance(tracker.get_states()["model-parallel-rng"], torch.Generator)
    with tracker.fork():
        torch.rand(1)
