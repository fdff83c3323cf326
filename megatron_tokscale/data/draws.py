"""The stratum of each sample of a segment, compiled: one pass over the samples.

Two choices, one after the other. Megatron's own rule chooses the dataset until the datasets'
weights first change, and the window rule afterwards. The window rule also chooses the stratum, over
the samples drawn from the dataset.

Megatron's rule (`build_blending_indices` in core/datasets/helpers.cpp): take the dataset furthest
behind its share. So a plan that keeps the datasets' weights draws from the datasets as the blend
does, sample for sample. The rule assumes the same weights from sample 0 on, so it ends at the first
change of weights.

The window rule, for n sources and e = 1 / (2 n - 2): draw j of a source is released when the
source's target reaches j + e, and is due when the target reaches j + 1 - e. Of all released draws,
the one due first is made. Under constant weights no source's count is ever more than 1 - e samples
off its target, and no rule does better: Tijdeman, "The chairman assignment problem", Discrete
Mathematics 32 (1980). Counts carry over a change of weights, so no draw is lost or repeated; a draw
that rounding delays past the change is made after it.

Shapes: N samples of a segment, D datasets, Z strata, S sources (datasets, or strata).
"""

from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_tokscale.core.arrays import Floats, Integers
from megatron_tokscale.core.compiled import EXACT, compiled

_compiled = compiled(**EXACT)

_EARLY: Final = 1e-9
"""Draws are released this many samples early; the rounding error of a sum of weights is smaller."""


class Sources(NamedTuple):
    """The datasets, or the strata, that samples are drawn from.

    Attributes:
        weight_S: normalised weights: over the datasets, or over the strata of each dataset.
        target_S: samples due from each before the segment; for a stratum, among its dataset's
            samples.
        drawn_S: samples drawn from each so far; `draw` adds to them.
    """

    weight_S: Floats
    target_S: Floats
    drawn_S: Integers


@_compiled
def draw(
    stratum_N: NDArray[np.int16],
    draw_N: Integers,
    first: int,
    is_unchanged: bool,
    datasets: Sources,
    strata: Sources,
    first_D: Integers,
) -> None:
    """Fill `stratum_N` and `draw_N`, and count the draws from datasets and strata.

    Args:
        stratum_N: out, the stratum of each sample.
        draw_N: out, the number of its draw from the stratum, from 0.
        first: global number of the first sample.
        is_unchanged: whether the datasets' weights are still those of the plan's first stage.
        datasets: the datasets.
        strata: the strata.
        first_D: the first stratum of each dataset, and behind the last the number of strata.
    """
    # The window of the next draw of each dataset and stratum, and its place in the queue.
    n_datasets = datasets.weight_S.size
    one_group = np.array([0, n_datasets])
    margin_D, early_D, late_D, queue_D = _open_windows(datasets, one_group)
    margin_Z, early_Z, late_Z, queue_Z = _open_windows(strata, first_D)
    before_D = datasets.drawn_S.copy()
    ahead_D = np.where(datasets.weight_S > 0.0, datasets.drawn_S, np.inf)
    for n in range(stratum_N.size):
        # Choose the dataset, by Megatron's rule or the window rule.
        i = -1
        if is_unchanged:
            d = _furthest_behind(datasets.weight_S, ahead_D, max(float(first + n), 1.0))
        else:
            i = _due_first(queue_D, early_D, n + 1.0)
            d = queue_D[i]

        # Choose its stratum, by the window rule over the samples of the dataset.
        queue = queue_Z[first_D[d] : first_D[d + 1]]
        j = _due_first(queue, early_Z, datasets.drawn_S[d] - before_D[d] + 1.0)
        z = queue[j]
        stratum_N[n] = z
        draw_N[n] = strata.drawn_S[z]

        # Advance both to the windows of their next draws.
        datasets.drawn_S[d] += 1
        ahead_D[d] += 1.0
        strata.drawn_S[z] += 1
        early_Z[z], late_Z[z] = _window(strata, z, margin_Z[z])
        _move_back(queue, j, late_Z)
        if not is_unchanged:
            early_D[d], late_D[d] = _window(datasets, d, margin_D[d])
            _move_back(queue_D, i, late_D)


@_compiled
def _open_windows(sources: Sources, first_G: Integers) -> tuple[Floats, Floats, Floats, Integers]:
    """Return margin, release and due time of each source's next draw, and the sources by due time.

    Args:
        sources: in groups that follow each other.
        first_G: the first source of each group, and behind the last the number of sources.
    """
    n_sources = sources.weight_S.size
    margin_S, early_S, late_S = np.empty(n_sources), np.empty(n_sources), np.empty(n_sources)
    queue_S = np.empty(n_sources, np.int64)
    for g in range(first_G.size - 1):
        a, b = first_G[g], first_G[g + 1]
        # The e of the window rule, for the sources that have weight.
        n_weighted = int(np.count_nonzero(sources.weight_S[a:b]))
        margin_S[a:b] = 1.0 / max(2 * n_weighted - 2, 2)
        for s in range(a, b):
            early_S[s], late_S[s] = _window(sources, s, margin_S[s])
        queue_S[a:b] = a + np.argsort(late_S[a:b], kind="mergesort")
    return margin_S, early_S, late_S, queue_S


@_compiled
def _window(sources: Sources, s: int, margin: float) -> tuple[float, float]:
    """Return when a source's next draw is released and when it is due, in samples of the segment.

    For a stratum, the samples are those of its dataset.
    """
    weight = sources.weight_S[s]
    if weight == 0.0:
        return np.inf, np.inf
    drawn, target = sources.drawn_S[s], sources.target_S[s]
    return (drawn + margin - target) / weight - _EARLY, (drawn + 1 - margin - target) / weight


@_compiled
def _furthest_behind(weight_D: Floats, drawn_D: Floats, n_samples: float) -> int:
    """Return the dataset furthest behind its share, by Megatron's rule.

    Args:
        weight_D: normalised weights.
        drawn_D: samples drawn from each dataset; infinitely many from one without weight.
        n_samples: samples drawn from all of them.
    """
    best, most = 0, -np.inf
    for d in range(weight_D.size):
        behind = weight_D[d] * n_samples - drawn_D[d]
        # Without a branch: a processor cannot guess which dataset comes next.
        best = d if behind > most else best
        most = max(behind, most)
    return best


@_compiled
def _due_first(queue: Integers, early: Floats, now: float) -> int:
    """Return the place in the queue of the first released source; place 0 if none is released."""
    for i in range(queue.size):
        if early[queue[i]] <= now:
            return i
    return 0


@_compiled
def _move_back(queue: Integers, i: int, late: Floats) -> None:
    """Move the source at place i to where it belongs now that its next draw is due later.

    The queue is sorted by due time, ties by the sources' numbers.
    """
    moved = queue[i]
    while i + 1 < queue.size:
        other = queue[i + 1]
        if late[other] > late[moved] or (late[other] == late[moved] and other > moved):
            break
        queue[i] = other
        i += 1
    queue[i] = moved
