"""The samples that each stratum of a plan holds in a job, and the order in which they are drawn.

Shapes: J packings, Z strata, N samples of a packing.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Final, cast

import numpy as np
from numpy.typing import NDArray

from megatron_tokscale.core.arrays import Floats, Integers, Integers32
from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.data.array_files import blocks, is_right, map_array, write_array
from megatron_tokscale.data.permutation import epoch_permutation, stratum_key
from megatron_tokscale.data.plan import ORDER_VERSION, Plan
from megatron_tokscale.data.samples import SampleScores
from megatron_tokscale.data.skips import AllDraws, Draws, SkippedDraws

_ROUNDING: Final = 1.0
"""Samples by which a limit on epochs may be exceeded: two roundings of half a sample each."""


class Strata:
    """The samples of each stratum, in another order in every epoch.

    Draw j of a stratum of n samples is in epoch e = j // n: position j % n of the permutation of
    range(n) keyed by (seed, stratum, e). Every sample of a stratum is seen once before any is seen
    again, also across stages. Where the plan leaves samples out, draw j is first mapped to another
    draw (`data/skips.py`).

    Args:
        plan: the plan; its stages are not used.
        sizes_J: samples of each packing in one epoch.
        ranked_J: the samples of each packing, stratum by stratum; None for one that has a single
            stratum, which is in the order of the packing.
        files: paths that the ranked samples are mapped from. Mapped strata are pickled as their
            paths, so that spawned data loader workers map them too.
    """

    def __init__(
        self,
        plan: Plan,
        sizes_J: Sequence[int],
        ranked_J: Sequence[Integers32 | None],
        files: Sequence[Path | None] | None = None,
    ) -> None:
        self.plan, self.sizes_J = plan, tuple(sizes_J)
        self.ranked_J, self.files = tuple(ranked_J), files
        self.size_Z = plan.packed_sizes_Z(self.sizes_J)
        before_Z = np.cumsum(self.size_Z) - self.size_Z
        self._skipping: dict[int, Draws] = {}
        self._rows = [
            (
                j,
                int(before_Z[z] - before_Z[packing.strata.start]),
                int(self.size_Z[z]),
                stratum_key(plan.seed, plan.strata[z].name),
            )
            for j, packing in enumerate(plan.packings)
            for z in packing.strata
        ]

    def __reduce__(self) -> tuple[object, ...]:
        if self.files is not None:
            return map_strata, (self.plan, self.sizes_J, self.files)
        return Strata, (self.plan, self.sizes_J, self.ranked_J)

    def locate(self, stratum: int, draw: int) -> tuple[int, int, int]:
        """Return packing and epoch of a stratum's draw, and its sample's number in the packing."""
        packing, first, size, key = self._rows[stratum]
        if self.plan.skips:
            draw = self.drawn(stratum).draw(draw)
        epoch, position = divmod(draw, size)
        number = first + epoch_permutation(size, key, epoch).image(position)
        ranked = self.ranked_J[packing]
        return packing, epoch, number if ranked is None else ranked.item(number)

    def locate_many(self, stratum: int, draw_N: Integers) -> tuple[Integers, Integers]:
        """Return epochs and sample numbers of a stratum's draws: `locate` of each, vectorised."""
        packing, first, size, key = self._rows[stratum]
        if self.plan.skips:
            draw_N = self.drawn(stratum).draws(draw_N)
        epoch_N, position_N = np.divmod(draw_N, size)
        number_N = np.empty_like(position_N)
        for epoch in np.unique(epoch_N).tolist():
            in_epoch = epoch_N == epoch
            number_N[in_epoch] = epoch_permutation(size, key, epoch).many(position_N[in_epoch])
        ranked = self.ranked_J[packing]
        number_N += first
        return epoch_N, number_N if ranked is None else ranked[number_N].astype(np.int64)

    def drawn(self, stratum: int) -> Draws:
        """Return the map of a stratum's draws to those without the samples that are left out.

        Raises:
            TokscaleError: the stratum does not hold the samples, or holds no others.
        """
        if stratum not in self._skipping:
            self._skipping[stratum] = self._skipped(stratum)
        return self._skipping[stratum]

    def make_skips(self) -> None:
        """Make the maps of all strata of which the plan leaves samples out.

        Raises:
            TokscaleError: as `drawn`.
        """
        names = {skip.stratum for skip in self.plan.skips}
        for z, stratum in enumerate(self.plan.strata):
            if stratum.name in names:
                self.drawn(z)

    def _skipped(self, stratum: int) -> Draws:
        _, _, size, key = self._rows[stratum]
        name, left_out = self.plan.strata[stratum].name, set[int]()
        draws: Draws = AllDraws()
        for skip in self.plan.skips:
            if skip.stratum != name or not size:
                continue
            number_S = self._places(stratum, np.array(skip.samples))
            left_out.update(number_S.tolist())
            if len(number_S) < len(skip.samples) or len(left_out) == size:
                raise TokscaleError(
                    f"the plan leaves {len(skip.samples)} samples of stratum {name!r} out; "
                    f"expected some of its {size}, and not all; build the plan again"
                )
            draws = SkippedDraws(skip, number_S, size, key, draws)
        return draws

    def _places(self, stratum: int, sample_S: Integers) -> Integers:
        """Return the numbers in a stratum, from 0, of some samples of its packing, ascending."""
        packing, first, size, _ = self._rows[stratum]
        ranked = self.ranked_J[packing]
        if ranked is None:
            return sample_S[(sample_S >= first) & (sample_S < first + size)] - first
        found = [
            block.start - first + np.flatnonzero(np.isin(ranked[block], sample_S))
            for block in blocks(first, first + size)
        ]
        return np.concatenate(found)

    def numbers(self, stratum: int) -> NDArray[np.integer]:
        """Return a stratum's samples by their numbers in the packing."""
        packing, first, size, _ = self._rows[stratum]
        ranked = self.ranked_J[packing]
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
            raise _empty(plan, int(np.argmax(empty_Z)))
        if plan.max_epochs is None:
            return
        draws_Z = self._with_skips(plan, draws_Z)
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

    def _with_skips(self, plan: Plan, draws_Z: Floats) -> Floats:
        """Return the draws that repeat a whole stratum as often as it is without skipped samples.

        From the first draw of a skip on, an epoch is shorter by the samples that are left out.
        """
        if not plan.skips:
            return draws_Z
        number_of = {stratum.name: z for z, stratum in enumerate(plan.strata)}
        draws_Z = draws_Z.copy()
        for skip in plan.skips:
            z = number_of[skip.stratum]
            size, draws = self.size_Z[z], draws_Z[z]
            left = max(size - len(skip.samples), 1)
            draws_Z[z] += max(draws - skip.first, 0.0) * (size / left - 1)
        return draws_Z


