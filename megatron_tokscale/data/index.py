"""The index: for every training sample its stratum, and which draw of that stratum it is.

A function of the plan and the number of samples alone; the first k entries depend neither on how
many follow nor on stages that start later. Shapes: N samples, Z strata, M candidate draws.

Until the weights first change, the order is Megatron's own (`build_blending_indices` in
core/datasets/helpers.cpp: each sample goes to the stratum furthest behind its share), so a plan
that changes nothing is the plain blend, sample for sample.

From then on the draws of each stratum are counted on, so none is skipped or repeated, and come in
the order in which they fall due: draw j of a stratum is due when the plan's cumulative target for
it passes j + 1/2 (stride scheduling: Waldspurger and Weihl, MIT/LCS/TM-528, 1995). That carries
over what rounding has left owing. Megatron's rule can only start anew: over 200 stages of 10
samples it draws a stratum of 1% ten times too often. It is also a sort, whose time does not grow
with the number of strata.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from megatron_tokscale.data.plan import Plan
from megatron_tokscale.errors import TokscaleError
from megatron_tokscale.files import whole_or_absent

# Fills (stratum_N, draw_N) given (weights_Z, Z, N, verbose): the signature of Megatron's helper.
type Blend = Callable[
    [NDArray[np.int16], NDArray[np.int64], NDArray[np.float64], int, int, bool], object
]

_BLOCK: Final = 1 << 22


@dataclass(frozen=True, eq=False)
class Index:
    """Sample k is draw `draw_N[k]` (from 0) of stratum `stratum_N[k]`.

    Attributes:
        stratum_N: int16.
        draw_N: int64.
        files: where the two arrays are mapped from; None if they are in memory. A mapped index is
            pickled as its paths, so that spawned data loader workers map it too.
    """

    stratum_N: NDArray[np.int16]
    draw_N: NDArray[np.int64]
    files: tuple[Path, Path] | None = None

    def __len__(self) -> int:
        return len(self.stratum_N)

    def __reduce__(self) -> tuple[Any, ...]:
        if self.files is not None:
            return _map_index, (self.files, len(self))
        return Index, (self.stratum_N, self.draw_N)


def blend_reference(
    stratum_N: NDArray[np.int16],
    draw_N: NDArray[np.int64],
    weights_Z: NDArray[np.float64],
    n_strata: int,
    n_samples: int,
    verbose: bool,
) -> None:
    """Megatron's greedy rule in plain numpy: slow, readable, equal to the compiled one."""
    drawn_Z = np.zeros(n_strata)
    for k in range(n_samples):
        stratum = int(np.argmax(weights_Z * max(k, 1) - drawn_Z))
        stratum_N[k] = stratum
        draw_N[k] = drawn_Z[stratum]
        drawn_Z[stratum] += 1


def build_index(plan: Plan, n_samples: int, blend: Blend | None = None) -> Index:
    """Compute the index of the first `n_samples` samples of a plan.

    Args:
        plan: the plan.
        n_samples: number of samples N.
        blend: Megatron's compiled `helpers_cpp.build_blending_indices`, which gives the same
            index some hundred times faster; without it `blend_reference`.
    """
    index = Index(np.empty(n_samples, dtype=np.int16), np.empty(n_samples, dtype=np.int64))
    drawn_Z = np.zeros(plan.n_strata, dtype=np.int64)
    for start, stop, weights_Z in plan.intervals(n_samples):
        if start == 0:
            _draw_as_megatron(index, stop, weights_Z, blend or blend_reference)
            drawn_Z += count_strata(index.stratum_N[:stop], plan.n_strata)
            continue
        for block in _blocks(start, stop):
            behind_Z = plan.target_Z(block.start) - drawn_Z
            stratum_N, draw_N = _draw_when_due(behind_Z, weights_Z, block.stop - block.start)
            index.stratum_N[block] = stratum_N
            index.draw_N[block] = drawn_Z[stratum_N] + draw_N
            drawn_Z += np.bincount(stratum_N, minlength=plan.n_strata)
    return index


