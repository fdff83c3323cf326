"""The generators of Megatron's tracker are restored, as tensors or in place."""

import random

import numpy as np
import pytest
import torch
from megatron.core import tensor_parallel

from megatron_tokscale.training.probe.isolation.generators import (
    restored_generators,
    tracker_states,
)


class Tracker:
    """The part of a tracker that Megatron's and Transformer Engine's have in common."""

    def __init__(self, **states):
        self.states = states

    def get_states(self):
        return dict(self.states)

    def set_states(self, states):
        self.states = states


@pytest.fixture
def track(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_rng_state", torch.get_rng_state)
    monkeypatch.setattr(torch.cuda, "set_rng_state", torch.set_rng_state)

    def install(**states):
        tracker = Tracker(**states)
        monkeypatch.setattr(tensor_parallel, "get_cuda_rng_tracker", lambda: tracker)
        return tracker

    return install


def test_a_generator_is_restored_and_stays_the_same_object(track):
    generators = {name: torch.Generator().manual_seed(3) for name in ("model", "expert")}
    tracker = track(**generators)
    expected = torch.rand(5, generator=torch.Generator().manual_seed(3))
    before = tracker_states()
    with restored_generators():
        for generator in generators.values():
            torch.rand(7, generator=generator)
        assert not torch.equal(tracker_states()["model"], before["model"])
    for name, generator in generators.items():
        assert tracker.get_states()[name] is generator  # CUDA graphs have registered it
        assert torch.equal(torch.rand(5, generator=generator), expected)


def test_a_state_that_is_a_tensor_is_restored_from_a_copy(track):
    state = torch.arange(4)
    tracker = track(model=state)
    with restored_generators():
        state += 1  # in place, as a tracker that keeps its tensor would
        tracker.set_states({"model": state * 2})
    assert tracker.get_states()["model"].tolist() == [0, 1, 2, 3]


def test_generators_outside_the_tracker_are_restored(track):
    track()

    def draw():
        return random.random(), np.random.rand(), float(torch.rand(1))

    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    expected = draw()
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    with restored_generators():
        draw()
    assert draw() == expected
