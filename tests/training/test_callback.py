"""The callback hears of a loop's events, and gives the parts of the plugin theirs."""

import subprocess
import sys
from argparse import Namespace
from types import ModuleType, SimpleNamespace

import pytest
from future_megatron import FutureMegatron, Recorder

from megatron_tokscale.callback import TokscaleCallback, TokscaleConfig
from megatron_tokscale.core.errors import AgreedError, TokscaleError
from megatron_tokscale.training import parts

TRAINING = (["chunk"], "optimizer", "scheduler")


def test_the_import_needs_neither_torch_nor_megatron():
    code = (
        "import sys\n"
        "from megatron_tokscale.callback import TokscaleCallback, TokscaleConfig\n"
        "TokscaleCallback(TokscaleConfig(tokscale_probe_set='probe.safetensors'))\n"
        "assert not {'torch', 'megatron'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


class Closing(Recorder):
    def close(self):
        self.heard.append(("close",))

    def on_data(self, state, built):
        return super().on_data(state, built).with_train("planned")


@pytest.fixture(params=[True, False], ids=["context", "arguments"])
def job(request, monkeypatch):
    from megatron.core import num_microbatches_calculator

    name = "get_current_running_global_batch_size"
    monkeypatch.setattr(num_microbatches_calculator, name, lambda: 8)
    recorder = Closing()
    found = FutureMegatron(Namespace(load=None, save=None), takes_context=request.param)
    found.install(monkeypatch)
    monkeypatch.setattr(parts, "parts_of_job", lambda args, load: [recorder])
    return found, recorder


def forward_step(data_iterator, model):
    raise AssertionError("nothing is trained")


def provider(n_samples):
    return "train", "valid", "test"


def run(settings=None):
    from megatron.training import training

    callback = TokscaleCallback(settings or TokscaleConfig(tokscale_probe_set="probe"))
    before = training.train, training.build_train_valid_test_data_iterators
    training.pretrain(None, provider, "type", forward_step, callbacks=[callback])
    assert (training.train, training.build_train_valid_test_data_iterators) == before


def expected(*ends):
    whole = (*TRAINING, forward_step)
    heard = [("on_data", 0, "train"), ("on_setup", 0, 0, *whole), ("on_train_start", 0, 0, *whole)]
    for step in (1, 2):
        state = (step, 8 * step, *whole)
        heard += [("on_log", float(step)), ("on_step", *state), ("before_checkpoint", *state)]
    return [*heard, *((name, 2, 16, *whole) for name in ends), ("close",)]


def test_parts_hear_of_a_step_before_the_loop_has_counted_it(job):
    found, recorder = job
    run()
    assert recorder.heard == expected("on_train_end")
    assert dict(found.calls)["datasets"] == ("planned", "valid", "test")


def test_a_job_that_stops_after_a_step_is_at_its_exit_and_closes_the_parts(job):
    found, recorder = job
    found.is_stopped = True
    with pytest.raises(SystemExit) as ending:
        run()
    assert ending.value.code == 0
    assert recorder.heard == expected("on_exit")


def test_an_error_of_all_ranks_ends_the_job_when_an_asynchronous_checkpoint_is_finished(
    job, monkeypatch, capsys
):
    from megatron.training import async_utils

    class Stopping(Closing):
        def on_log(self, losses):
            raise AgreedError("the losses cannot be written")

    recorder = Stopping()
    monkeypatch.setattr(parts, "parts_of_job", lambda args, load: [recorder])
    monkeypatch.setattr(
        async_utils,
        "maybe_finalize_async_save",
        lambda **options: recorder.heard.append(("finished", options)),
    )

    with pytest.raises(SystemExit) as ending:
        run()
    assert ending.value.code == 2
    finished = ("finished", {"blocking": True, "terminate": True})
    assert [words[0] for words in recorder.heard[:-2]] == ["on_data", "on_setup", "on_train_start"]
    assert recorder.heard[-2:] == [finished, ("close",)]
    (line,) = capsys.readouterr().err.splitlines()
    assert "the losses cannot be written" in line


def test_an_asynchronous_checkpoint_of_bridge_is_finished_by_bridge(monkeypatch):
    from megatron_tokscale.training.loops.bridge_loop import BridgeLoop

    calls = []
    module = ModuleType("megatron.bridge.training.checkpointing")
    module.maybe_finalize_async_save = lambda *words, **options: calls.append((words, options))
    for name in ("megatron.bridge", "megatron.bridge.training"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    state = SimpleNamespace(cfg=SimpleNamespace(checkpoint="settings"))
    BridgeLoop(state).finish_save()
    assert calls == [((state, "settings"), {"blocking": True, "terminate": True})]


def test_the_settings_are_among_megatrons_arguments(job):
    found, _ = job
    run(TokscaleConfig(tokscale_probe_set="a", tokscale_fall_threshold=0.5))
    assert found.args.tokscale_probe_set == ["a"]
    assert found.args.tokscale_fall_threshold == 0.5
    assert found.args.tokscale_plan is None


def bridge_config(**changes):
    from megatron.core.datasets.gpt_dataset import GPTDatasetConfig

    config = {
        "dataset": GPTDatasetConfig.__new__(GPTDatasetConfig),
        "dist": SimpleNamespace(use_decentralized_pg=False),
        "peft": None,
        "inprocess_restart": None,
    }
    return SimpleNamespace(**config | changes)


REFUSED = {
    "dataset": (SimpleNamespace(), "expected Bridge's GPTDatasetConfig"),
    "dist": (SimpleNamespace(use_decentralized_pg=True), "dist.use_decentralized_pg"),
    "peft": ("lora", "does not support peft"),
    "inprocess_restart": (SimpleNamespace(enabled=True), "inprocess_restart.enabled"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_config_of_bridge_that_the_probe_cannot_serve_is_refused(name):
    from megatron_tokscale.training.loops.bridge_loop import refuse

    refuse(bridge_config())
    value, words = REFUSED[name]
    with pytest.raises(TokscaleError, match=words):
        refuse(bridge_config(**{name: value}))
