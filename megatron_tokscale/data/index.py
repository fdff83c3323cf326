"""The index of a plan: the stratum of each training sample, and its draw number there.

It is a function of the plan and the number of samples alone; the first k entries depend neither on
how many follow nor on stages that start later. `data/draws.py` has the rules.

Shapes: N samples, D datasets, Z strata.
"""

import mmap
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import cast

import numpy as np
from numpy.typing import NDArray

from megatron_tokscale.core.arrays import Floats, Integers
from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.core.files import is_there
from megatron_tokscale.data.array_files import blocks, check_array, is_right, map_array, write_array
from megatron_tokscale.data.plan import Plan
from megatron_tokscale.data.plan_parts import Segment


@dataclass(frozen=True, eq=False)
class PlanIndex:
    """Stratum and draw of each sample: sample k is draw `draw_N[k]` of stratum `stratum_N[k]`.

    Attributes:
        stratum_N: int16.
        draw_N: int64, counted from 0 in each stratum.
        files: paths that the two arrays are mapped from; None if they are in memory. A mapped index
            is pickled as its paths, so that spawned data loader workers map it too.
        is_shared: whether the arrays are in memory that forked processes share.
    """

    stratum_N: NDArray[np.int16]
    draw_N: Integers
    files: tuple[Path, Path] | None = None
    is_shared: bool = False

    def __len__(self) -> int:
        return len(self.stratum_N)

    def shared(self) -> "PlanIndex":
        """Return a writable copy in memory that processes forked later share.

        It takes 10 bytes a sample.
        """
        stratum_N, draw_N = _shared_like(self.stratum_N), _shared_like(self.draw_N)
        stratum_N[:], draw_N[:] = self.stratum_N, self.draw_N
        return PlanIndex(stratum_N, draw_N, is_shared=True)

    def __reduce__(self) -> tuple[object, ...]:
        if self.is_shared:
            raise TokscaleError(
                "a data loader worker is spawned, but the plan may change while the job trains; "
                "expected workers that are forked; use --num-workers 0 or drop "
                "--tokscale-replan-interval"
            )
        if self.files is not None:
            return _map_index, (self.files, len(self))
        return PlanIndex, (self.stratum_N, self.draw_N)


def _shared_like[Number: (np.int16, np.int64)](array: NDArray[Number]) -> NDArray[Number]:
    memory = mmap.mmap(-1, max(array.nbytes, 1))
    return np.frombuffer(memory, array.dtype, array.size)


@dataclass(frozen=True, eq=False)
class RealisedShares:
    """The samples that a plan has drawn so far, beside those due by its weights.

    Attributes:
        plan: the plan.
        n_samples: consumed samples.
        count_Z: samples drawn from each stratum.
        size_Z: samples of each stratum in one epoch.
    """

    plan: Plan
    n_samples: int
    count_Z: Integers
    size_Z: Integers

    @property
    def share_Z(self) -> Floats:
        """Realised share of each stratum; zero before the first sample."""
        return self.count_Z / max(self.n_samples, 1)

    @cached_property
    def target_Z(self) -> Floats:
        """Samples due from each stratum by the plan's weights; not whole."""
        return self.plan.target_Z(self.n_samples)

    @property
    def target_share_Z(self) -> Floats:
        """The plan's share of each stratum so far; zero before the first sample."""
        return self.target_Z / max(self.n_samples, 1)

    @property
    def epochs_Z(self) -> Floats:
        """Epochs of each stratum that are drawn."""
        return self.count_Z / np.maximum(self.size_Z, 1)

    def by_dataset(self, value_Z: Floats) -> Floats:
        """Return the sums over the strata of each dataset."""
        n_datasets = len(self.plan.datasets)
        return np.bincount(self.plan.dataset_Z, value_Z, minlength=n_datasets)


def build_index(plan: Plan, n_samples: int) -> PlanIndex:
    """Return the index of the first `n_samples` samples of a plan."""
    index = PlanIndex(np.empty(n_samples, dtype=np.int16), np.empty(n_samples, dtype=np.int64))
    extend_index(plan, index, 0)
    return index


def extend_index(plan: Plan, index: PlanIndex, start: int) -> None:
    """Compute the index anew from sample `start` on, at which a stage begins; earlier entries stay.

    It needs no memory beside the index.
    """
    counts = _DrawCounts(plan)
    for begin, stop, segment in plan.intervals(len(index)):
        if stop <= start:
            counts.take(index.stratum_N[begin:stop])
        else:
            counts.draw(index, segment, stop)
        counts.end(segment, stop - begin)


