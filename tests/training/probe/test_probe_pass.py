"""No token changes its place on the way from the ranks to the writer, in any layout."""

import json

import numpy as np
import pytest
import torch
from integer_losses import SEQ_LENGTH, SIZES
from jobs import TESTS, run_forked
from numpy.testing import assert_array_equal

# Ranks, and the sizes of the layout; what the sizes leave is data-parallel.
LAYOUTS = [
    (1, {}),
    (2, {"tp": 2}),
    (3, {}),
    (3, {"pp": 3, "vpp": 2}),
    (4, {"pp": 4}),
    (4, {"tp": 2, "pp": 2, "sp": True}),
    (4, {"pp": 2, "vpp": 2}),
    (4, {"pp": 2, "vpp": 3, "vpp_group": 4}),
    (4, {"cp": 2}),
    (4, {"cp": 4}),
    (4, {"tp": 2, "cp": 2, "sp": True}),
    (4, {"cp": 2, "pp": 2, "vpp": 2}),
    (4, {"ep": 4}),
    (4, {"tp": 2, "ep": 4, "etp": 1}),
    (6, {"pp": 2, "vpp": 2}),
    (6, {"pp": 2, "cp": 3}),
    (6, {"tp": 2, "cp": 3}),
    (8, {"tp": 2, "pp": 2, "cp": 2}),
    (8, {"tp": 2, "pp": 2, "vpp": 2, "cp": 2, "sp": True}),
    (8, {"tp": 2, "pp": 2, "order": "tp-cp-ep-pp-dp"}),
    (8, {"pp": 2, "vpp": 2, "cp": 2, "ep": 2}),
    (8, {"tp": 2, "cp": 2, "ep": 2, "etp": 2, "sp": True}),
]


def in_words(layout):
    ranks, sizes = layout
    return " ".join([f"{ranks} ranks", *(f"{name}={size}" for name, size in sizes.items())])


@pytest.mark.megatron
@pytest.mark.parametrize("layout", LAYOUTS, ids=in_words)
def test_integers_as_losses_come_back_in_order(layout, tmp_path):
    ranks, sizes = layout
    run_forked(
        ranks, str(TESTS / "integer_losses.py"), str(tmp_path / "found.pt"), json.dumps(sizes)
    )
    found = torch.load(tmp_path / "found.pt")
    assert list(found) == list(SIZES)
    n_chunks = sizes.get("pp", 1) * sizes.get("vpp", 1)
    for (n_sequences, _), loss_N in found.items():
        numbers = np.arange(n_sequences * SEQ_LENGTH)
        assert_array_equal(loss_N, numbers[numbers % 3 > 0] + n_chunks)
