"""A probe set of a job on the one rank that has its losses; the others wait for that rank."""

from argparse import Namespace

import numpy as np
import pytest
from runs import plain_probe_set

from megatron_tokscale.training.probe import probe_store
from megatron_tokscale.training.probe.watched_set import WatchedSet
from megatron_tokscale.training.settings import ProbeSetFile

N_TOKENS = 32


@pytest.fixture
def watched(monkeypatch, tmp_path):
    """A probe set named `code`, in a process without Megatron's groups."""
    monkeypatch.setattr(probe_store, "is_writer", lambda: True)
    monkeypatch.setattr(probe_store, "model_info", lambda args: {})
    file = ProbeSetFile(tmp_path / "code.safetensors", "code")
    settings = Namespace(stops_on_write_error=False, fall_threshold=0.1)
    args = Namespace(tokenizer_type="NullTokenizer")
    return WatchedSet(file, plain_probe_set(N_TOKENS), settings, tmp_path, args)


@pytest.mark.parametrize("error", [ValueError("no such state"), MemoryError("no such state")])
def test_an_error_of_the_metrics_costs_the_metrics_of_one_probe_alone(
    watched, monkeypatch, capsys, error
):
    def fail(*_):
        raise error

    first_N, second_N, third_N = np.float32([8, 4, 2])[:, None] * np.ones(N_TOKENS, np.float32)
    watched.measure(1, first_N)
    with monkeypatch.context() as patch:
        patch.setattr(watched._metrics, "measure", fail)
        values_V = watched.measure(2, second_N)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("the code probe at step 2 are not in the log: no such state")
    assert values_V.shape == watched.measure(2, None).shape
    assert watched.named(values_V + watched.measure(2, None)) == {}
    named = watched.named(watched.measure(3, third_N))
    assert named["code/probe loss"] == 2
    assert named["code/share of tokens fallen by 0.1 nats"] == 1
    assert watched.previous_N is third_N
