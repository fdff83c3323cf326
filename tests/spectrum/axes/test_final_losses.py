"""Sizes at which half of a fall is done, against falls by hand. N tokens."""

import numpy as np
import pytest

from megatron_tokscale.core.errors import UndefinedError
from megatron_tokscale.spectrum.axes.final_losses import size_thresholds


def test_the_size_of_half_the_fall_is_interpolated_and_equal_sizes_are_averaged():
    log_size = np.array([1.0, 2.0, 2.0, 4.0])
    loss = np.array([[4.0, 3.9, 4.1, 2.0], [4.0, 2.0, 2.0, 2.0], [1.0, 2.0, 2.0, 3.0]], np.float32)
    at, fall = size_thresholds(log_size, loss)
    # 4 -> 4 -> 2: half at 3 nats, midway from ln size 2 to 4; 4 -> 2 -> 2: midway from 1 to 2.
    assert at[:2] == pytest.approx([3.0, 1.5])
    assert fall == pytest.approx([2.0, 2.0, 0.0], abs=1e-6)
    assert np.isnan(at[2])


def test_one_size_has_no_threshold():
    with pytest.raises(UndefinedError, match="all runs have one size"):
        size_thresholds(np.zeros(3), np.zeros((2, 3), np.float32))
