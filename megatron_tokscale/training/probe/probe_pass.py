"""The probe pass: the user's forward step over the probe set, and a gather of the token losses.

Shapes: B sequences of the probe set, S sequence length, N watched tokens, M microbatches of a rank,
b sequences of a microbatch, s tokens of a sequence on a rank (S / context-parallel size),
R ranks that hold losses (data-parallel x context-parallel).
"""

from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from megatron.core import mpu
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_model_config
from numpy.typing import NDArray

from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.probe import ProbeSet

Microbatch = dict[str, torch.Tensor]

_MISPLACED: Final = (
    "the forward step does not pass the batch's loss_mask through unchanged to its loss function, "
    "so the probe cannot assign losses to tokens; return functools.partial(loss_func, loss_mask, "
    "...) with the mask of the batch, as Megatron's pretrain_gpt.py does"
)


def is_writer() -> bool:
    """Return whether the gathered losses arrive on this rank: the first that has losses."""
    return _has_losses() and _gather_group().rank() == 0


def _has_losses() -> bool:
    is_last = mpu.is_pipeline_last_stage(ignore_virtual=True)
    return bool(is_last) and mpu.get_tensor_model_parallel_rank() == 0


def _gather_group() -> torch.distributed.ProcessGroup:
    group: torch.distributed.ProcessGroup = mpu.get_data_parallel_group(with_context_parallel=True)
    return group


def run(
    probe_set: ProbeSet, forward_step: Callable[..., Any], model: Sequence[Any], args: Namespace
) -> torch.Tensor | None:
    """Evaluate `model` on the probe set; every rank takes part.

    Returns:
        loss_N in nats, float32 on the device, on the writer; None on the other ranks.

    Raises:
        TokscaleError: (on the writer) the user's forward step does not give back the coordinates.
    """
    rows_Mb = rows_of_this_rank(
        probe_set.n_sequences,
        args.micro_batch_size,
        mpu.get_data_parallel_rank(),
        mpu.get_data_parallel_world_size(),
        get_model_config(model[0]).microbatch_group_size_per_vp_stage if len(model) > 1 else 1,
    )
    with_mask = bool(args.create_attention_mask_in_dataloader)
    iterators = [_microbatches(probe_set, rows_Mb, with_mask) for _ in model]
    collected = get_forward_backward_func()(
        forward_step_func=partial(_probe_forward_step, forward_step),
        data_iterator=iterators if len(model) > 1 else iterators[0],
        model=model,
        num_microbatches=len(rows_Mb),
        seq_length=args.seq_length,
        micro_batch_size=args.micro_batch_size,
        decoder_seq_length=args.decoder_seq_length,
        forward_only=True,
        collect_non_loss_data=True,
    )
    return _gather(collected, probe_set) if _has_losses() else None


