"""Sums over the tokens of training samples, on the device, and their records.

Shapes: B samples of a microbatch, s tokens of a sample on a rank (sequence length over context-
parallel size), M microbatches of a step, Q samples, R context-parallel ranks, V the four values of
a sample.
"""

import inspect
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from megatron.core import mpu
from megatron.core.utils import get_batch_on_this_cp_rank

from megatron_tokscale.core.arrays import Integers
from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.store.sample_losses import Records, make_records

_NO_MASK: Final = (
    "the forward step does not bind the batch's loss_mask to its loss function, so it is not known "
    "which losses of a sample count; return functools.partial(loss_func, loss_mask, ...) with the "
    "mask of the batch, as Megatron's pretrain_gpt.py does, or drop --tokscale-sample-losses"
)


def values_of_samples(output: torch.Tensor, mask: Any) -> torch.Tensor:
    """Return value_BV: summed loss, tokens in the mask, largest loss, its place among the s tokens.

    Nothing waits for the device. A largest loss of NaN is the largest; without a token in the mask
    it is -inf.

    Args:
        output: losses of the tokens in nats, loss_Bs, before the mask.
        mask: the loss mask of the batch.

    Raises:
        TokscaleError: the forward step has given no mask of the losses' size.
    """
    loss_Bs = output.detach().float()
    if not isinstance(mask, torch.Tensor) or mask.numel() != loss_Bs.numel() or loss_Bs.dim() != 2:
        raise TokscaleError(_NO_MASK)
    mask_Bs = mask.detach().float().reshape(loss_Bs.shape)
    is_in_Bs = mask_Bs > 0
    nats_B = torch.where(is_in_Bs, loss_Bs * mask_Bs, 0.0).sum(1)
    largest_B, place_B = torch.where(is_in_Bs, loss_Bs, -torch.inf).max(1)
    return torch.stack([nats_B, mask_Bs.sum(1), largest_B, place_B.float()], 1)


@dataclass
class StepValues:
    """The values of one step's samples on a rank, which its microbatches fill one by one.

    Attributes:
        step: the optimizer step, the first one being 1; 0 until it is known.
        start: training samples consumed before the step.
        value_MBV: values on the device; None before the first microbatch.
        n_taken: microbatches that have values.
    """

    step: int = 0
    start: int = 0
    value_MBV: torch.Tensor | None = None
    n_taken: int = 0

    def take(self, value_BV: torch.Tensor, n_microbatches: int) -> None:
        """Take the next microbatch, unless the step has all of them.

        Megatron's rerun state machine runs a step again whose result it suspects. The values are
        those of the first run, which have caused the suspicion.
        """
        if self.value_MBV is None:
            self.value_MBV = value_BV.new_empty(n_microbatches, *value_BV.shape)
        if self.n_taken < n_microbatches:
            self.value_MBV[self.n_taken] = value_BV
            self.n_taken += 1

    @property
    def n_samples(self) -> int:
        """Samples that have values."""
        return 0 if self.value_MBV is None else self.n_taken * self.value_MBV.shape[1]

    @property
    def value_QV(self) -> torch.Tensor:
        """The values of the samples so far, on the device."""
        assert self.value_MBV is not None, "a microbatch was taken"
        return self.value_MBV[: self.n_taken].flatten(0, 1)

    def samples_Q(self) -> Integers:
        """Return the numbers of the samples, as Megatron's default sampler deals them.

        Microbatch m of data-parallel rank r has, after the samples consumed before the step, those
        from (m * ranks + r) * B on: `MegatronPretrainingSampler`.
        """
        assert self.value_MBV is not None, "a microbatch was taken"
        size, ranks = self.value_MBV.shape[1], mpu.get_data_parallel_world_size()
        first_M = (np.arange(self.n_taken) * ranks + mpu.get_data_parallel_rank()) * size
        numbers_Q: Integers = (self.start + first_M[:, None] + np.arange(size)).flatten()
        return numbers_Q


def positions_here(seq_length: int, device: torch.device) -> torch.Tensor:
    """Return position_s, the positions of a sequence that this context-parallel rank has.

    Megatron's own function cuts the sequence.
    """
    batch = {"positions": torch.arange(seq_length, device=device)[None]}
    if mpu.get_context_parallel_world_size() > 1:
        accepted = inspect.signature(get_batch_on_this_cp_rank).parameters
        options = {"is_hybrid_cp": False, "cp_group": mpu.get_context_parallel_group()}
        options = {name: value for name, value in options.items() if name in accepted}
        batch = get_batch_on_this_cp_rank(batch, **options)
    return batch["positions"][0]


def joined_over_context(value_QV: torch.Tensor, seq_length: int) -> torch.Tensor:
    """Return the parts value_RQV of the samples on all context-parallel ranks; they all call it.

    The places become positions in the whole sequence.
    """
    group = mpu.get_context_parallel_group()
    place_Q = value_QV[:, 3].long()
    value_QV[:, 3] = positions_here(seq_length, value_QV.device)[place_Q].float()
    if group.size() == 1:
        return value_QV[None]
    values = value_QV.new_empty(group.size() * len(value_QV), value_QV.shape[1])
    torch.distributed.all_gather_into_tensor(values, value_QV.contiguous(), group=group)
    return values.view(group.size(), *value_QV.shape)


def records_of(value_RQV: torch.Tensor, step_Q: Integers, sample_Q: Integers) -> Records:
    """Return records_Q of samples whose parts lie on R ranks; waits for the device."""
    nats_RQ, n_tokens_RQ, largest_RQ, position_RQ = np.moveaxis(value_RQV.cpu().numpy(), 2, 0)
    n_tokens_Q = np.round(n_tokens_RQ.sum(0, dtype=np.float64)).astype(np.int64)
    holder_Q = largest_RQ.argmax(0)  # the first NaN, if there is one
    places = holder_Q, np.arange(len(holder_Q))
    is_empty_Q = n_tokens_Q == 0
    with np.errstate(invalid="ignore"):
        mean_Q = nats_RQ.sum(0, dtype=np.float64) / np.where(is_empty_Q, np.nan, n_tokens_Q)
    return make_records(
        step_Q,
        sample_Q,
        mean_Q,
        np.where(is_empty_Q, np.nan, largest_RQ[places]),
        np.where(is_empty_Q, -1, position_RQ[places]),
        n_tokens_Q,
    )
