"""No token changes its place on the way from the ranks to the writer, in any layout."""

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from megatron_tokscale.errors import TokscaleError
from megatron_tokscale.training.probe_pass import rows_of_this_rank, scatter_losses

LENGTH = 8


def zigzag(length, rank, ranks):
    """Positions of a context-parallel rank: chunks r and 2 cp - 1 - r, as Megatron cuts them."""
    chunks = np.arange(length).reshape(2 * ranks, -1)
    return np.concatenate([chunks[rank], chunks[2 * ranks - 1 - rank]])


def gathered(n_sequences, micro_batch, dp, cp, multiple):
    """What arrives at the writer if the loss of each token is its own number."""
    losses, coordinates, rows = [], [], []
    for dp_rank in range(dp):
        rows_Mb = rows_of_this_rank(n_sequences, micro_batch, dp_rank, dp, multiple)
        for cp_rank in range(cp):
            columns = zigzag(LENGTH, cp_rank, cp) if cp > 1 else np.arange(LENGTH)
            number = (rows_Mb % n_sequences)[..., None] * LENGTH + columns
            losses.append(number.astype(np.float32))
            coordinates.append(np.broadcast_to(columns + 1, number.shape).astype(np.float32))
            rows.append(rows_Mb.astype(np.int32))
    return np.stack(losses), np.stack(coordinates), np.stack(rows)


@pytest.mark.parametrize("n_sequences", [1, 5, 12, 31])
@pytest.mark.parametrize("micro_batch", [1, 2, 4])
@pytest.mark.parametrize("dp", [1, 2, 3])
@pytest.mark.parametrize("cp", [1, 2])
@pytest.mark.parametrize("multiple", [1, 2, 4])
def test_integers_as_losses_come_back_in_order(n_sequences, micro_batch, dp, cp, multiple):
    found = scatter_losses(
        *gathered(n_sequences, micro_batch, dp, cp, multiple), n_sequences, LENGTH
    )
    assert_array_equal(found, np.arange(n_sequences * LENGTH).reshape(n_sequences, LENGTH))


def test_all_ranks_agree_on_the_number_of_microbatches():
    counts = {len(rows_of_this_rank(31, 2, rank, 3, 4)) for rank in range(3)}
    assert counts == {8}


@pytest.mark.parametrize("spoil", [0, 1, 99, -3])
def test_a_mask_that_was_not_passed_through_is_noticed(spoil):
    losses, coordinates, rows = gathered(5, 2, 1, 1, 1)
    coordinates = coordinates.copy()
    coordinates[0, 0, 0, 3] = spoil
    with pytest.raises(TokscaleError, match="loss_mask"):
        scatter_losses(losses, coordinates, rows, 5, LENGTH)
