"""Which stratum is drawn from next, compiled: one pass over the samples of a segment.

Two rules, one after the other. Which dataset: Megatron's own until the datasets' weights first
change, then that of windows. Which stratum of the dataset: that of windows, over the samples drawn
from the dataset.

Megatron's rule (`build_blending_indices` in core/datasets/helpers.cpp): the dataset furthest behind
its share. So a plan that leaves the datasets' weights alone draws from the datasets as the plain
blend does, sample for sample. It can only start anew, so it cannot go on after a change of weights.

The rule of windows: draw j of n is released when the target has come to j + e and is due when it
comes to j + 1 - e, e = 1 / (2 n - 2); of those released, the one that is due first. While weights
hold, no prefix is off by more than 1 - e samples, and no rule does better: Tijdeman, "The chairman
assignment problem", Discrete Mathematics 32 (1980). Counts carry over a change of weights, so no
draw is lost or repeated; what rounding has left owing is repaid after it.

Shapes: N samples of a segment, D datasets, Z strata.
"""

import numpy as np
from numpy.typing import NDArray

from megatron_tokscale.core.compiled import EXACT, compiled

_compiled = compiled(**EXACT)

# Released up to this early, in samples: what sums of weights lose to rounding.
_EARLY = 1e-9


@_compiled
def draw(
    stratum_N: NDArray[np.int16],
    draw_N: NDArray[np.int64],
    first: int,
    is_unchanged: bool,
    weight_D: NDArray[np.float64],
    target_D: NDArray[np.float64],
    drawn_D: NDArray[np.int64],
    first_D: NDArray[np.int64],
    within_Z: NDArray[np.float64],
    target_Z: NDArray[np.float64],
    drawn_Z: NDArray[np.int64],
) -> None:
    """Fill `stratum_N` and `draw_N`, and count on in `drawn_D` and `drawn_Z`.

    Args:
        stratum_N: out, the stratum of each sample.
        draw_N: out, which draw of its stratum it is, from 0.
        first: global number of the first sample.
        is_unchanged: whether the datasets' weights are still those of the plan's first stage.
        weight_D: weights of the datasets, summing to one.
        target_D: samples due from each dataset before the first sample.
        drawn_D: samples drawn from each dataset before the first sample.
        first_D: the first stratum of each dataset, and behind the last the number of strata.
        within_Z: weights of the strata in their datasets, summing to one in each.
        target_Z: samples due from each stratum before the first sample, of those of its dataset.
        drawn_Z: samples drawn from each stratum before the first sample.
    """
    n_datasets = weight_D.size
    early_D, late_D = np.empty(n_datasets), np.empty(n_datasets)
    early_Z, late_Z = np.empty(within_Z.size), np.empty(within_Z.size)
    margin_Z = np.empty(within_Z.size)
    before_D = drawn_D.copy()
    ahead_D = np.where(weight_D > 0.0, drawn_D, np.inf)
    margin = _margin(np.count_nonzero(weight_D))
    for d in range(n_datasets):
        early_D[d], late_D[d] = _window(drawn_D[d], target_D[d], weight_D[d], margin)
        strata = within_Z[first_D[d] : first_D[d + 1]]
        for z in range(first_D[d], first_D[d + 1]):
            margin_Z[z] = _margin(np.count_nonzero(strata))
            early_Z[z], late_Z[z] = _window(drawn_Z[z], target_Z[z], within_Z[z], margin_Z[z])
    queue_D = np.argsort(late_D, kind="mergesort")
    queue_Z = np.empty(within_Z.size, np.int64)
    for d in range(n_datasets):
        a, b = first_D[d], first_D[d + 1]
        queue_Z[a:b] = a + np.argsort(late_Z[a:b], kind="mergesort")
    for n in range(stratum_N.size):
        if is_unchanged:
            d = _furthest_behind(weight_D, ahead_D, max(float(first + n), 1.0))
        else:
            i = _due_first(queue_D, early_D, n + 1.0)
            d = queue_D[i]
        queue = queue_Z[first_D[d] : first_D[d + 1]]
        j = _due_first(queue, early_Z, drawn_D[d] - before_D[d] + 1.0)
        z = queue[j]
        stratum_N[n] = z
        draw_N[n] = drawn_Z[z]
        drawn_D[d] += 1
        ahead_D[d] += 1.0
        drawn_Z[z] += 1
        early_Z[z], late_Z[z] = _window(drawn_Z[z], target_Z[z], within_Z[z], margin_Z[z])
        _move_back(queue, j, late_Z)
        if not is_unchanged:
            early_D[d], late_D[d] = _window(drawn_D[d], target_D[d], weight_D[d], margin)
            _move_back(queue_D, i, late_D)


@_compiled
def _margin(count: int) -> float:
    """The e of the rule of windows, for so many to draw from."""
    return 1.0 / max(2 * count - 2, 2)


@_compiled
def _window(drawn: int, target: float, weight: float, margin: float) -> tuple[float, float]:
    """When the next draw is released and when it is due, in samples of the segment."""
    if weight == 0.0:
        return np.inf, np.inf
    return (drawn + margin - target) / weight - _EARLY, (drawn + 1 - margin - target) / weight


@_compiled
def _furthest_behind(
    weight_D: NDArray[np.float64], drawn_D: NDArray[np.float64], n_samples: float
) -> int:
    """Megatron's rule. A dataset without weight is taken to be infinitely far ahead."""
    best, most = 0, -np.inf
    for d in range(weight_D.size):
        behind = weight_D[d] * n_samples - drawn_D[d]
        # Without a branch: which one comes next is what a processor cannot guess.
        best = d if behind > most else best
        most = max(behind, most)
    return best


@_compiled
def _due_first(queue: NDArray[np.int64], early: NDArray[np.float64], now: float) -> int:
    """The place in the queue of the first that is released; if none is, the first place."""
    for i in range(queue.size):
        if early[queue[i]] <= now:
            return i
    return 0


@_compiled
def _move_back(queue: NDArray[np.int64], i: int, late: NDArray[np.float64]) -> None:
    """Put the one at place i of the queue where it belongs now that it is due later.

    The queue is by when they are due, ties by their numbers.
    """
    moved = queue[i]
    while i + 1 < queue.size:
        other = queue[i + 1]
        if late[other] > late[moved] or (late[other] == late[moved] and other > moved):
            break
        queue[i] = other
        i += 1
    queue[i] = moved
