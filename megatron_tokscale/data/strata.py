"""Which samples each stratum of a plan holds, and in which order they are drawn.

Shapes: D datasets, Z strata, N samples of a dataset.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from megatron_tokscale.core.arrays import Integers, Integers32
from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.data.array_files import is_right, map_array, write_array
from megatron_tokscale.data.permutation import epoch_permutation, stratum_key
from megatron_tokscale.data.plan import ORDER_VERSION, Plan
from megatron_tokscale.data.samples import SampleScores

# What a limit on epochs may be exceeded by: half a sample of rounding, twice.
_ROUNDING = 1.0


class Strata:
    """The samples of each stratum, epoch by epoch in an order of their own.

    Draw j of a stratum of n samples is in epoch e = j // n: position j % n of the permutation of
    range(n) keyed by (seed, stratum, e). Every sample of a stratum is seen once before any is seen
    again, also across stages.

    Args:
        plan: the plan; its stages do not matter here.
        sizes_D: samples of each dataset in one epoch.
        ranked_D: the samples of each dataset, stratum by stratum; None for one that has a single
            stratum, which is in the order of the dataset.
        files: where these are mapped from. Mapped strata are pickled as their paths, so that
            spawned data loader workers map them too.
    """

    def __init__(
        self,
        plan: Plan,
        sizes_D: Sequence[int],
        ranked_D: Sequence[Integers32 | None],
        files: Sequence[Path | None] | None = None,
    ) -> None:
        self.plan, self.sizes_D = plan, tuple(sizes_D)
        self.ranked_D, self.files = tuple(ranked_D), files
        self.size_Z = plan.sizes_Z(self.sizes_D)
        first_Z = np.cumsum(self.size_Z) - self.size_Z
        first_Z -= first_Z[[plan.strata_of(int(d)).start for d in plan.dataset_Z]]
        keys = [stratum_key(plan.seed, stratum.name) for stratum in plan.strata]
        self._rows = list(
            zip(plan.dataset_Z.tolist(), first_Z.tolist(), self.size_Z.tolist(), keys, strict=True)
        )

    def __reduce__(self) -> tuple[Any, ...]:
        if self.files is not None:
            return map_strata, (self.plan, self.sizes_D, self.files)
        return Strata, (self.plan, self.sizes_D, self.ranked_D)

    def locate(self, stratum: int, draw: int) -> tuple[int, int, int]:
        """(dataset, epoch, number of the sample in its dataset) of a draw of a stratum."""
        dataset, first, size, key = self._rows[stratum]
        epoch, position = divmod(draw, size)
        number = first + epoch_permutation(size, key, epoch).image(position)
        ranked = self.ranked_D[dataset]
        return dataset, epoch, number if ranked is None else ranked.item(number)

    def locate_many(self, stratum: int, draw_N: Integers) -> tuple[Integers, Integers]:
        """Epochs and numbers of the samples of draws of a stratum: `locate` of each, vectorised."""
        dataset, first, size, key = self._rows[stratum]
        epoch_N, position_N = np.divmod(draw_N, size)
        number_N = np.empty_like(position_N)
        for epoch in np.unique(epoch_N).tolist():
            in_epoch = epoch_N == epoch
            number_N[in_epoch] = epoch_permutation(size, key, epoch).many(position_N[in_epoch])
        ranked = self.ranked_D[dataset]
        number_N += first
        return epoch_N, number_N if ranked is None else ranked[number_N].astype(np.int64)

    def numbers(self, stratum: int) -> NDArray[np.integer]:
        """The numbers, in their dataset, of the samples of a stratum."""
        dataset, first, size, _ = self._rows[stratum]
        ranked = self.ranked_D[dataset]
        return np.arange(first, first + size) if ranked is None else ranked[first : first + size]

    def check(self, plan: Plan, n_samples: int, consumed: int = 0) -> None:
        """Refuse a plan that is to draw from nothing, or too often.

        Args:
            n_samples: how many samples are drawn in all.
            consumed: how many of them are drawn already, be it from what is no longer there.

        Raises:
            TokscaleError: among the first `n_samples`, naming the stratum.
        """
        draws_Z = plan.target_Z(n_samples)
        draws_Z[draws_Z == plan.target_Z(min(consumed, n_samples))] = 0.0
        empty_Z = (draws_Z > 0) & (self.size_Z == 0)
        if empty_Z.any():
            raise TokscaleError(
                f"stratum {plan.strata[int(np.argmax(empty_Z))].name!r} of the plan has no "
                "training samples; give it weight 0 or check --split"
            )
        if plan.max_epochs is None:
            return
        surplus_Z = draws_Z - plan.max_epochs * self.size_Z
        too_often_Z = surplus_Z > _ROUNDING
        if too_often_Z.any():
            epochs_Z = draws_Z / np.maximum(self.size_Z, 1)
            worst = int(np.argmax(np.where(too_often_Z, epochs_Z, -np.inf)))
            raise TokscaleError(
                f"stratum {plan.strata[worst].name!r} of the plan would be gone through "
                f"{epochs_Z[worst]:.3g} times in {n_samples} samples, its "
                f"limit is {plan.max_epochs:g}; lower its weight or make a plan with a higher limit"
            )


def rank_samples(plan: Plan, dataset: int, size: int, scores: SampleScores) -> Integers32:
    """Lay the samples of a dataset into its strata, one after the other."""
    cut = plan.cuts[dataset]
    assert cut is not None
    strata = plan.strata_of(dataset)
    bounds = np.rint(plan.bounds_of(dataset) * size).astype(np.int64)
    n_unlearned = int(bounds[-1] - bounds[-2]) if cut.unlearned and len(strata) > 1 else 0
    return scores.ranked(cut, n_unlearned).astype(np.int32)


def load_or_build_strata(
    plan: Plan,
    sizes_D: Sequence[int],
    data_keys: Sequence[str],
    scores_of: Callable[[int], SampleScores],
    cache_dir: Path,
    *,
    build: bool,
) -> Strata:
    """Map the strata from `cache_dir`; with `build`, make first what is not there or damaged.

    Args:
        sizes_D: samples of each dataset in one epoch.
        data_keys: what tells one order of a dataset's samples from another, one for each.
        scores_of: scores of the samples of a dataset, by its number in the plan; only asked of
            those that are cut, and only to build.
        cache_dir: where the files are.
        build: set on one rank; the others call without, when it is done.

    Raises:
        TokscaleError: not there and not to be built, or damaged.
        OSError: the directory cannot be written.
    """
    files: list[Path | None] = []
    for dataset, (cut, size, data_key) in enumerate(
        zip(plan.cuts, sizes_D, data_keys, strict=True)
    ):
        if cut is None or not size:
            files.append(None)
            continue
        content = [ORDER_VERSION, asdict(cut), plan.bounds_of(dataset).tolist()]
        key = hashlib.sha256(json.dumps([*content, size, data_key]).encode()).hexdigest()[:16]
        file = cache_dir / f"tokscale-{key}-ranked.npy"
        if build and not is_right(file):
            write_array(file, rank_samples(plan, dataset, size, scores_of(dataset)))
        files.append(file)
    return map_strata(plan, sizes_D, files)


def map_strata(plan: Plan, sizes_D: Sequence[int], files: Sequence[Path | None]) -> Strata:
    """Map the strata from the files of each dataset; None for one that is not cut.

    Raises:
        TokscaleError: a file is not there, or damaged.
    """
    ranked_D = [
        None if file is None else cast(Integers32, map_array(file, (size,), np.int32))
        for file, size in zip(files, sizes_D, strict=True)
    ]
    return Strata(plan, sizes_D, ranked_D, files)
