"""Switches of Megatron's that a probe turns, and turns back."""

import logging
from types import SimpleNamespace

import pytest
import torch
from megatron.core import rerun_state_machine
from megatron.core.rerun_state_machine import RerunMode
from megatron.training import ft_integration

from megatron_tokscale.training.probe import isolation
from megatron_tokscale.training.probe.isolation import evaluation


class Mixer(torch.nn.Linear):
    """A layer that marks its cache as stale when it is trained, as Megatron's Mamba mixer does."""

    is_stale = True

    def train(self, mode=True):
        self.is_stale = self.is_stale or mode
        return super().train(mode)


class NeverTrained(torch.nn.Linear):
    """A layer that stays in evaluation mode, as Megatron's RADIO model can."""

    def train(self, mode=True):
        return super().train(False)


def test_each_module_gets_its_own_mode_back():
    mixer, frozen, fixed = Mixer(1, 1), torch.nn.Linear(1, 1), NeverTrained(1, 1)
    chunk = torch.nn.Sequential(mixer, torch.nn.Sequential(frozen, fixed))
    frozen.eval()
    fixed.training = False
    with evaluation.evaluation_modes([chunk]):
        assert not any(module.training for module in chunk.modules())
        mixer.is_stale = False  # an evaluation fills the cache
    assert mixer.is_stale
    assert [module.training for module in chunk.modules()] == [True, True, True, False, False]


def test_a_module_of_two_owners_gets_its_own_mode_back():
    """The second owner's `train` comes after the module, and changes its mode."""
    shared, owner = torch.nn.Linear(1, 1), Mixer(1, 1)
    owner.inner = shared
    chunk = torch.nn.Sequential(shared, owner)
    shared.eval()
    with evaluation.evaluation_modes([chunk]):
        pass
    assert (chunk.training, owner.training, shared.training) == (True, True, False)


def test_a_mode_that_was_set_past_train_is_restored():
    mixer = NeverTrained(1, 1)
    mixer.training = True
    with evaluation.evaluation_modes([mixer]):
        pass
    assert mixer.training


def test_the_rerun_machine_is_off_without_a_line_in_the_log(monkeypatch, caplog):
    machine = rerun_state_machine.RerunStateMachine(mode=RerunMode.VALIDATE_RESULTS)
    monkeypatch.setattr(rerun_state_machine, "_GLOBAL_RERUN_STATE_MACHINE", machine)
    caplog.clear()
    with caplog.at_level(logging.WARNING), evaluation.no_rerun_validation():
        assert machine.get_mode() == RerunMode.DISABLED
    assert machine.get_mode() == RerunMode.VALIDATE_RESULTS
    assert caplog.records == []


def test_configs_of_all_chunks_are_switched_and_restored():
    timers = object()
    configs = [
        SimpleNamespace(timers=timers, moe_input_jitter_eps=0.01, defer_embedding_wgrad_compute=on)
        for on in (True, False)
    ]
    chunks = [torch.nn.Sequential(torch.nn.Linear(1, 1)) for _ in configs]
    for chunk, config in zip(chunks, configs, strict=True):
        chunk.config = chunk[0].config = config
    chunks[0].other = torch.nn.Module()
    chunks[0].other.config = SimpleNamespace(timers=timers)
    with evaluation.evaluation_configs(chunks):
        for config in configs:
            assert vars(config) == {
                "timers": None,
                "moe_input_jitter_eps": None,
                "defer_embedding_wgrad_compute": False,
            }
    assert [config.defer_embedding_wgrad_compute for config in configs] == [True, False]
    assert all(config.moe_input_jitter_eps == 0.01 for config in configs)
    assert all(config.timers is timers for config in configs)
    assert vars(chunks[0].other.config) == {"timers": timers}


@pytest.mark.parametrize("warm_up", [0, 2])
def test_no_pass_is_timed_as_a_training_step(monkeypatch, warm_up):
    """In a replay no training step resets Megatron's count of evaluation steps."""
    sections = []
    client = SimpleNamespace(start_section=sections.append, end_section=sections.append)
    monkeypatch.setattr(ft_integration, "_GLOBAL_RANK_MONITOR_CLIENT", client)
    monkeypatch.setattr(ft_integration, "_NUM_WARMUP_ITERS", warm_up)
    monkeypatch.setattr(ft_integration, "_is_setup_section_open", True)
    monkeypatch.setattr(ft_integration, "_curr_eval_iter_idx", 1)
    for _ in range(5):
        with evaluation.no_heartbeat_timeout():
            pass
    assert sections == ["setup"]  # ended by the first pass, whose time would count as set-up
    assert ft_integration._curr_eval_iter_idx == 1


@pytest.mark.parametrize(("level", "n_emptied"), [(0, 0), (1, 1), (2, 1)])
def test_the_cache_is_emptied_after_a_pass_as_after_an_evaluation(monkeypatch, level, n_emptied):
    calls = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: calls.append("emptied"))
    with isolation._emptied_cache(SimpleNamespace(empty_unused_memory_level=level)):
        assert calls == []
    assert len(calls) == n_emptied
