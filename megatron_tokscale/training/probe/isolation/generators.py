"""The five random generators that Megatron's checkpoints hold."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from megatron.core import tensor_parallel


@contextmanager
def restored_generators() -> Iterator[None]:
    """Restore the state of each generator after the block."""
    tracker = tensor_parallel.get_cuda_rng_tracker()
    tracked = tracker.get_states()
    states = tracker_states()
    python_state, numpy_state = random.getstate(), np.random.get_state()
    cpu_state, device_state = torch.get_rng_state(), torch.cuda.get_rng_state()
    try:
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        torch.set_rng_state(cpu_state)
        torch.cuda.set_rng_state(device_state)
        # A generator is restored in place: CUDA graphs have registered the object.
        for name, state in tracked.items():
            if isinstance(state, torch.Generator):
                state.set_state(states[name])
            else:
                tracked[name] = states[name]
        tracker.set_states(tracked)


def tracker_states() -> dict[str, torch.Tensor]:
    """Return a copy of each state in Megatron's tracker, by its name.

    The tracker of Transformer Engine, and Megatron's own for CUDA graphs, hold generators that a
    draw changes in place; Megatron's default tracker holds tensors.
    """
    tracked = tensor_parallel.get_cuda_rng_tracker().get_states()
    return {
        name: state.get_state() if isinstance(state, torch.Generator) else state.clone()
        for name, state in tracked.items()
    }
