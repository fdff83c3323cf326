"""The index: for every training sample its stratum, and which draw of that stratum it is.

A function of the plan and the number of samples alone, and the first k entries do not depend on
how many follow. Shapes: N samples, Z strata.

Inside a segment of constant weights the order is Megatron's own (`build_blending_indices` in
core/datasets/helpers.cpp): the sample goes to the stratum that is furthest behind its share. The
draws are counted through all segments, so a change of weights neither skips nor repeats any.
Megatron's rule starts each segment with a clean slate; what rounding left undone is settled first:
a stratum that is behind the plan by a whole sample or more is served at the start of the next
segment (our choice), or a small stratum would starve in a plan of many short stages.
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
    blend = blend or blend_reference
    stratum_N = np.empty(n_samples, dtype=np.int16)
    draw_N = np.empty(n_samples, dtype=np.int64)
    drawn_Z = np.zeros(plan.n_strata, dtype=np.int64)
    for start, stop, weights_Z in plan.intervals(n_samples):
        # Megatron's rule breaks ties by position and would draw from a stratum of weight zero.
        present = np.flatnonzero(weights_Z).astype(np.int16)
        late = _whole_samples_behind(plan.target_Z(start) - drawn_Z, present)[: stop - start]
        for k, stratum in enumerate(late, start):
            stratum_N[k], draw_N[k] = stratum, drawn_Z[stratum]
            drawn_Z[stratum] += 1
        rest = slice(start + len(late), stop)
        blend(
            stratum_N[rest],
            draw_N[rest],
            weights_Z[present],
            len(present),
            rest.stop - rest.start,
            False,
        )
        drawn_Z += _carry_on(stratum_N[rest], draw_N[rest], present, drawn_Z)
    return Index(stratum_N, draw_N)


def _whole_samples_behind(
    behind_Z: NDArray[np.float64], present: NDArray[np.int16]
) -> NDArray[np.int16]:
    """Strata to serve first, the furthest behind first, each as often as it is behind."""
    order = present[np.argsort(-behind_Z[present], kind="stable")]
    return np.repeat(order, np.maximum(np.floor(behind_Z[order]), 0).astype(np.int64))


def _carry_on(
    stratum_N: NDArray[np.int16],
    draw_N: NDArray[np.int64],
    present: NDArray[np.int16],
    drawn_Z: NDArray[np.int64],
) -> NDArray[np.int64]:
    """Turn a segment counted from zero into the plan's strata and draws, in place; count them."""
    count_Z = np.zeros_like(drawn_Z)
    for block in _blocks(len(stratum_N)):
        stratum_N[block] = present[stratum_N[block]]
        draw_N[block] += drawn_Z[stratum_N[block]]
        count_Z += np.bincount(stratum_N[block], minlength=len(drawn_Z))
    return count_Z


def _blocks(length: int) -> Iterator[slice]:
    """Slices that keep the temporary arrays of a large index small."""
    for start in range(0, length, _BLOCK):
        yield slice(start, min(start + _BLOCK, length))


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
        except (OSError, ValueError) as error:
            raise TokscaleError(f"index file {file} is damaged ({error}); remove it") from error
        if array.shape != (n_samples,) or array.dtype != dtype:
            raise TokscaleError(f"index file {file} is not what its name says; remove it")
        # A plain view: indexing a memmap runs Python code for every element.
        arrays.append(array.view(np.ndarray))
    return Index(arrays[0], arrays[1], files)
