"""The probe pass: the user's own forward step over the probe set, losses gathered token by token.

Shapes: B sequences of the probe set, S sequence length, M microbatches of this rank,
b sequences of a microbatch, s tokens of a sequence on this rank (S / context-parallel size).
"""

from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from megatron.core import mpu
from megatron.core.pipeline_parallel import get_forward_backward_func
from numpy.typing import NDArray

from megatron_tokscale.errors import TokscaleError
from megatron_tokscale.probe import ProbeSet

Microbatch = dict[str, torch.Tensor]


def is_writer() -> bool:
    """Whether the gathered losses arrive on this rank: the first of those that have them."""
    return _has_losses() and _gather_group().rank() == 0


def _has_losses() -> bool:
    is_last = mpu.is_pipeline_last_stage(ignore_virtual=True)
    return bool(is_last) and mpu.get_tensor_model_parallel_rank() == 0


def _gather_group() -> torch.distributed.ProcessGroup:
    group: torch.distributed.ProcessGroup = mpu.get_data_parallel_group(with_context_parallel=True)
    return group


def run(
    probe_set: ProbeSet, forward_step: Callable[..., Any], model: Sequence[Any], args: Namespace
) -> NDArray[np.float32] | None:
    """Evaluate `model` on the probe set; every rank takes part.

    Returns:
        loss_BS in nats on the writer, None on the other ranks.

    Raises:
        TokscaleError: the user's forward step does not give back the loss mask's coordinates.
    """
    rows = rows_of_this_rank(
        probe_set.n_sequences,
        args.micro_batch_size,
        mpu.get_data_parallel_rank(),
        mpu.get_data_parallel_world_size(),
        args.pipeline_model_parallel_size if len(model) > 1 else 1,
    )
    with_mask = bool(args.create_attention_mask_in_dataloader)
    iterators = [_microbatches(probe_set, rows, with_mask) for _ in model]
    collected = get_forward_backward_func()(
        forward_step_func=partial(_probe_forward_step, forward_step, args.context_parallel_size),
        data_iterator=iterators if len(model) > 1 else iterators[0],
        model=model,
        num_microbatches=len(rows),
        seq_length=args.seq_length,
        micro_batch_size=args.micro_batch_size,
        decoder_seq_length=args.decoder_seq_length,
        forward_only=True,
        collect_non_loss_data=True,
    )
    return _gather(collected, rows, probe_set) if _has_losses() else None


