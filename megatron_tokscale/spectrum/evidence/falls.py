"""Falls of losses between edges of x: a weighted sum of the losses at the probes for each fall.

A level at an edge is that of a line through the probes near it. So a fall has less noise than the
difference of two losses, needs no fit of the token, and is the same linear function of measured
losses, of mean curves and of models.

Shapes: K probe steps, J intervals between edges.
"""

import math
from typing import Final

import numpy as np

from megatron_tokscale.core.arrays import Floats

OCTAVE: Final = math.log(2)
"""A factor of two in time, in units of x."""
_REACH: Final = OCTAVE / 2
"""Largest distance of a probe from an edge whose level it sets: half an octave, so that falls two
octaves apart have no probe in common (our choice)."""


def intervals(from_x: float, to_x: float, length: float) -> Floats:
    """Return edges of equal intervals of about `length`, which fill the range."""
    count = max(round((to_x - from_x) / length), 1)
    return np.linspace(from_x, to_x, count + 1)


def fall_weights(x_K: Floats, edges: Floats) -> Floats:
    """Return the matrix (K, J) from losses at the probes to falls between successive edges.

    A level is the value at the edge of the line through the probes within half an octave, weighted
    by a triangle; with fewer than two such probes, losses are interpolated in x. A probe at
    x = -inf has no weight.
    """
    levels = np.stack([_level(x_K, float(x)) for x in edges], axis=1)
    return np.asarray(levels[:, :-1] - levels[:, 1:])


def _level(x_K: Floats, x: float) -> Floats:
    """Return the weights (K,) of the losses in the level at `x`."""
    distance_K = np.where(np.isfinite(x_K), x_K - x, np.inf)
    weight_K = np.clip(1 - np.abs(distance_K) / _REACH, 0, None)
    near = np.flatnonzero(weight_K)
    level_K = np.zeros(len(x_K))
    if len(near) < 2:
        finite = np.flatnonzero(np.isfinite(x_K))
        level_K[finite] = [np.interp(x, x_K[finite], row) for row in np.eye(len(finite))]
        return level_K
    # Weights of the value at distance 0 of the weighted least squares line.
    root, offset = np.sqrt(weight_K[near]), distance_K[near]
    line = np.stack([np.ones(len(near)), offset], axis=1) * root[:, None]
    level_K[near] = np.linalg.pinv(line)[0] * root
    return level_K
