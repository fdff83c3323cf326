"""Isolation of a probe: the training continues, to the bit, as if no probe had been taken."""

import hashlib
import inspect
import random
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Final

import numpy as np
import torch
from megatron.core import tensor_parallel
from megatron.core.rerun_state_machine import RerunMode, get_rerun_state_machine
from megatron.core.utils import get_model_config
from megatron.training import training

from megatron_tokscale.core.errors import AgreedError
from megatron_tokscale.training.ranks import first_of_all_ranks


@contextmanager
def isolated(model: Sequence[Any]) -> Iterator[None]:
    """Switch the training to evaluation inside the block, and restore its state after it.

    An error inside propagates (a rank that swallowed it would leave the others hanging), with the
    state restored as far as one process can.
    """
    with ExitStack() as stack:
        stack.enter_context(_generators())
        stack.enter_context(_evaluation_mode(model))
        stack.enter_context(_no_rerun_validation())
        stack.enter_context(_no_schedule_timers(model))
        stack.enter_context(_no_router_jitter(model))
        stack.enter_context(_no_heartbeat_timeout())
        stack.enter_context(_loss_scales())
        stack.enter_context(_fp8_scaling(model))
        stack.enter_context(torch.no_grad())
        yield


@contextmanager
def _generators() -> Iterator[None]:
    """Save and restore the five generators that Megatron's checkpoints hold."""
    tracker = tensor_parallel.get_cuda_rng_tracker()
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    device_state = torch.cuda.get_rng_state()
    tracker_states = _cloned_states(tracker.get_states())
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        torch.cuda.set_rng_state(device_state)
        tracker.set_states(tracker_states)


def _cloned_states(states: dict[str, Any]) -> dict[str, Any]:
    return {
        name: state.clone() if isinstance(state, torch.Tensor) else state
        for name, state in states.items()
    }


@contextmanager
def synced_parameters(model: Sequence[Any], optimizer: Any, args: Namespace) -> Iterator[None]:
    """Make every rank's parameters current, without the overlapped gather inside the block.

    With --overlap-param-gather the optimizer leaves other ranks' shards stale until the hooks of
    the next forward pass; those are off before the first step, when a sync must be forced.
    """
    if not training.should_disable_forward_pre_hook(args):
        yield
    elif all(chunk.remove_forward_pre_hook_handles for chunk in model):
        _call_with_optimizer(training.disable_forward_pre_hook, model, optimizer)
        try:
            yield
        finally:
            training.enable_forward_pre_hook(model)
    else:
        _call_with_optimizer(training.force_param_sync, model, optimizer)
        yield


def _call_with_optimizer(
    function: Callable[..., Any], model: Sequence[Any], optimizer: Any
) -> None:
    """Call one of Megatron's helpers, which take the optimizer from 0.19 on."""
    if "optimizer" in inspect.signature(function).parameters:
        function(model, optimizer=optimizer)
    else:
        function(model)


@contextmanager
def _evaluation_mode(model: Sequence[Any]) -> Iterator[None]:
    """Put all modules in evaluation mode, and restore the mode of each afterwards.

    `model.train()` would also switch modules that the user keeps in evaluation mode.
    """
    modes = [(module, module.training) for chunk in model for module in chunk.modules()]
    for chunk in model:
        chunk.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def _no_rerun_validation() -> Iterator[None]:
    machine = get_rerun_state_machine()
    mode = machine.get_mode()
    machine.set_mode(RerunMode.DISABLED)
    try:
        yield
    finally:
        machine.set_mode(mode)


@contextmanager
def _no_schedule_timers(model: Sequence[Any]) -> Iterator[None]:
    config = get_model_config(model[0])
    timers = config.timers
    config.timers = None
    try:
        yield
    finally:
        config.timers = timers


@contextmanager
def _no_router_jitter(model: Sequence[Any]) -> Iterator[None]:
    """Turn off MoE input jitter, which Megatron applies in evaluation mode too.

    Under virtual pipelining each chunk may have its own config.
    """
    modules = [module for chunk in model for module in chunk.modules()]
    found: list[Any] = [module.config for module in modules if hasattr(module, "config")]
    configs = {id(config): config for config in found if hasattr(config, "moe_input_jitter_eps")}
    jitters = [(config, config.moe_input_jitter_eps) for config in configs.values()]
    for config, _ in jitters:
        config.moe_input_jitter_eps = None
    try:
        yield
    finally:
        for config, jitter in jitters:
            config.moe_input_jitter_eps = jitter


@contextmanager
def _no_heartbeat_timeout() -> Iterator[None]:
    """Tell Megatron's fault tolerance that this is evaluation, not a hang."""
    from megatron.training import ft_integration

    ft_integration.on_eval_step_start()
    try:
        yield
    finally:
        ft_integration.on_eval_step_end()


