"""The microbatches of a probe: which rank evaluates which sequences, and their tensors.

Shapes: B sequences of the probe set, S sequence length, P data-parallel ranks, M microbatches of a
rank, b sequences of a microbatch, X tokens of all sequences.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Final

import numpy as np
import torch

from megatron_tokscale.core.arrays import Integers, Integers32
from megatron_tokscale.probe import ProbeSet

Microbatch = dict[str, torch.Tensor]

_GOLDEN: Final = (math.sqrt(5) - 1) / 2


def deal_rows(n_sequences: int, micro_batch_size: int, ranks: int, multiple: int) -> Integers:
    """Return the sequences of every data-parallel rank: rows_PMb, with the same M on every rank.

    A probe set is sorted by dataset. The rows are dealt like cards: microbatch m of all ranks has
    the rows m, m + M, m + 2 M, ..., and each rank has every P-th of these. So every microbatch has
    the probe set's mixture of datasets, as a training batch has the blend's: a mixture of experts
    then drops and sends tokens as in training. Neighbouring ranks, which share experts, have rows
    far apart: multiples of the golden section of a circle are spread evenly, however many there
    are (our choice).

    Rows beyond the probe set fill up the microbatches; their losses are dropped. M is a multiple of
    `multiple`, which the interleaved pipeline schedule needs.
    """
    n_microbatches = -(-n_sequences // (micro_batch_size * ranks))
    n_microbatches = -(-n_microbatches // multiple) * multiple
    turn_P = np.arange(ranks) * _golden_stride(ranks) % ranks
    card_Pb = turn_P[:, None] + ranks * np.arange(micro_batch_size)
    rows_PMb: Integers = np.arange(n_microbatches)[:, None] + n_microbatches * card_Pb[:, None]
    return rows_PMb


def _golden_stride(count: int) -> int:
    """Return the number nearest to the golden section of `count` that has no factor in common."""
    coprime = (number for number in range(1, count + 1) if math.gcd(number, count) == 1)
    return min(coprime, key=lambda number: abs(number - _GOLDEN * count))


@dataclass(frozen=True)
class Microbatches:
    """The microbatches of one rank, as Megatron's data loader gives them, but on the device.

    `get_batch` of a training script moves a batch to the device, which does nothing here: the host
    need not wait for a copy. Where a script reads no microbatch, no tensor is made.

    Attributes:
        probe_set: the watched tokens.
        rows_Mb: the rank's rows of it; rows beyond the set are rows from its beginning.
        has_attention_mask: the script's batches have an attention mask.
        device: the device of the model.
    """

    probe_set: ProbeSet
    rows_Mb: Integers
    has_attention_mask: bool
    device: torch.device

    def __iter__(self) -> Iterator[Microbatch]:
        """Yield the microbatches, with each token's position + 1 as loss mask.

        A forward pass does not use the loss mask. It goes through the same broadcast and the same
        cut for context parallelism as the labels, so it brings back the coordinate of each loss.
        """
        positions_S = torch.arange(self.probe_set.seq_length, device=self.device)
        for rows_b in self.rows_Mb % self.probe_set.n_sequences:
            microbatch = {
                "tokens": self._moved(self._filled_bS(rows_b)),
                "labels": self._moved(self.probe_set.labels_BS[rows_b]),
                "loss_mask": (positions_S + 1).float().repeat(len(rows_b), 1),
                "position_ids": positions_S.repeat(len(rows_b), 1),
            }
            if self.has_attention_mask:
                microbatch["attention_mask"] = self._future_b1SS
            yield microbatch

    def _filled_bS(self, rows_b: Integers) -> Integers32:
        """Return the tokens of some rows, filled up with those of the rows after them.

        Tokens behind a row's last watched one change none of its losses. If all of them were the
        same, they would go to the same experts, and fill their capacity.
        """
        tokens_bS = self.probe_set.tokens_BS[rows_b]
        for row, tokens_S in zip(rows_b, tokens_bS, strict=True):
            length = self._length_B[row]
            places = np.arange(self._end_B[row], self._end_B[row] + len(tokens_S) - length)
            tokens_S[length:] = self._token_X.take(places, mode="wrap")
        return tokens_bS

    @cached_property
    def _length_B(self) -> Integers:
        """Tokens of each row up to its last watched one."""
        mask_BS = self.probe_set.mask_BS
        length_B: Integers = mask_BS.shape[1] - mask_BS[:, ::-1].argmax(axis=1)
        return length_B

    @cached_property
    def _end_B(self) -> Integers:
        """End of each row in `_token_X`."""
        return self._length_B.cumsum()

    @cached_property
    def _token_X(self) -> Integers32:
        """The tokens of all rows without what fills them up, one row after the other."""
        tokens_BS = self.probe_set.tokens_BS
        return tokens_BS[np.arange(tokens_BS.shape[1]) < self._length_B[:, None]]

    def _moved(self, ids_bS: Integers32) -> torch.Tensor:
        """Return ids on the device; a copy from pinned memory does not wait for it."""
        ids = torch.from_numpy(ids_bS)
        if self.device.type == "cuda":
            ids = ids.pin_memory()
        return ids.to(self.device, non_blocking=True).long()

    @cached_property
    def _future_b1SS(self) -> torch.Tensor:
        """The attention mask, true where a query must not see a key; all microbatches share it.

        It takes b S^2 bytes once a pass, as much as the mask of one training microbatch. It is not
        an expanded [1, 1, S, S], since Megatron broadcasts it over the tensor-parallel ranks (also
        if there is one), and a collective needs contiguous memory.
        """
        positions_S = torch.arange(self.probe_set.seq_length, device=self.device)
        query_b1S1 = positions_S[:, None].expand(self.rows_Mb.shape[1], 1, -1, 1)
        return positions_S > query_b1S1
