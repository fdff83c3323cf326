"""A step at which no probe is due does not make the host wait for the device.

The hooks, the prober and its parts are the real ones; the losses and the learning rate are on a
labelled CUDA device.
"""

from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from labelled_device import labelled_cuda
from runs import plain_probe_set

from megatron_tokscale.training.calls import Call
from megatron_tokscale.training.history.counts import TrainingCounts
from megatron_tokscale.training.history.past import Past
from megatron_tokscale.training.plugin import Plugin
from megatron_tokscale.training.probe import probe_store, prober, take
from megatron_tokscale.training.probe.prober import Prober
from megatron_tokscale.training.settings import JobProbeSettings

SEQ_LENGTH = 8


class Scheduler:
    """Counts samples, like Megatron's; the rate falls with them."""

    num_steps = 0

    def get_lr(self, group):
        return 1e-3 / (1 + self.num_steps)


@pytest.fixture
def taken(monkeypatch) -> Iterator[list[int]]:
    """The steps at which a probe was taken; a probe reads the losses, as its record does."""
    steps: list[int] = []

    def note(self, state, counts, losses, sets, **_):
        steps.append(state.step)
        float(losses["lm loss"])

    monkeypatch.setattr(take.ProbeTaker, "take", note)
    timer = SimpleNamespace(stop=lambda: None, start=lambda **_: None)
    monkeypatch.setattr(prober, "get_timers", lambda: lambda *_, **__: timer)
    return steps


def make_prober(monkeypatch, folder: Path, args: Namespace, schedule: str) -> Prober:
    """A prober amid training, in a process without Megatron's groups."""
    monkeypatch.setattr(prober, "check_probe", lambda args: None)
    monkeypatch.setattr(probe_store, "is_writer", lambda: True)
    monkeypatch.setattr(probe_store, "model_info", lambda args: {})
    plain_probe_set(4 * SEQ_LENGTH).save(folder / "probe.safetensors")
    settings = JobProbeSettings(
        files=(folder / "probe.safetensors",),
        schedule_text=schedule,
        loss_dtype="float32",
        fall_threshold=0.1,
        takes_probe_at_exit=False,
        verifies_isolation=False,
        stops_on_write_error=False,
        is_replay=False,
        saves_checkpoints=True,
        records_samples=False,
        replayed_step=None,
    )
    return Prober(settings, folder / "run", args)


@pytest.mark.parametrize("schedule", ["list:4", f"tokens:list:{4 * 16 * SEQ_LENGTH}"])
def test_only_the_step_of_a_probe_waits_for_the_device(taken, monkeypatch, tmp_path, schedule):
    import megatron.training

    args = Namespace(
        seq_length=SEQ_LENGTH,
        vocab_size=4 * SEQ_LENGTH,
        tokenizer_type="NullTokenizer",
        train_iters=100,
        save="somewhere",
        save_interval=50,
        iteration=0,
        consumed_train_samples=0,
        manual_gc=False,
    )
    monkeypatch.setattr(megatron.training, "get_args", lambda: args)
    part = make_prober(monkeypatch, tmp_path, args, schedule)
    plugin, scheduler = Plugin(), Scheduler()
    plugin._parts = [part]
    waits = []
    with labelled_cuda() as gpu:
        rate = torch.full((), 1e-3, device="cuda")  # as with a capturable optimizer
        optimizer = SimpleNamespace(param_groups=[{"lr": rate, "default_config": True}])
        part._counts = TrainingCounts(
            Past(step=0, samples=0, tokens=0, lr_sum=0.0), SEQ_LENGTH, scheduler, optimizer
        )
        part._due.step = 0
        for step in range(1, 8):
            gpu.synchronisations.clear()
            args.consumed_train_samples = scheduler.num_steps = 16 * step
            losses = {"lm loss": torch.full((), 2.0, device="cuda")}
            plugin.before_log(Call(lambda *_: None, ("loss_dict",), (losses,), {}))
            state = {"optimizer": optimizer, "opt_param_scheduler": scheduler, "iteration": step}
            plugin.after_step(Call(lambda **_: None, (), (), state))
            waits.append(dict(gpu.synchronisations))
    assert taken == [4]
    assert waits == [{}, {}, {}, {"item": 1}, {}, {}, {}]
