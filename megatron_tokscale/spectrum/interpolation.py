"""Curves at other places than their probes.

Shapes: K probe steps.
"""

import numpy as np

from megatron_tokscale.core.arrays import Floats, Floats32


def interpolated[T: (Floats, Floats32)](loss_NK: T, x_K: Floats, at_K: Floats) -> T:
    """Return curves at other x, interpolated linearly; outside of the probes, the nearest loss.

    Args:
        loss_NK: the curves along the last axis; any number of axes may lead.
        x_K: x of the probes, ascending; those that are not finite do not count.
        at_K: the other x.
    """
    finite = np.flatnonzero(np.isfinite(x_K))
    inner_K = x_K[finite]
    right = np.clip(np.searchsorted(inner_K, at_K), 1, len(inner_K) - 1)
    share = (at_K - inner_K[right - 1]) / (inner_K[right] - inner_K[right - 1])
    share = np.clip(share, 0, 1).astype(loss_NK.dtype)
    before, after = loss_NK[..., finite[right - 1]], loss_NK[..., finite[right]]
    return np.asarray(before + share * (after - before))
