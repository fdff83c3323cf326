"""A run's clock: the map from one of its times to another.

The spectrum of one run is over the time of its fits. Runs with other schedules or batch sizes are
compared at the same summed learning rate (docs/architecture.md 6).

Shapes: K probe steps, X values of x.
"""

import numpy as np
from numpy.typing import ArrayLike

from megatron_tokscale.core.arrays import Floats
from megatron_tokscale.core.errors import UndefinedError
from megatron_tokscale.store import Run
from megatron_tokscale.store.reader import Time


def between_clocks(run: Run, x_X: ArrayLike, *, given: Time, wanted: Time) -> Floats:
    """Return x of the wanted time at x of the given time, by the run's probes.

    Args:
        run: the run, whose records hold both times.
        x_X: natural logarithm of the given time; -inf is the start of the training.
        given: the time of `x_X`.
        wanted: the time to return.

    Raises:
        TokscaleError: the run has no record of one of the times, or it does not ascend.
        UndefinedError: fewer than two probes have both times.
    """
    if given == wanted:
        return np.asarray(x_X, dtype=np.float64)
    return map_clock(x_X, run.x_K(given), run.x_K(wanted))


def map_clock(x_X: ArrayLike, given_K: Floats, wanted_K: Floats) -> Floats:
    """Return x of one time at x of another, by probes at which both are known.

    The map is monotone: between two probes the logarithms are interpolated, and beyond the probes
    the nearest two are continued.

    Args:
        x_X: x of the given time; -inf stays -inf.
        given_K: x of the given time at the probes, ascending.
        wanted_K: x of the wanted time at the probes, ascending.

    Raises:
        UndefinedError: fewer than two probes have a finite x of both times.
    """
    x_X = np.asarray(x_X, dtype=np.float64)
    both_K = np.isfinite(given_K) & np.isfinite(wanted_K)
    given_K, wanted_K = given_K[both_K], wanted_K[both_K]
    if len(given_K) < 2:
        raise UndefinedError(
            f"{len(given_K)} probes after step 0 have both times; expected at least two; train on"
        )
    right_X = np.clip(np.searchsorted(given_K, x_X), 1, len(given_K) - 1)
    left, right = (
        (given_K[right_X - 1], wanted_K[right_X - 1]),
        (given_K[right_X], wanted_K[right_X]),
    )
    rate_X = (right[1] - left[1]) / (right[0] - left[0])
    with np.errstate(invalid="ignore"):
        mapped_X = left[1] + rate_X * (x_X - left[0])
    return np.asarray(np.where(np.isneginf(x_X), -np.inf, mapped_X))