_LOSS_SCALERS: Final = (
    ("megatron.core.transformer.moe.moe_utils", "MoEAuxLossAutoScaler"),
    ("megatron.core.transformer.multi_token_prediction", "MTPLossAutoScaler"),
    ("megatron.core.transformer.experimental_attention_variant.dsa", "DSAIndexerLossAutoScaler"),
)


def _loaded_loss_scalers() -> list[Any]:
    found = [getattr(sys.modules.get(module), name, None) for module, name in _LOSS_SCALERS]
    return [scaler for scaler in found if hasattr(scaler, "main_loss_backward_scale")]


@contextmanager
def _loss_scales() -> Iterator[None]:
    """Restore the scales of auxiliary losses, which the schedules set in evaluation too."""
    scalers = _loaded_loss_scalers()
    scales = [scaler.main_loss_backward_scale for scaler in scalers]
    values = [None if scale is None else scale.clone() for scale in scales]
    try:
        yield
    finally:
        for scaler, scale, value in zip(scalers, scales, values, strict=True):
            scaler.main_loss_backward_scale = scale if scale is None else scale.copy_(value)


@contextmanager
def _fp8_scaling(model: Sequence[Any]) -> Iterator[None]:
    """Restore the amax histories of Transformer Engine's delayed scaling, its one stateful recipe.

    Quantising in a forward pass writes them whatever the mode. Transformer Engine saves and
    restores them in place around the capture of CUDA graphs; so does this.
    """
    config = get_model_config(model[0])
    if not getattr(config, "fp8", None) or config.fp8_recipe != "delayed":
        yield
        return
    from megatron.core.fp8_utils import get_fp8_recipe
    from transformer_engine.pytorch.graph import restore_fp8_tensors, save_fp8_tensors

    state = save_fp8_tensors(model, get_fp8_recipe(config))
    try:
        yield
    finally:
        restore_fp8_tensors(model, state)


@contextmanager
def verified(model: Sequence[Any], optimizer: Any, step: int, *, is_on: bool) -> Iterator[None]:
    """Compare hashes of the training's state before and after the block, if `is_on`.

    Raises:
        AgreedError: the block has changed some state; the message names it.
    """
    if not is_on:
        yield
        return
    before = _digests(model, optimizer)
    yield
    after = _digests(model, optimizer)
    changed = [name for name, digest in before.items() if after[name] != digest]
    if found := first_of_all_ranks(", ".join(changed) or None):
        raise AgreedError(f"the probe at step {step} changed {found}")


def _digests(model: Sequence[Any], optimizer: Any) -> dict[str, str]:
    tracker = tensor_parallel.get_cuda_rng_tracker()
    return {
        "parameters": _digest([p for chunk in model for p in chunk.parameters()]),
        "buffers": _digest([b for chunk in model for b in chunk.module.buffers()]),
        "module modes": _digest([m.training for chunk in model for m in chunk.modules()]),
        "optimizer state": _digest(_optimizer_tensors(optimizer)),
        "Python's generator": _digest([random.getstate()]),
        "NumPy's generator": _digest(list(np.random.get_state())),
        "torch's CPU generator": _digest([torch.get_rng_state()]),
        "torch's CUDA generator": _digest([torch.cuda.get_rng_state()]),
        "Megatron's generator tracker": _digest(list(tracker.get_states().values())),
        "the scales of auxiliary losses": _digest(
            [scaler.main_loss_backward_scale for scaler in _loaded_loss_scalers()]
        ),
        "fp8 scaling": _digest(_fp8_tensors(model)),
    }


def _fp8_tensors(model: Sequence[Any]) -> list[torch.Tensor]:
    """Return the amax histories and scales of the Transformer Engine modules that have them."""
    metas = [getattr(module, "fp8_meta", {}) for chunk in model for module in chunk.modules()]
    states = [meta[key] for meta in metas for key in ("scaling_fwd", "scaling_bwd") if key in meta]
    return [
        getattr(state, name)
        for state in states
        for name in ("amax_history", "scale")
        if isinstance(getattr(state, name, None), torch.Tensor)
    ]


def _optimizer_tensors(optimizer: Any) -> list[Any]:
    inner = [getattr(part, "optimizer", part) for part in _chained(optimizer)]
    groups = [group for part in inner for group in part.param_groups]
    states = [state for part in inner for state in part.state.values()]
    return [p for group in groups for p in group["params"]] + [
        value for state in states for value in state.values()
    ]


def _chained(optimizer: Any) -> list[Any]:
    return list(getattr(optimizer, "chained_optimizers", [optimizer]))


def _digest(values: Sequence[Any]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for value in values:
        if isinstance(value, torch.Tensor):
            raw = value.detach().contiguous().view(-1).cpu().view(torch.uint8)
            digest.update(raw.numpy().data)
        elif isinstance(value, np.ndarray):
            digest.update(value.tobytes())
        else:
            digest.update(repr(value).encode())
    return digest.hexdigest()
