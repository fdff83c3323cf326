"""Megatron's switches between training and evaluation, and switches that Megatron lacks."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

import torch
from megatron.core.rerun_state_machine import RerunMode, get_rerun_state_machine
from megatron.training import ft_integration


@contextmanager
def evaluation_modes(model: Sequence[Any]) -> Iterator[None]:
    """Put all modules in evaluation mode, and restore the mode of each afterwards.

    `model.train()` would also switch modules that the user keeps in evaluation mode. A `train`
    method that a class has of its own is called nevertheless: Mamba's marks a cache as stale.
    """
    modes = [(module, module.training) for chunk in model for module in chunk.modules()]
    for chunk in model:
        chunk.eval()
    try:
        yield
    finally:
        # `train` changes the modes of submodules too, one of which another module may share.
        for module, mode in modes:
            if type(module).train is not torch.nn.Module.train:
                module.train(mode)
        for module, mode in modes:
            module.training = mode


@contextmanager
def no_rerun_validation() -> Iterator[None]:
    """Turn Megatron's rerun state machine off. Its own setter would log a warning each time."""
    machine = get_rerun_state_machine()
    mode = machine.mode
    machine.mode = RerunMode.DISABLED
    try:
        yield
    finally:
        machine.mode = mode


_OFF: Final = {
    "timers": None,  # of the schedules
    "moe_input_jitter_eps": None,  # Megatron jitters the router's input in evaluation mode too
    "defer_embedding_wgrad_compute": False,  # would keep the output layer's inputs
}


def configs_of(model: Sequence[Any]) -> list[Any]:
    """Return the configs of the model's modules: each chunk may have its own."""
    modules = [module for chunk in model for module in chunk.modules()]
    configs = [module.config for module in modules if hasattr(module, "config")]
    return list({id(config): config for config in configs}.values())


@contextmanager
def evaluation_configs(model: Sequence[Any]) -> Iterator[None]:
    """Turn off the settings in Megatron's configs by which a forward pass does more than losses."""
    found = [
        (config, name, getattr(config, name))
        for config in configs_of(model)
        for name in _OFF
        if hasattr(config, name)
    ]
    for config, name, _ in found:
        setattr(config, name, _OFF[name])
    try:
        yield
    finally:
        for config, name, value in found:
            setattr(config, name, value)


@contextmanager
def no_heartbeat_timeout() -> Iterator[None]:
    """Tell Megatron's fault tolerance that this is evaluation, not a hang.

    Fault tolerance counts evaluation steps beyond the first few as training steps: it limits their
    time, and sets that limit by their times. A probe's pass must not count, so inside the block
    the number of evaluation steps so far is reset.
    """
    seen = ft_integration._curr_eval_iter_idx
    ft_integration._curr_eval_iter_idx = -1  # with 0, --ft-num-warmup-iters 0 would count the pass
    ft_integration.on_eval_step_start()
    try:
        yield
    finally:
        ft_integration.on_eval_step_end()
        ft_integration._curr_eval_iter_idx = seen