def _empty(plan: Plan, z: int) -> TokscaleError:
    """Return the error on a stratum that has weight and no samples."""
    stratum = plan.strata[z]
    cut = plan.cuts[stratum.dataset]
    missing, remedy = "no training samples; expected some", "give it weight 0 or check --split"
    if cut is not None and cut.unit == "documents":
        missing = f"no {plan.seq_length} training tokens for a sample; expected enough"
        remedy = "make the plan with fewer quantiles, or give the stratum weight 0"
    return TokscaleError(
        f"stratum {stratum.name!r} of the plan has {missing}, as it has weight; {remedy}"
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
    sizes_J: Sequence[int],
    data_keys: Sequence[str],
    scores_of: Callable[[int], SampleScores],
    cache_dir: Path,
    *,
    build: bool,
) -> Strata:
    """Map the strata from `cache_dir`; with `build`, make missing or damaged files first.

    Args:
        plan: the plan.
        sizes_J: samples of each packing in one epoch.
        data_keys: for each packing a key of the order of its samples.
        scores_of: returns the scores of the samples of a packing, by its number in the plan; called
            only for packings that are cut into strata, and only when files are built.
        cache_dir: folder of the files.
        build: set on one rank; the others call without it afterwards.

    Raises:
        TokscaleError: a file is missing or damaged, and `build` is not set.
        OSError: the directory cannot be written.
    """
    files: list[Path | None] = []
    for number, (packing, size, data_key) in enumerate(
        zip(plan.packings, sizes_J, data_keys, strict=True)
    ):
        dataset, cut = packing.dataset, plan.cuts[packing.dataset]
        if cut is None or packing.is_stratum or not size:
            files.append(None)
            continue
        content = [ORDER_VERSION, asdict(cut), plan.bounds_of(dataset).tolist()]
        key = hashlib.sha256(json.dumps([*content, size, data_key]).encode()).hexdigest()[:16]
        file = cache_dir / f"tokscale-{key}-ranked.npy"
        if build and not is_right(file):
            write_array(file, rank_samples(plan, dataset, size, scores_of(number)))
        files.append(file)
    return map_strata(plan, sizes_J, files)


def map_strata(plan: Plan, sizes_J: Sequence[int], files: Sequence[Path | None]) -> Strata:
    """Map the strata from the files of each packing; None for one that is not cut into strata.

    Raises:
        TokscaleError: a file is missing or damaged.
    """
    ranked_J = [
        None if file is None else cast(Integers32, map_array(file, (size,), np.int32))
        for file, size in zip(files, sizes_J, strict=True)
    ]
    return Strata(plan, sizes_J, ranked_J, files)
