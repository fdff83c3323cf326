"""The way of the token losses from the ranks to the writer, each with its coordinate.

Shapes: B sequences of the probe set, S sequence length, N watched tokens, M microbatches of a rank,
b sequences of a microbatch, s tokens of a sequence on a rank (S / context-parallel size), P data-
parallel ranks, R ranks that hold losses (data-parallel x context-parallel), X values of a message.
"""

from typing import Final

import numpy as np
import torch
from megatron.core import mpu

from megatron_tokscale.core.arrays import Floats32, Integers
from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.probe import ProbeSet

_MISPLACED: Final = (
    "the forward step does not pass the batch's loss_mask through unchanged to its loss function, "
    "so the probe cannot assign losses to tokens; return functools.partial(loss_func, loss_mask, "
    "...) with the mask of the batch, as Megatron's pretrain_gpt.py does"
)


class LossCollector:
    """The message of one rank: its token losses, the column of each token, its data-parallel rank.

    The message lies on the device, M b s + s + 1 float32 values (exact for columns below 2^24), and
    each microbatch writes its losses into it: 4 bytes a token. No call waits for the device.
    """

    def __init__(self, n_microbatches: int, dp_rank: int) -> None:
        self._n_microbatches, self._dp_rank = n_microbatches, dp_rank
        self._loss_Mbs = self._message_X = torch.empty(0)
        self._coordinate_s = self._is_irregular = torch.empty(0)
        self._n_collected = 0

    def collect(self, mask: torch.Tensor | None, output: torch.Tensor) -> None:
        """Take the losses of the next microbatch, with their coordinates (positions + 1).

        All rows of a rank have the same columns; if not, the message has columns of -1. A forward
        step that binds no mask to its loss function gives no coordinates. Without context
        parallelism they are known nevertheless: a row of losses is a row of the batch.
        """
        loss_bs = output.detach().float()
        if isinstance(mask, torch.Tensor) and mask.numel() == loss_bs.numel():
            coordinate_bs = mask.detach().float().view_as(loss_bs)
        else:
            is_whole = mpu.get_context_parallel_world_size() == 1
            columns_s = torch.arange(1, loss_bs.shape[-1] + 1, device=loss_bs.device)
            coordinate_bs = (columns_s * is_whole).float().expand_as(loss_bs)
        if self._n_collected == 0:
            self._begin(loss_bs, coordinate_bs)
        self._is_irregular |= (coordinate_bs != self._coordinate_s).any()
        self._loss_Mbs[self._n_collected] = loss_bs
        self._n_collected += 1

    def _begin(self, loss_bs: torch.Tensor, coordinate_bs: torch.Tensor) -> None:
        n_losses, width = self._n_microbatches * loss_bs.numel(), loss_bs.shape[-1]
        self._message_X = loss_bs.new_empty(n_losses + width + 1)
        self._loss_Mbs = self._message_X[:n_losses].view(self._n_microbatches, *loss_bs.shape)
        self._coordinate_s = coordinate_bs[0].clone()
        self._is_irregular = torch.zeros((), dtype=torch.bool, device=loss_bs.device)

    def message(self) -> torch.Tensor:
        """Return the message, message_X."""
        assert self._n_collected == self._n_microbatches, "every microbatch has given its losses"
        columns_s = self._message_X[-1 - len(self._coordinate_s) : -1]
        columns_s.copy_(torch.where(self._is_irregular, -1, self._coordinate_s - 1))
        self._message_X[-1:].fill_(self._dp_rank)
        return self._message_X


def gather(message_X: torch.Tensor, group: torch.distributed.ProcessGroup) -> Floats32 | None:
    """Return all messages of a group, message_RX, in the memory of its first rank's host.

    Only that rank needs them, and all ranks get them: over NCCL, a gather is a receive from every
    other rank, whose connections and buffers stay on the fullest GPU for the rest of the job. An
    all-gather takes the connections that the group has for Megatron's gradients and parameters, and
    4 bytes for each token of the probe set on each rank, which are given back at once.
    """
    if group.size() == 1:
        return message_X[None].cpu().numpy()
    messages = message_X.new_empty(group.size() * len(message_X))
    torch.distributed.all_gather_into_tensor(messages, message_X, group=group)
    return messages.view(group.size(), -1).cpu().numpy() if group.rank() == 0 else None


def place_losses(message_RX: Floats32, rows_PMb: Integers, probe_set: ProbeSet) -> Floats32:
    """Put the ranks' losses in order by row and column; return the losses of the watched tokens.

    Args:
        message_RX: the message of each rank.
        rows_PMb: the rows of each data-parallel rank.
        probe_set: the watched tokens.

    Returns:
        loss_N in nats.

    Raises:
        TokscaleError: a column is missing, doubled or out of range.
    """
    # The shape of a message, and its parts.
    n_rows, seq_length = rows_PMb[0].size, probe_set.seq_length
    width = (message_RX.shape[1] - 1) // (n_rows + 1)
    found_Rs, dp_rank_R = message_RX[:, -1 - width : -1], message_RX[:, -1].astype(np.int64)
    # Each data-parallel rank has each column once; all its rows have the same columns.
    is_in_range_Rs = (found_Rs >= 0) & (found_Rs < seq_length)
    if not (is_in_range_Rs & (found_Rs == np.trunc(found_Rs))).all():
        raise TokscaleError(_MISPLACED)
    column_Rs: Integers = found_Rs.astype(np.int64)
    place_Rs = dp_rank_R[:, None] * seq_length + column_Rs
    if (np.bincount(place_Rs.flatten(), minlength=len(rows_PMb) * seq_length) != 1).any():
        raise TokscaleError(_MISPLACED)
    # Every loss to its row and column.
    loss_BS = np.empty((rows_PMb.size, seq_length), np.float32)
    for message_X, dp_rank, column_s in zip(message_RX, dp_rank_R, column_Rs, strict=True):
        rows = rows_PMb[dp_rank].reshape(-1, 1)
        loss_BS[rows, column_s] = message_X[: n_rows * width].reshape(n_rows, width)
    watched_N: Floats32 = loss_BS[: probe_set.n_sequences][probe_set.mask_BS]
    return watched_N
