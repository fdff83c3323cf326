"""The top of the shift model: the loss of a token that is not learned.

Shapes: P points, C cells, I runs.
"""

import numpy as np

from megatron_tokscale.core.arrays import Floats
from megatron_tokscale.results.axis import Top
from megatron_tokscale.spectrum.axes.curves import Points
from megatron_tokscale.spectrum.axes.shift import fit_shift


def first_losses(points: Points, loss_CP: Floats) -> Floats:
    """Return each cell's loss at the runs' first probes, (C,): the mean over the runs in nats."""
    first_I = np.unique(points.run_P, return_index=True)[1]
    return np.asarray(loss_CP[..., first_I].mean(axis=-1))


def choose_top(points: Points, loss_P: Floats) -> Top:
    """Return the better top where no probe shows it: the first loss, or an unknown one.

    The better one leaves the smaller squares. The first loss is the highest of all runs.
    """
    known = fit_shift(points, loss_P[None], highest_first(points, loss_P[None]))
    unknown = fit_shift(points, loss_P[None], np.array([np.nan]))
    return Top.FIRST if known.squares < unknown.squares else Top.UNKNOWN


def highest_first(points: Points, loss_CP: Floats) -> Floats:
    """Return each cell's highest loss at the runs' first probes, (C,) in nats."""
    first_I = np.unique(points.run_P, return_index=True)[1]
    return np.asarray(loss_CP[..., first_I].max(axis=-1))
