"""Comparison of the training's state before and after a probe, by hashes (`verified`)."""

import hashlib
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final

import numpy as np
import torch

from megatron_tokscale.core.errors import AgreedError
from megatron_tokscale.training.probe.isolation.generators import tracker_states
from megatron_tokscale.training.probe.isolation.quantised import fp8_scaling, plain_tensors
from megatron_tokscale.training.probe.isolation.statistics import (
    attentions,
    loss_scalers,
    loss_trackers,
    sequence_lengths,
)
from megatron_tokscale.training.ranks import first_of_all_ranks


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
        raise AgreedError(
            f"the probe at step {step} changed {found}; expected the training's state unchanged; "
            "train without --tokscale-probe-set, and report the job's settings"
        )


def _digests(model: Sequence[Any], optimizer: Any) -> dict[str, str]:
    """Return a hash of each kind of state that a training step reads.

    Not hashed: Transformer Engine's cached fp8 weights. The first microbatch of a step, as of a
    probe, quantises the weights anew before anything reads them.
    """
    return {name: _digest(values) for name, values in _state(model, optimizer).items()}


def _state(model: Sequence[Any], optimizer: Any) -> dict[str, Any]:
    modules = [module for chunk in model for module in chunk.modules()]
    parameters = [parameter for chunk in model for parameter in chunk.parameters()]
    return {
        "parameters": parameters,
        "buffers": [buffer for chunk in model for buffer in chunk.module.buffers()],
        "gradients": [(p.grad, getattr(p, "main_grad", None)) for p in parameters],
        "gradient buckets": _bucket_flags(model),
        "module modes": [module.training for module in modules],
        "optimizer state": [_optimizer_state(part) for part in _chained(optimizer)],
        "main parameters": [getattr(p, "main_param", None) for p in parameters],
        "Python's generator": random.getstate(),
        "NumPy's generator": np.random.get_state(),
        "torch's CPU generator": torch.get_rng_state(),
        "torch's CUDA generator": torch.cuda.get_rng_state(),
        "Megatron's generator tracker": tracker_states(),
        "the scales of auxiliary losses": [s.main_loss_backward_scale for s in loss_scalers()],
        "fp8 scaling": fp8_scaling(model),
        "attention logits": [module.current_max_attn_logits for module in attentions(model)],
        "deferred embedding gradients": [
            getattr(module, "embedding_activation_buffer", None) for module in modules
        ],
        "auxiliary losses in Megatron's log": loss_trackers(),
        "sequence lengths in Megatron's log": sequence_lengths(),
    }


_BUCKET_GROUPS: Final = ("bucket_groups", "expert_parallel_bucket_groups")
_BUCKET_FLAGS: Final = ("is_last_microbatch", "param_gather_dispatched")


def _bucket_flags(model: Sequence[Any]) -> list[Any]:
    """Return the flags that say which gathers and reductions the next step starts."""
    groups = [
        group for chunk in model for name in _BUCKET_GROUPS for group in vars(chunk).get(name, ())
    ]
    return [getattr(group, name, None) for group in groups for name in _BUCKET_FLAGS]


def _optimizer_state(part: Any) -> list[Any]:
    """Return the tensors and settings of one of Megatron's optimizers, or of torch's."""
    inner = getattr(part, "optimizer", part)
    if inner is None:  # a rank without parameters of this kind
        return []
    scaler = getattr(part, "grad_scaler", None)
    states = list(inner.state.values())
    return [inner.param_groups, states, scaler.state_dict() if scaler else None]


def _chained(optimizer: Any) -> list[Any]:
    return list(getattr(optimizer, "chained_optimizers", [optimizer]))


def _digest(values: Any) -> str:
    """Return a hash of the tensors, arrays and plain values in nested containers."""
    digest = hashlib.blake2b(digest_size=16)
    for raw in _raw(values):
        digest.update(raw)
    return digest.hexdigest()


def _raw(value: Any) -> Iterator[Any]:
    """Yield the bytes of a value, of tensors without their shapes."""
    if isinstance(value, Mapping):
        for key, each in value.items():
            yield repr(key).encode()
            yield from _raw(each)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _raw(each)
    elif tensors := plain_tensors(value):
        for tensor in tensors:
            flat = tensor.detach().contiguous().view(-1)
            yield flat.view(torch.uint8).cpu().numpy().data
    elif isinstance(value, np.ndarray):
        yield value.tobytes()
    else:
        yield repr(value).encode()