def rows_of_this_rank(
    n_sequences: int, micro_batch_size: int, rank: int, ranks: int, multiple: int
) -> NDArray[np.int64]:
    """Which sequences one data-parallel rank takes: rows_Mb, the same M on every rank.

    Rows beyond the probe set fill up the last microbatches; they are run and dropped. M is a
    multiple of `multiple`, which the interleaved pipeline schedule needs.
    """
    n_microbatches = -(-n_sequences // (micro_batch_size * ranks))
    n_microbatches = -(-n_microbatches // multiple) * multiple
    rows = np.arange(n_microbatches * ranks * micro_batch_size)
    return rows.reshape(n_microbatches, ranks, micro_batch_size)[:, rank]


def _microbatches(
    probe_set: ProbeSet, rows_Mb: NDArray[np.int64], with_attention_mask: bool
) -> Iterator[Microbatch]:
    """Yield what Megatron's data loader would; the loss mask carries each token's position + 1.

    The mask is not used by a forward pass, but goes through the same broadcast and the same cut for
    context parallelism as the labels: it brings the coordinates of each loss back.
    """
    seq_length = probe_set.seq_length
    positions_S = torch.arange(seq_length)
    for rows_b in rows_Mb:
        wrapped = rows_b % probe_set.n_sequences
        microbatch = {
            "tokens": torch.from_numpy(probe_set.tokens_BS[wrapped]).long(),
            "labels": torch.from_numpy(probe_set.labels_BS[wrapped]).long(),
            "loss_mask": (positions_S + 1).float().repeat(len(rows_b), 1),
            "position_ids": positions_S.repeat(len(rows_b), 1),
        }
        if with_attention_mask:
            future_SS = torch.ones(seq_length, seq_length).triu(1).bool()
            microbatch["attention_mask"] = future_SS.repeat(len(rows_b), 1, 1, 1)
        yield microbatch


def _probe_forward_step(
    forward_step: Callable[..., Any], cp_size: int, iterator: Any, chunk: Any, *rest: Any
) -> tuple[Any, Callable[..., Any]]:
    """Call the user's forward step, and put our collector in the place of its loss function."""
    output, loss_func = forward_step(iterator, chunk, *rest)
    mask = loss_func.args[0] if isinstance(loss_func, partial) and loss_func.args else None
    return output, partial(_collect, mask, cp_size)


def _collect(
    mask: torch.Tensor | None, cp_size: int, output: torch.Tensor, non_loss_data: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keep the token losses of one microbatch on the device, with their coordinates."""
    loss_bs = output.detach().float()
    if isinstance(mask, torch.Tensor) and mask.numel() == loss_bs.numel():
        return loss_bs, mask.float().view_as(loss_bs)
    if cp_size > 1:
        raise TokscaleError(
            "the forward step must return functools.partial(loss_func, loss_mask, ...) as "
            "Megatron's pretrain_gpt.py does: with context parallelism the probe reads the places "
            "of the tokens from it"
        )
    positions_s = torch.arange(1, loss_bs.shape[-1] + 1, device=loss_bs.device)
    return loss_bs, positions_s.float().expand_as(loss_bs)


def _gather(
    collected: Sequence[tuple[torch.Tensor, torch.Tensor]],
    rows_Mb: NDArray[np.int64],
    probe_set: ProbeSet,
) -> NDArray[np.float32] | None:
    """Bring all losses to the writer and put each in its place."""
    shape = (*rows_Mb.shape, -1)
    loss_Mbs = torch.stack([loss for loss, _ in collected]).view(shape)
    coordinate_Mbs = torch.stack([coordinate for _, coordinate in collected]).view(shape)
    rows = torch.from_numpy(rows_Mb.astype(np.int32)).to(loss_Mbs.device)
    losses = _to_writer(loss_Mbs)
    coordinates = _to_writer(coordinate_Mbs)
    all_rows = _to_writer(rows)
    if losses is None or coordinates is None or all_rows is None:
        return None
    return scatter_losses(
        losses, coordinates, all_rows, probe_set.n_sequences, probe_set.seq_length
    )


def _to_writer(tensor: torch.Tensor) -> NDArray[Any] | None:
    """Gather equal-shaped tensors along a new first axis on the writer."""
    group = _gather_group()
    parts = [torch.empty_like(tensor) for _ in range(group.size())] if group.rank() == 0 else None
    torch.distributed.gather(
        tensor.contiguous(), parts, dst=torch.distributed.get_global_rank(group, 0), group=group
    )
    return None if parts is None else torch.stack(parts).cpu().numpy()


def scatter_losses(
    losses: NDArray[np.float32],
    coordinates: NDArray[np.float32],
    rows: NDArray[np.int32],
    n_sequences: int,
    seq_length: int,
) -> NDArray[np.float32]:
    """Put gathered losses [ranks, M, b, s] in place by row and coordinate, dropping padding rows.

    Returns:
        loss_BS in nats.

    Raises:
        TokscaleError: a coordinate is missing, doubled or out of range.
    """
    row = np.broadcast_to(rows[..., None], losses.shape)
    is_real = row < n_sequences
    column = coordinates[is_real].astype(np.int64) - 1
    flat = row[is_real].astype(np.int64) * seq_length + column
    in_range = bool(((column >= 0) & (column < seq_length)).all())
    if not in_range or not (np.bincount(flat, minlength=n_sequences * seq_length) == 1).all():
        raise TokscaleError(
            "the forward step does not pass the batch's loss_mask through unchanged to its loss "
            "function, so the probe cannot tell which loss is whose; return "
            "functools.partial(loss_func, loss_mask, ...) with the mask of the batch"
        )
    loss_BS = np.empty(n_sequences * seq_length, dtype=np.float32)
    loss_BS[flat] = losses[is_real]
    return loss_BS.reshape(n_sequences, seq_length)
