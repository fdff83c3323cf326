"""Files that one rank writes while an error ends a job, or beside a checkpoint, may fail too.

The other ranks may wait for that rank in a collective.
"""

from types import SimpleNamespace

import pytest
import torch
from megatron.training import async_utils, global_vars
from torch.distributed.checkpoint.api import CheckpointException

from megatron_tokscale.core.errors import AgreedError
from megatron_tokscale.training.calls import Call
from megatron_tokscale.training.events import JobPart
from megatron_tokscale.training.loops.bridge_loop import BridgeLoop
from megatron_tokscale.training.plugin import Plugin
from megatron_tokscale.training.scalars import log_scalars

FULL = OSError(28, "No space left on device")


def fail(*_args, **_kwargs):
    raise FULL


class Stopping(JobPart):
    def on_train_start(self, state):
        raise AgreedError("the losses cannot be written")


def train(capsys):
    """Return what a rank prints that ends with an error of all ranks, and the code."""
    plugin = Plugin()
    plugin._parts.append(Stopping())
    plugin._state = lambda arguments: None
    with pytest.raises(SystemExit) as ending:
        plugin.around_training(Call(lambda: None, (), (), {}))
    return ending.value.code, capsys.readouterr().err.splitlines()


def test_a_rank_whose_scalars_are_lost_finishes_the_checkpoint_with_the_others(monkeypatch, capsys):
    """TensorBoard's `flush` raises what its thread has met when it wrote earlier scalars."""
    calls = []
    monkeypatch.setattr(global_vars, "_GLOBAL_TENSORBOARD_WRITER", SimpleNamespace(flush=fail))
    monkeypatch.setattr(
        async_utils, "maybe_finalize_async_save", lambda **options: calls.append(options)
    )
    code, lines = train(capsys)
    assert code == 2
    assert calls == [{"blocking": True, "terminate": True}]
    assert ["No space left" in line for line in lines] == [True, False]
    assert "the losses cannot be written" in lines[1]


def test_a_finished_writer_does_not_end_the_rank_that_holds_it(monkeypatch, capsys):
    """A loop finishes W&B before it exits, and a callback takes the last probe after that."""
    logged = []
    holder = SimpleNamespace(add_scalar=lambda *words: logged.append(words))
    monkeypatch.setattr(global_vars, "_GLOBAL_TENSORBOARD_WRITER", holder)
    monkeypatch.setattr(global_vars, "_GLOBAL_WANDB_WRITER", SimpleNamespace(log=fail))
    log_scalars({"probe loss": 2.0}, 3, 24)
    name = "tokscale/probe loss"
    assert logged == [(name, 2.0, 3), (f"{name} vs samples", 2.0, 24)]
    (line,) = capsys.readouterr().err.splitlines()
    assert "step 3 are not in W&B" in line


@pytest.mark.parametrize("error", [FULL, CheckpointException("no rank has written", {})])
def test_a_checkpoint_that_cannot_be_finished_does_not_hide_the_error(monkeypatch, capsys, error):
    def finalize(**_options):
        raise error

    monkeypatch.setattr(async_utils, "maybe_finalize_async_save", finalize)
    code, lines = train(capsys)
    assert code == 2
    assert "is not finished" in lines[0]
    assert "the losses cannot be written" in lines[-1]


def test_a_note_that_cannot_be_kept_beside_a_checkpoint_ends_no_job(monkeypatch, capsys, tmp_path):
    from megatron_tokscale.training.loops import bridge_loop

    settings = SimpleNamespace(save=str(tmp_path), async_save=False)
    loop = BridgeLoop(SimpleNamespace(cfg=SimpleNamespace(checkpoint=settings)))
    loop._notes = {4: "{}"}
    (tmp_path / "iter_0000004").mkdir()
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    monkeypatch.setattr(bridge_loop, "write_text", fail)
    assert loop.after_checkpoint()
    (line,) = capsys.readouterr().err.splitlines()
    assert "iter_0000004" in line
    assert "No space left" in line
