"""Isolation of a probe: the training continues, to the bit, as if no probe had been taken.

`isolated` lists what a forward pass changes and how each change is undone; `verified` compares
hashes of the training's state; `synced_parameters` makes the parameters current before both.
"""

from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from megatron_tokscale.training.probe.isolation.evaluation import (
    evaluation_configs,
    evaluation_modes,
    no_heartbeat_timeout,
    no_rerun_validation,
)
from megatron_tokscale.training.probe.isolation.generators import restored_generators
from megatron_tokscale.training.probe.isolation.parameters import synced_parameters
from megatron_tokscale.training.probe.isolation.quantised import restored_fp8_scaling
from megatron_tokscale.training.probe.isolation.statistics import (
    no_straggler_times,
    restored_attention_logits,
    restored_loss_scales,
    restored_sequence_lengths,
    restored_timers,
)
from megatron_tokscale.training.probe.isolation.verification import verified

__all__ = ["isolated", "synced_parameters", "verified"]


@contextmanager
def isolated(model: Sequence[Any], args: Namespace) -> Iterator[None]:
    """Switch the training to evaluation inside the block, and restore its state after it.

    An error inside propagates (a rank that swallowed it would leave the others hanging), with the
    state restored as far as one process can.

    Args:
        model: the model's chunks on this rank.
        args: Megatron's arguments.
    """
    with ExitStack() as stack:
        stack.enter_context(_emptied_cache(args))
        stack.enter_context(restored_generators())
        stack.enter_context(evaluation_modes(model))
        stack.enter_context(evaluation_configs(model))
        stack.enter_context(no_rerun_validation())
        stack.enter_context(no_heartbeat_timeout())
        stack.enter_context(restored_timers())
        stack.enter_context(no_straggler_times())
        stack.enter_context(restored_attention_logits(model))
        stack.enter_context(restored_sequence_lengths())
        stack.enter_context(restored_loss_scales())
        stack.enter_context(restored_fp8_scaling(model))
        stack.enter_context(torch.no_grad())
        yield


@contextmanager
def _emptied_cache(args: Namespace) -> Iterator[None]:
    """Empty the allocator's cache after the block where Megatron does so after an evaluation."""
    yield
    if args.empty_unused_memory_level >= 1:
        torch.cuda.empty_cache()
