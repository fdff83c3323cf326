"""The sum of every token's own kernel on a grid, at a cost that does not depend on their number.

-dL/dx is a sum of bumps (A/w) s'((x - c)/w) (papers.md 1.4), of as many widths as there are tokens.
Drops are spread over a fine grid of midpoints and a logarithmic grid of widths; for every width the
kernel's sum is then one convolution.

Shapes: E transitions, G grid points, C points of the fine grid, V widths.
"""

import math

import numpy as np
from scipy.signal import oaconvolve
from scipy.special import expit

from megatron_tokscale.fit import Transitions
from megatron_tokscale.spectrum.density import Array

_PER_OCTAVE = 8
_FINE = 16_384
_NARROWEST = 8  # grid spacings; there splitting a drop between two midpoints blunts it by 0.1%
_REACH = 40  # widths; the bump there is e^-40


def kernel_sum(moves: Transitions, low: float, high: float) -> tuple[Array, Array]:
    """Sum over transitions of drop/width * s'((x - midpoint)/width) on a uniform grid.

    The drops are split between the neighbouring midpoints and widths of the grid so that their
    sums and means stay (linear in c, and in ln w): the error is of second order in the spacings.
    Where a width is below eight grid spacings, a 2,048th of the range, the bump is that of eight,
    of the same area. Any wider bump is exact to 0.2% of its peak.

    Args:
        moves: transitions, which may lie outside the range.
        low: first grid point.
        high: last grid point.

    Returns:
        The grid (16,385 points) and the sum, in nats per unit of x.
    """
    x_C, step = np.linspace(low, high, _FINE + 1, retstep=True)
    width_E = np.clip(moves.width_E, _NARROWEST * step, None)
    position_E = (moves.midpoint_E - low) / step
    near_E = (position_E > -_REACH * width_E / step) & (
        position_E < _FINE + _REACH * width_E / step
    )
    margin = math.ceil(np.max(np.abs(position_E[near_E] - _FINE / 2), initial=_FINE / 2)) + 1
    offset = margin - _FINE // 2
    level_E = (np.log2(width_E[near_E]) - math.log2(_NARROWEST * step)) * _PER_OCTAVE
    n_levels = math.ceil(np.max(level_E, initial=0.0)) + 2
    drop_VC = np.zeros((n_levels, 2 * margin + 2))
    _spread(drop_VC, level_E, position_E[near_E] + offset, moves.drop_E[near_E])
    total_C = np.zeros(_FINE + 1)
    for v in np.flatnonzero(drop_VC.any(axis=1)):
        width = _NARROWEST * step * 2 ** (v / _PER_OCTAVE)
        reach = math.ceil(min(_REACH * width / step, drop_VC.shape[1]))
        s = expit(np.arange(-reach, reach + 1) * step / width)
        summed = oaconvolve(drop_VC[v], s * (1 - s) / width)
        total_C += summed[reach + offset : reach + offset + _FINE + 1]
    return x_C, total_C


def _spread(drop_VC: Array, level_E: Array, position_E: Array, drop_E: Array) -> None:
    """Add each drop to the four cells around (level, position), by its closeness to each."""
    v_E, c_E = np.floor(level_E).astype(np.int64), np.floor(position_E).astype(np.int64)
    up_E, right_E = level_E - v_E, position_E - c_E
    flat, n_columns = drop_VC.reshape(-1), drop_VC.shape[1]  # add.at is fast on one axis alone
    for dv, share_v in ((0, 1 - up_E), (1, up_E)):
        for dc, share_c in ((0, 1 - right_E), (1, right_E)):
            np.add.at(flat, (v_E + dv) * n_columns + c_E + dc, drop_E * share_v * share_c)
