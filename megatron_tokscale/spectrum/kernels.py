"""Compiled loops that sum losses, sigmoids and ramps over a million tokens by cell.

Shapes: N tokens, E transitions, C cells (rows of the sums), K probe steps.
"""

import numpy as np

from megatron_tokscale.core.arrays import Floats, Floats32, Integers, Integers32
from megatron_tokscale.core.compiled import FAST, compiled
from megatron_tokscale.fit.kernel_rows import sigmoid


@compiled(**FAST)
def add_losses(total_CK: Floats, cell_N: Integers | Integers32, loss_NK: Floats | Floats32) -> None:
    """Add the finite losses of every token to its cell's row; the sums are float64."""
    for n in range(len(cell_N)):
        cell = cell_N[n]
        for k in range(loss_NK.shape[1]):
            total_CK[cell, k] += loss_NK[n, k]


@compiled(**FAST)
def add_sigmoids(
    total_CK: Floats,
    cell_E: Integers | Integers32,
    drop_E: Floats32,
    midpoint_E: Floats32,
    width_E: Floats32,
    x_K: Floats32,
) -> None:
    """Add drop * s((midpoint - x)/width) of every transition to its cell's row.

    The sums are float64, and the sigmoids float32. All x are finite.
    """
    for e in range(len(cell_E)):
        cell, drop = cell_E[e], drop_E[e]
        narrowness = np.float32(1) / width_E[e]
        offset = midpoint_E[e] * narrowness
        for k in range(len(x_K)):
            total_CK[cell, k] += drop * sigmoid(offset - x_K[k] * narrowness)


@compiled(**FAST)
def add_ramps(
    total_CK: Floats,
    cell_E: Integers | Integers32,
    slope_E: Floats32,
    onset_E: Floats32,
    x_K: Floats32,
) -> None:
    """Add slope * max(x - onset, 0) of every gradual token to its cell's row."""
    for e in range(len(cell_E)):
        cell, slope, onset = cell_E[e], slope_E[e], onset_E[e]
        for k in range(len(x_K)):
            total_CK[cell, k] += slope * max(x_K[k] - onset, np.float32(0))
