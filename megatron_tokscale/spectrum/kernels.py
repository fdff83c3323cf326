"""Compiled loops over transitions: what a million sigmoids add up to.

Shapes: E transitions, C cells (rows of the sums), K probe steps.
"""

from typing import Any

import numpy as np
from numba import njit

from megatron_tokscale.fit.kernels import FAST, sigmoid


@njit(**FAST)
def add_sigmoids(
    total_CK: Any, cell_E: Any, drop_E: Any, midpoint_E: Any, width_E: Any, x_K: Any
) -> None:
    """Add drop * s((midpoint - x)/width) of every transition to its cell's row.

    The sums are float64, the sigmoids float32; x is finite.
    """
    for e in range(len(cell_E)):
        cell, drop = cell_E[e], drop_E[e]
        narrowness = np.float32(1) / width_E[e]
        offset = midpoint_E[e] * narrowness
        for k in range(len(x_K)):
            total_CK[cell, k] += drop * sigmoid(offset - x_K[k] * narrowness)


@njit(**FAST)
def add_ramps(total_CK: Any, cell_E: Any, slope_E: Any, onset_E: Any, x_K: Any) -> None:
    """Add slope * max(x - onset, 0) of every gradual token to its cell's row."""
    for e in range(len(cell_E)):
        for k in range(len(x_K)):
            total_CK[cell_E[e], k] += slope_E[e] * max(x_K[k] - onset_E[e], np.float32(0))
