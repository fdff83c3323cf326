"""The samples that each stratum of a plan holds in a job, and the order in which they are drawn.

Shapes: D datasets, Z strata, N samples of a dataset.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Final, cast

import numpy as np
from numpy.typing import NDArray

from megatron_tokscale.core.arrays import Integers, Integers32
from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.data.array_files import is_right, map_array, write_array
from megatron_tokscale.data.permutation import epoch_permutation, stratum_key
from megatron_tokscale.data.plan import ORDER_VERSION, Plan
from megatron_tokscale.data.samples import SampleScores

_ROUNDING: Final = 1.0
"""Samples by which a limit on epochs may be exceeded: two roundings of half a sample each."""


class Strata:
    """The samples of each stratum, in another order in every epoch.

    Draw j of a stratum of n samples is in epoch e = j // n: position j % n of the permutation of
    range(n) keyed by (seed, stratum, e). Every sample of a stratum is seen once before any is seen
    again, also across stages.

    Args:
        plan: the plan; its stages are not used.
        sizes_D: samples of each dataset in one epoch.
        ranked_D: the samples of each dataset, stratum by stratum; None for one that has a single
            stratum, which is in the order of the dataset.
        files: paths that the ranked samples are mapped from. Mapped strata are pickled as their
            paths, so that spawned data loader workers map them too.
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

    def __reduce__(self) -> tuple[object, ...]:
        if self.files is not None:
            return map_strata, (self.plan, self.sizes_D, self.files)
        return Strata, (self.plan, self.sizes_D, self.ranked_D)

    def locate(self, stratum: int, draw: int) -> tuple[int, int, int]:
        """Return dataset and epoch of a stratum's draw, and its sample's number in the dataset."""
        dataset, first, size, key = self._rows[stratum]
        epoch, position = divmod(draw, size)
        number = first + epoch_permutation(size, key, epoch).image(position)
        ranked = self.ranked_D[dataset]
        return dataset, epoch, number if ranked is None else ranked.item(number)

    def locate_many(self, stratum: int, draw_N: Integers) -> tuple[Integers, Integers]:
        """Return epochs and sample numbers of a stratum's draws: `locate` of each, vectorised."""
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
        """Return a stratum's samples by their numbers in the dataset."""
        dataset, first, size, _ = self._rows[stratum]
        ranked = self.ranked_D[dataset]
        return np.arange(first, first + size) if ranked is None else ranked[first : first + size]

    def check(self, plan: Plan, n_samples: int, consumed: int = 0) -> None:
        """Refuse a plan that draws from an empty stratum, or beyond its limit on epochs.

        Args:
            plan: the plan, with the stages to check.
            n_samples: number of samples that are drawn in all.
            consumed: number of them that are drawn already; a stratum that only these are drawn
                from may be empty by now.

        Raises:
            TokscaleError: naming the stratum.
        """
        draws_Z = plan.target_Z(n_samples)
        draws_Z[draws_Z == plan.target_Z(min(consumed, n_samples))] = 0.0
        empty_Z = (draws_Z > 0) & (self.size_Z == 0)
        if empty_Z.any():
            raise TokscaleError(
                f"stratum {plan.strata[int(np.argmax(empty_Z))].name!r} of the plan has no "
                "training samples; expected some, as it has weight; give it weight 0 or check "
                "--split"
            )
        if plan.max_epochs is None:
            return
        surplus_Z = draws_Z - plan.max_epochs * self.size_Z
        too_often_Z = surplus_Z > _ROUNDING
        if too_often_Z.any():
            epochs_Z = draws_Z / np.maximum(self.size_Z, 1)
            worst = int(np.argmax(np.where(too_often_Z, epochs_Z, -np.inf)))
            raise TokscaleError(
                f"stratum {plan.strata[worst].name!r} of the plan would be repeated for "
                f"{epochs_Z[worst]:.3g} epochs in {n_samples} samples; expected at most "
                f"{plan.max_epochs:g}; lower its weight or make a plan with a higher limit"
            )


def rank_samples(plan: Plan, dataset: int, size: int, scores: SampleScores) -> Integers32:
    """Return the samples of a dataset, stratum by stratum.

    Args:
        plan: the plan.
        dataset: number of the dataset in the plan, which cuts it.
        size: samples of the dataset in one epoch.
        scores: scores of these samples.
    """
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
    """Map the strata from `cache_dir`; with `build`, make missing or damaged files first.

    Args:
        plan: the plan.
        sizes_D: samples of each dataset in one epoch.
        data_keys: for each dataset a key of the order of its samples.
        scores_of: returns the scores of the samples of a dataset, by its number in the plan; called
            only for datasets that are cut, and only when files are built.
        cache_dir: folder of the files.
        build: set on one rank; the others call without it afterwards.

    Raises:
        TokscaleError: a file is missing or damaged, and `build` is not set.
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
        TokscaleError: a file is missing or damaged.
    """
    ranked_D = [
        None if file is None else cast(Integers32, map_array(file, (size,), np.int32))
        for file, size in zip(files, sizes_D, strict=True)
    ]
    return Strata(plan, sizes_D, ranked_D, files)
