"""The probe pass: the user's forward step over the probe set, and its token losses on the writer.

Shapes: N watched tokens, M microbatches of a rank, P data-parallel ranks, b sequences of a
microbatch, R ranks that hold losses, X values of a rank's message.
"""

from argparse import Namespace
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from megatron.core import mpu
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_model_config

from megatron_tokscale.core.arrays import Floats32
from megatron_tokscale.probe import ProbeSet
from megatron_tokscale.training.probe.gathering import LossCollector, gather, place_losses
from megatron_tokscale.training.probe.microbatches import Microbatches, deal_rows


def is_writer() -> bool:
    """Return whether the gathered losses arrive on this rank: the first that has losses."""
    return has_losses() and _gather_group().rank() == 0


def has_losses() -> bool:
    """Return whether this rank is the first tensor-parallel rank of the last pipeline stage."""
    is_last = mpu.is_pipeline_last_stage(ignore_virtual=True)
    return bool(is_last) and mpu.get_tensor_model_parallel_rank() == 0


def _gather_group() -> torch.distributed.ProcessGroup:
    group: torch.distributed.ProcessGroup = mpu.get_data_parallel_group(with_context_parallel=True)
    return group


def run(
    probe_set: ProbeSet, forward_step: Callable[..., Any], model: Sequence[Any], args: Namespace
) -> Floats32 | None:
    """Evaluate `model` on the probe set; every rank takes part.

    Until its gather, the pass does not wait for the device.

    Returns:
        loss_N in nats on the writer; None on the other ranks.

    Raises:
        TokscaleError: (on the writer) the user's forward step does not give back the coordinates.
    """
    rows_PMb = deal_rows(
        probe_set.n_sequences,
        args.micro_batch_size,
        mpu.get_data_parallel_world_size(),
        get_model_config(model[0]).microbatch_group_size_per_vp_stage if len(model) > 1 else 1,
    )
    dp_rank, n_microbatches = mpu.get_data_parallel_rank(), rows_PMb.shape[1]
    microbatches = Microbatches(
        probe_set,
        rows_PMb[dp_rank],
        bool(args.create_attention_mask_in_dataloader),
        torch.device(torch.cuda.current_device()),
    )
    losses = LossCollector(n_microbatches, dp_rank)
    iterators = [iter(microbatches) for _ in model]
    get_forward_backward_func()(
        forward_step_func=partial(_probe_forward_step, forward_step, losses),
        data_iterator=iterators if len(model) > 1 else iterators[0],
        model=model,
        num_microbatches=n_microbatches,
        seq_length=args.seq_length,
        micro_batch_size=args.micro_batch_size,
        decoder_seq_length=args.decoder_seq_length,
        forward_only=True,
        collect_non_loss_data=True,
    )
    if not has_losses():
        return None
    message_RX = gather(losses.message(), _gather_group())
    return None if message_RX is None else place_losses(message_RX, rows_PMb, probe_set)


def _probe_forward_step(
    forward_step: Callable[..., Any], losses: LossCollector, iterator: Any, chunk: Any, *rest: Any
) -> tuple[Any, Callable[..., Any]]:
    """Call the user's forward step, and return the probe's collector as its loss function."""
    output, loss_func = forward_step(iterator, chunk, *rest)
    mask = loss_func.args[0] if isinstance(loss_func, partial) and loss_func.args else None

    def collect(output: torch.Tensor, non_loss_data: bool) -> None:  # as Megatron calls it
        losses.collect(mask, output)

    return output, collect