def rows_of_this_rank(
    n_sequences: int, micro_batch_size: int, rank: int, ranks: int, multiple: int
) -> NDArray[np.int64]:
    """Return the sequences of one data-parallel rank: rows_Mb, with the same M on every rank.

    Rows beyond the probe set fill up the last microbatches; their losses are dropped. M is a
    multiple of `multiple`, which the interleaved pipeline schedule needs.
    """
    n_microbatches = -(-n_sequences // (micro_batch_size * ranks))
    n_microbatches = -(-n_microbatches // multiple) * multiple
    rows = np.arange(n_microbatches * ranks * micro_batch_size)
    return rows.reshape(n_microbatches, ranks, micro_batch_size)[:, rank]


def _microbatches(
    probe_set: ProbeSet, rows_Mb: NDArray[np.int64], with_attention_mask: bool
) -> Iterator[Microbatch]:
    """Yield microbatches like Megatron's data loader, with each token's position + 1 as loss mask.

    A forward pass does not use the mask. It goes through the same broadcast and the same cut for
    context parallelism as the labels, so it brings back the coordinate of each loss.
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
    forward_step: Callable[..., Any], iterator: Any, chunk: Any, *rest: Any
) -> tuple[Any, Callable[..., Any]]:
    """Call the user's forward step, and return the probe's collector as its loss function."""
    output, loss_func = forward_step(iterator, chunk, *rest)
    mask = loss_func.args[0] if isinstance(loss_func, partial) and loss_func.args else None
    return output, partial(_collect, mask)


class _Collected(NamedTuple):
    """Token losses of one microbatch, and the coordinate (position + 1) of each."""

    loss_bs: torch.Tensor
    coordinate_bs: torch.Tensor


def _collect(
    mask: torch.Tensor | None, output: torch.Tensor, non_loss_data: bool = False
) -> _Collected:
    """Keep the token losses of one microbatch on the device, with their coordinates.

    A forward step that binds no mask to its loss function gives no coordinates. Without context
    parallelism they are known nevertheless: a row of losses is a row of the batch.
    """
    loss_bs = output.detach().float()
    if isinstance(mask, torch.Tensor) and mask.numel() == loss_bs.numel():
        return _Collected(loss_bs, mask.detach().float().view_as(loss_bs))
    columns_s = torch.arange(1, loss_bs.shape[-1] + 1, device=loss_bs.device)
    is_whole = mpu.get_context_parallel_world_size() == 1
    return _Collected(loss_bs, (columns_s * is_whole).float().expand_as(loss_bs))


def _gather(collected: Sequence[_Collected], probe_set: ProbeSet) -> torch.Tensor | None:
    """Gather all losses on the writer, in one message per rank; return loss_N there."""
    group = _gather_group()
    loss_Mbs = torch.stack([part.loss_bs for part in collected])
    coordinate_Mbs = torch.stack([part.coordinate_bs for part in collected])
    message = _pack(loss_Mbs, coordinate_Mbs, mpu.get_data_parallel_rank())
    is_writer_here = group.rank() == 0
    messages = [torch.empty_like(message) for _ in range(group.size())] if is_writer_here else None
    torch.distributed.gather(
        message, messages, dst=torch.distributed.get_global_rank(group, 0), group=group
    )
    if messages is None:
        return None
    dp_size = mpu.get_data_parallel_world_size()
    return place_losses(torch.stack(messages), loss_Mbs.shape, dp_size, probe_set)


def _pack(loss_Mbs: torch.Tensor, coordinate_Mbs: torch.Tensor, dp_rank: int) -> torch.Tensor:
    """Return a rank's message: its losses, the column of each token, its data-parallel rank.

    All rows of a rank have the same columns; if not, the columns are sent as -1.
    """
    columns_s = coordinate_Mbs[0, 0] - 1
    is_regular = (coordinate_Mbs == coordinate_Mbs[0, 0]).all()
    columns_s = torch.where(is_regular, columns_s, torch.full_like(columns_s, -1))
    rank = torch.tensor([dp_rank], dtype=torch.float32, device=loss_Mbs.device)
    return torch.cat([loss_Mbs.flatten(), columns_s, rank])


def place_losses(
    messages_R: torch.Tensor, shape: Sequence[int], dp_size: int, probe_set: ProbeSet
) -> torch.Tensor:
    """Put the ranks' losses in order by row and column; return the losses of the watched tokens.

    Args:
        messages_R: [R, M * b * s + s + 1], the packed losses of each rank.
        shape: (M, b, s).
        dp_size: number of data-parallel ranks.
        probe_set: gives the number of real rows, and the watched tokens.

    Returns:
        loss_N in nats.

    Raises:
        TokscaleError: a column is missing, doubled or out of range.
    """
    n_microbatches, micro_batch_size, width = shape
    n_losses = n_microbatches * micro_batch_size * width
    device = messages_R.device
    loss_R, columns_Rs, dp_rank_R = messages_R.tensor_split((n_losses, n_losses + width), dim=1)
    microbatch_M = torch.arange(n_microbatches, device=device)
    place_b = torch.arange(micro_batch_size, device=device)
    block_RM = microbatch_M * dp_size + dp_rank_R.long()
    row_RMb = block_RM[..., None] * micro_batch_size + place_b
    index = row_RMb[..., None] * probe_set.seq_length + columns_Rs.long()[:, None, None, :]
    index, order = index.flatten().sort()
    if not torch.equal(index, torch.arange(index.numel(), device=device)):
        raise TokscaleError(_MISPLACED)
    n_whole = probe_set.n_sequences * probe_set.seq_length
    watched_N = torch.from_numpy(np.flatnonzero(probe_set.mask_BS)).to(device)
    return loss_R.flatten()[order][:n_whole][watched_N]
