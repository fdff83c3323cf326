"""Parameters that are current on every rank, without the gather that overlaps with the forward."""

import inspect
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from megatron.training import training


@contextmanager
def synced_parameters(
    model: Sequence[Any], optimizer: Any, args: Namespace, *, before_first_step: bool
) -> Iterator[None]:
    """Make every rank's parameters current, without the overlapped gather inside the block.

    With --overlap-param-gather the optimizer leaves other ranks' shards stale until the hooks of
    the next forward pass; those are off until the first step is over, when a sync must be forced.

    Before the job's first step each rank holds all parameters, from the checkpoint or the
    initialisation. Megatron starts without a sync, which would spread a rank's error, and would
    quantise mxfp8 parameters anew; so does the probe.
    """
    if not training.should_disable_forward_pre_hook(args):
        yield
    elif all(chunk.remove_forward_pre_hook_handles for chunk in model):
        if before_first_step:
            training.disable_forward_pre_hook(model, param_sync=False)
        else:
            _call_with_optimizer(training.disable_forward_pre_hook, model, optimizer)
        try:
            yield
        finally:
            training.enable_forward_pre_hook(model)
    else:
        if not before_first_step:
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