class _DrawCounts:
    """Counts of the draws made and of the draws due before a segment."""

    def __init__(self, plan: Plan) -> None:
        n_datasets = len(plan.datasets)
        self.plan = plan
        self.first_D = np.searchsorted(plan.dataset_Z, np.arange(n_datasets + 1))
        self.is_unchanged = True  # all segments so far have the first one's weights of datasets
        self.drawn_D, self.target_D = np.zeros(n_datasets, np.int64), np.zeros(n_datasets)
        self.drawn_Z, self.target_Z = np.zeros(plan.n_strata, np.int64), np.zeros(plan.n_strata)
        self._before_D = self.drawn_D.copy()

    def take(self, stratum_N: NDArray[np.int16]) -> None:
        """Count draws that the index holds already."""
        count_Z = count_strata(stratum_N, self.plan.n_strata)
        self.drawn_Z += count_Z
        np.add.at(self.drawn_D, self.plan.dataset_Z, count_Z)

    def draw(self, index: PlanIndex, segment: Segment, stop: int) -> None:
        """Fill the index from the segment's start to `stop`."""
        # Compiled code takes half a second to load, and a job that maps an index needs none.
        from megatron_tokscale.data.draws import Sources, draw

        self.is_unchanged &= segment.weights == self.plan.segments[0].weights
        draw(
            index.stratum_N[segment.start : stop],
            index.draw_N[segment.start : stop],
            segment.start,
            self.is_unchanged,
            Sources(np.array(segment.weights), self.target_D, self.drawn_D),
            Sources(np.array(segment.within), self.target_Z, self.drawn_Z),
            self.first_D,
        )

    def end(self, segment: Segment, n_samples: int) -> None:
        """Add the draws that are due by a segment's weights."""
        self.is_unchanged &= segment.weights == self.plan.segments[0].weights
        self.target_D += np.array(segment.weights) * n_samples
        drawn_D = self.drawn_D - self._before_D
        self.target_Z += np.array(segment.within) * drawn_D[self.plan.dataset_Z]
        self._before_D = self.drawn_D.copy()


def count_strata(stratum_N: NDArray[np.int16], n_strata: int) -> Integers:
    """Return the number of samples of each stratum."""
    count_Z = np.zeros(n_strata, dtype=np.int64)
    for block in blocks(0, len(stratum_N)):
        count_Z += np.bincount(stratum_N[block], minlength=n_strata)
    return count_Z


def load_or_build_index(plan: Plan, n_samples: int, cache_dir: Path, *, build: bool) -> PlanIndex:
    """Map the index from `cache_dir`; with `build`, make it first if it is missing or damaged.

    In a job one rank calls with `build`, then all synchronise, then the others call without.

    Raises:
        TokscaleError: the index is missing or damaged, and `build` is not set.
        OSError: the directory cannot be written.
    """
    files = _index_files(plan, n_samples, cache_dir)
    if build and not all(map(is_right, files)):
        index = build_index(plan, n_samples)
        write_array(files[0], index.stratum_N)
        write_array(files[1], index.draw_N)
    return _map_index(files, n_samples)


def load_or_compute_index(plan: Plan, n_samples: int, cache_dir: Path) -> PlanIndex:
    """Map the index if it is in `cache_dir`, and else compute it in memory; nothing is written.

    Raises:
        TokscaleError: a file of it is damaged.
    """
    if not all(map(is_there, _index_files(plan, n_samples, cache_dir))):
        return build_index(plan, n_samples)
    return load_index(plan, n_samples, cache_dir)


def load_index(plan: Plan, n_samples: int, cache_dir: Path) -> PlanIndex:
    """Map the index from `cache_dir`, and check it.

    Raises:
        TokscaleError: a file of it is missing or damaged.
    """
    files = _index_files(plan, n_samples, cache_dir)
    index = _map_index(files, n_samples)
    for file in files:
        check_array(file)
    return index


def _index_files(plan: Plan, n_samples: int, cache_dir: Path) -> tuple[Path, Path]:
    stem = f"tokscale-{plan.fingerprint}-{n_samples}"
    return cache_dir / f"{stem}-stratum.npy", cache_dir / f"{stem}-draw.npy"


def _map_index(files: tuple[Path, Path], n_samples: int) -> PlanIndex:
    stratum_N, draw_N = (
        map_array(file, (n_samples,), dtype)
        for file, dtype in zip(files, (np.int16, np.int64), strict=True)
    )
    return PlanIndex(cast(NDArray[np.int16], stratum_N), cast(Integers, draw_N), files)