def _draw_as_megatron(
    index: Index, stop: int, weights_Z: NDArray[np.float64], blend: Blend
) -> None:
    """Fill the index up to `stop`, before any change of weights."""
    # Megatron's rule breaks ties by position and would draw from a stratum of weight zero.
    present = np.flatnonzero(weights_Z).astype(np.int16)
    stratum_N, draw_N = index.stratum_N[:stop], index.draw_N[:stop]
    blend(stratum_N, draw_N, weights_Z[present], len(present), stop, False)
    for block in _blocks(0, stop):
        stratum_N[block] = present[stratum_N[block]]


def _draw_when_due(
    behind_Z: NDArray[np.float64], weights_Z: NDArray[np.float64], n_samples: int
) -> tuple[NDArray[np.int16], NDArray[np.int64]]:
    """The next `n_samples` draws in the order they fall due, ties in the order of the strata.

    Args:
        behind_Z: samples that each stratum is behind the plan's target; negative if ahead.
        weights_Z: weights that hold from here on, summing to one.
        n_samples: number of samples N.

    Returns:
        Stratum and draw of each sample, the draws counted from here.
    """
    present = np.flatnonzero(weights_Z).astype(np.int16)
    weight_Z, owed_Z = weights_Z[present], behind_Z[present] + 0.5
    # By this time at least N draws are due: each stratum has at least its target less one half.
    horizon = n_samples + 1 + len(present) - owed_Z.sum()
    candidates_Z = np.maximum(np.floor(weight_Z * horizon + owed_Z), 0).astype(np.int64)
    first_Z = np.cumsum(candidates_Z) - candidates_Z
    draw_M = np.arange(candidates_Z.sum()) - np.repeat(first_Z, candidates_Z)
    stratum_M = np.repeat(present, candidates_Z)
    due_M = (draw_M + 1 - np.repeat(owed_Z, candidates_Z)) / np.repeat(weight_Z, candidates_Z)
    order = np.argsort(due_M, kind="stable")[:n_samples]
    return stratum_M[order], draw_M[order]


def count_strata(stratum_N: NDArray[np.int16], n_strata: int) -> NDArray[np.int64]:
    """Number of samples of each stratum."""
    count_Z = np.zeros(n_strata, dtype=np.int64)
    for block in _blocks(0, len(stratum_N)):
        count_Z += np.bincount(stratum_N[block], minlength=n_strata)
    return count_Z


def _blocks(start: int, stop: int) -> Iterator[slice]:
    """Slices that keep the temporary arrays of a large index small."""
    for begin in range(start, stop, _BLOCK):
        yield slice(begin, min(begin + _BLOCK, stop))


def load_or_build_index(
    plan: Plan, n_samples: int, cache_dir: Path, blend: Blend | None = None, *, build: bool
) -> Index:
    """Map the index from `cache_dir`; if it is not there and `build` is set, make it first.

    In a job one rank calls with `build`, then all synchronise, then the others call without.

    Raises:
        TokscaleError: not there and not to be built, or damaged.
        OSError: the directory cannot be written.
    """
    stem = f"tokscale-{plan.fingerprint}-{n_samples}"
    files = (cache_dir / f"{stem}-stratum.npy", cache_dir / f"{stem}-draw.npy")
    if not all(file.is_file() for file in files):
        if not build:
            raise TokscaleError(
                f"the plan's index is not in {cache_dir}; is this directory shared by all nodes?"
            )
        index = build_index(plan, n_samples, blend)
        _write_array(files[0], index.stratum_N)
        _write_array(files[1], index.draw_N)
    return _map_index(files, n_samples)


def _write_array(file: Path, array: NDArray[np.generic]) -> None:
    with whole_or_absent(file) as temporary, temporary.open("wb") as stream:
        np.save(stream, array)


def _map_index(files: tuple[Path, Path], n_samples: int) -> Index:
    arrays = []
    for file, dtype in zip(files, (np.int16, np.int64), strict=True):
        try:
            array = np.load(file, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise TokscaleError(f"index file {file} is damaged ({error}); remove it") from error
        if array.shape != (n_samples,) or array.dtype != dtype:
            raise TokscaleError(f"index file {file} is not what its name says; remove it")
        # A plain view: indexing a memmap runs Python code for every element.
        arrays.append(array.view(np.ndarray))
    return Index(arrays[0], arrays[1], files)
