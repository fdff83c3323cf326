"""Microbatches of a probe: dealt in the set's mixture, and the mask of Megatron's own datasets.

Shapes: P data-parallel ranks, M microbatches of a rank, b sequences of a microbatch, B sequences.
"""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from integer_losses import SEQ_LENGTH, numbered_probe_set
from numpy.testing import assert_array_equal

from megatron_tokscale.training.probe.microbatches import Microbatches, deal_rows

SIZES = [(1, 1, 1, 1), (31, 2, 3, 4), (32, 2, 3, 2), (245, 2, 8, 1), (5, 4, 8, 2), (96, 1, 12, 1)]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_every_sequence_is_in_one_place_of_one_rank(sizes):
    n_sequences, micro_batch_size, ranks, multiple = sizes
    rows_PMb = deal_rows(*sizes)
    assert rows_PMb.shape[::2] == (ranks, micro_batch_size)
    assert rows_PMb.shape[1] % multiple == 0
    assert sorted(rows_PMb.flatten().tolist()) == list(range(rows_PMb.size))
    fewer = rows_PMb.shape[1] - multiple
    assert fewer * ranks * micro_batch_size < n_sequences <= rows_PMb.size


@pytest.mark.parametrize("micro_batch_size", [1, 2, 4])
@pytest.mark.parametrize("ranks", [1, 2, 3, 8, 12, 32])
@pytest.mark.parametrize("shares", [(172, 73), (10, 60, 30), (1, 1)], ids=str)
def test_every_microbatch_has_the_mixture_of_the_set(shares, ranks, micro_batch_size):
    """To within one sequence of each dataset, over all ranks; so has each group of neighbours."""
    n_microbatches = 12
    n_sequences = n_microbatches * ranks * micro_batch_size
    edges = np.rint(np.cumsum(shares) / sum(shares) * n_sequences)
    dataset_B = np.searchsorted(edges, np.arange(n_sequences), side="right")
    rows_PMb = deal_rows(n_sequences, micro_batch_size, ranks, 1)
    assert rows_PMb.shape[1] == n_microbatches
    counts = np.bincount(dataset_B)
    for dataset, microbatch in itertools.product(range(len(shares)), range(n_microbatches)):
        is_it_Pb = dataset_B[rows_PMb[:, microbatch]] == dataset
        assert abs(is_it_Pb.sum() - counts[dataset] / n_microbatches) < 1
        # Experts are shared by neighbouring ranks: 2, 4, ... of them.
        for size in (2, 4, 8, 16):
            if ranks % size == 0:
                found = is_it_Pb.reshape(-1, size * micro_batch_size).sum(axis=1)
                expected = counts[dataset] / n_sequences * size * micro_batch_size
                assert abs(found - expected).max() < 2


def microbatches(n_sequences=5, micro_batch_size=2, *, has_attention_mask=True, device="cpu"):
    rows_PMb = deal_rows(n_sequences, micro_batch_size, 1, 1)
    probe_set = numbered_probe_set(n_sequences)
    return Microbatches(probe_set, rows_PMb[0], has_attention_mask, torch.device(device))


def test_microbatches_have_the_rows_that_were_dealt():
    rows_Mb = deal_rows(5, 2, 1, 1)[0] % 5
    numbers_BS = np.arange(5 * SEQ_LENGTH).reshape(5, SEQ_LENGTH)
    for rows_b, batch in zip(rows_Mb, microbatches(), strict=True):
        for name in ("tokens", "labels"):
            assert batch[name].dtype == torch.int64
            assert_array_equal(batch[name], numbers_BS[rows_b])
        for row_S in batch["position_ids"].tolist():
            assert row_S == list(range(SEQ_LENGTH))
        assert batch["loss_mask"].dtype == torch.float32
        assert_array_equal(batch["loss_mask"], batch["position_ids"] + 1)


def test_rows_are_filled_up_with_the_tokens_of_the_rows_after_them():
    """Against lists: an expert must not see one padding token S times."""
    lengths = [SEQ_LENGTH, 7, 1, 20, 3]
    numbered = numbered_probe_set(len(lengths))
    mask_BS = numbered.mask_BS & (np.arange(SEQ_LENGTH) < np.array(lengths)[:, None])
    mask_BS[np.arange(len(lengths)), np.array(lengths) - 1] = True
    probe_set = replace(numbered, mask_BS=mask_BS)
    rows_Mb = deal_rows(len(lengths), 2, 1, 1)[0]
    before_BS = probe_set.tokens_BS.copy()
    batches = list(Microbatches(probe_set, rows_Mb, False, torch.device("cpu")))
    texts = [before_BS[row, :n].tolist() for row, n in enumerate(lengths)]
    for rows_b, batch in zip(rows_Mb % len(lengths), batches, strict=True):
        for row, tokens_S in zip(rows_b, batch["tokens"].tolist(), strict=True):
            following = [*texts[row:], *texts, *texts[:row]]
            assert tokens_S == [token for text in following for token in text][:SEQ_LENGTH]
        assert_array_equal(batch["labels"], probe_set.labels_BS[rows_b])
    assert_array_equal(probe_set.tokens_BS, before_BS)


@pytest.mark.parametrize("micro_batch_size", [1, 3])
def test_the_attention_mask_is_that_of_megatrons_datasets(micro_batch_size):
    from megatron.core.datasets.gpt_dataset import _get_ltor_masks_and_position_ids

    expected, *_ = _get_ltor_masks_and_position_ids(
        torch.arange(SEQ_LENGTH), 0, False, False, False, True
    )
    masks = [batch["attention_mask"] for batch in microbatches(7, micro_batch_size)]
    for mask in masks:
        assert mask.dtype == expected.dtype == torch.bool
        assert_array_equal(mask, expected.expand(micro_batch_size, 1, -1, -1))
        assert mask.is_contiguous(), "a collective takes no other"
        assert mask is masks[0], "it is made once"


def test_there_is_no_attention_mask_where_scripts_have_none():
    assert all("attention_mask" not in b for b in microbatches(has_attention_mask=False))
