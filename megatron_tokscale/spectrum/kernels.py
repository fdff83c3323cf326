"""Compiled loops over tokens: what a million losses, or a million sigmoids, add up to.

Shapes: N tokens, E transitions, C cells (rows of the sums), K probe steps.
"""

from typing import Any

import numpy as np

from megatron_tokscale.core.compiled import FAST, compiled
from megatron_tokscale.fit.kernels import sigmoid


@compiled(**FAST)
def add_losses(total_CK: Any, cell_N: Any, loss_NK: Any) -> None:
    """Add the finite losses of every token to its cell's row; the sums are float64."""
    for n in range(len(cell_N)):
        cell = cell_N[n]
        for k in range(loss_NK.shape[1]):
            total_CK[cell, k] += loss_NK[n, k]


@compiled(**FAST)
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


@compiled(**FAST)
def add_ramps(total_CK: Any, cell_E: Any, slope_E: Any, onset_E: Any, x_K: Any) -> None:
    """Add slope * max(x - onset, 0) of every gradual token to its cell's row."""
    for e in range(len(cell_E)):
        cell, slope, onset = cell_E[e], slope_E[e], onset_E[e]
        for k in range(len(x_K)):
            total_CK[cell, k] += slope * max(x_K[k] - onset, np.float32(0))
