"""Losses find their places by the coordinates that come with them, or the probe is refused.

Shapes: P data-parallel ranks, R ranks with losses, M microbatches, b sequences, s tokens of a rank.
"""

import numpy as np
import pytest
from integer_losses import SEQ_LENGTH, numbered_probe_set
from numpy.testing import assert_array_equal

from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.training.probe.gathering import place_losses
from megatron_tokscale.training.probe.microbatches import deal_rows


def messages(n_sequences, rows_PMb, cp_size, rng):
    """The messages of all ranks, put together loss by loss, ranks and columns in any order.

    The loss of a token is its number; rows beyond the set have the loss -1.
    """
    n_ranks, n_microbatches, _ = rows_PMb.shape
    parts = []
    for dp_rank in range(n_ranks):
        for columns_s in rng.permutation(SEQ_LENGTH).reshape(cp_size, -1):
            losses = [
                row * SEQ_LENGTH + column if row < n_sequences else -1
                for microbatch in range(n_microbatches)
                for row in rows_PMb[dp_rank, microbatch]
                for column in columns_s
            ]
            parts.append([*losses, *columns_s, dp_rank])
    return np.array(parts, np.float32)[rng.permutation(len(parts))]


@pytest.mark.parametrize("cp_size", [1, 2, 6])
@pytest.mark.parametrize("n_ranks", [1, 2, 5])
def test_every_loss_finds_its_token(n_ranks, cp_size):
    rng = np.random.default_rng(n_ranks)
    for n_sequences in (1, 11, 40):
        rows_PMb = deal_rows(n_sequences, 2, n_ranks, 1)
        message_RX = messages(n_sequences, rows_PMb, cp_size, rng)
        loss_N = place_losses(message_RX, rows_PMb, numbered_probe_set(n_sequences))
        numbers = np.arange(n_sequences * SEQ_LENGTH)
        assert loss_N.dtype == np.float32
        assert_array_equal(loss_N, numbers[numbers % 3 > 0])


@pytest.mark.parametrize("column", [-1, 1, SEQ_LENGTH, 99, SEQ_LENGTH - 1, 0.5, np.nan, np.inf])
@pytest.mark.parametrize("cp_size", [1, 2])
def test_a_mask_that_was_not_passed_through_is_noticed(cp_size, column):
    """Column 0 becomes one that is doubled, out of range, or no column at all."""
    rows_PMb = deal_rows(4, 2, 2, 1)
    message_RX = messages(4, rows_PMb, cp_size, np.random.default_rng(0))
    columns_Rs = message_RX[:, -1 - SEQ_LENGTH // cp_size : -1]
    columns_Rs[tuple(np.argwhere(columns_Rs == 0)[0])] = column
    with pytest.raises(TokscaleError, match="loss_mask"):
        place_losses(message_RX, rows_PMb, numbered_probe_set(4))


def test_a_column_of_another_rank_is_noticed():
    """All columns are there twice, as they should be, but not once on each of two ranks."""
    rows_PMb = deal_rows(4, 2, 2, 1)
    message_RX = messages(4, rows_PMb, 1, np.random.default_rng(0))
    columns_Rs = message_RX[:, -1 - SEQ_LENGTH : -1]
    columns_Rs[0, columns_Rs[0] == 3] = 4
    columns_Rs[1, columns_Rs[1] == 4] = 3
    with pytest.raises(TokscaleError, match="loss_mask"):
        place_losses(message_RX, rows_PMb, numbered_probe_set(4))
