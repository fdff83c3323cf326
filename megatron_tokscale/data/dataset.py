"""The dataset that follows a plan: sample k is a function of the plan and k, and of nothing else.

So sample k is the same for every rank, data-parallel size, number of workers and restart, and a
checkpoint needs no state of the dataset.
"""

from collections.abc import Mapping, Sequence
from typing import Protocol

from torch.utils.data import Dataset

from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.data.index import PlanIndex
from megatron_tokscale.data.permutation import epoch_permutation
from megatron_tokscale.data.plan import Plan
from megatron_tokscale.data.strata import Strata


class MapDataset(Protocol):
    """A dataset with a length and items by number, such as Megatron's GPTDataset."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Mapping[str, object]: ...


class PlannedDataset(Dataset[dict[str, object]]):
    """Samples of several datasets in the order of a plan.

    Args:
        plan: the plan.
        datasets: the dataset of each of the plan's packings, built at one epoch; None for one that
            is not drawn from.
        index: the plan's index.
        strata: the samples of each stratum; None takes every packing for one stratum.
        offset: number in the plan of sample 0 of the dataset.
        consumed: samples of the plan that are drawn already.
        split: the split, which Megatron's samplers read to tell training from validation.
        index_split: the split under the name that Megatron's single datasets give it.

    Raises:
        TokscaleError: the index draws from a stratum that has no samples, or too often.
    """

    def __init__(
        self,
        plan: Plan,
        datasets: Sequence[MapDataset | None],
        index: PlanIndex,
        strata: Strata | None = None,
        *,
        offset: int = 0,
        consumed: int = 0,
        split: object = None,
        index_split: object = None,
    ) -> None:
        if len(datasets) != len(plan.packings):
            raise TokscaleError(
                f"the plan is for {len(plan.packings)} datasets, the job has {len(datasets)}; "
                "expected the same; make a plan for this job's data"
            )
        sizes_J = [0 if dataset is None else len(dataset) for dataset in datasets]
        self.plan = plan
        self.datasets = list(datasets)
        self.index = index
        self.strata = strata or Strata(plan, sizes_J, [None] * len(datasets))
        self.offset = offset
        self.split = split
        self.index_split = index_split
        self.strata.check(plan, len(index), consumed)
        # Compiled and made here, before loader workers are forked.
        epoch_permutation(1, 0, 0).image(0)
        self.strata.make_skips()

    def __len__(self) -> int:
        return len(self.index) - self.offset

    def locate(self, k: int) -> tuple[int, int, int]:
        """Return the stratum and the epoch of sample k, and its number in its packing.

        Raises:
            IndexError: k is not in range(len(self)).
        """
        stratum, draw = self._draw(k)
        return stratum, *self.strata.locate(stratum, draw)[1:]

    def _draw(self, k: int) -> tuple[int, int]:
        """Return the stratum of sample k, and the number of its draw from it."""
        index = self.index
        at = k + self.offset
        if not self.offset <= at < index.stratum_N.size:
            raise IndexError(f"sample {at} is not in the plan; its index has {len(index)} samples")
        return index.stratum_N.item(at), index.draw_N.item(at)

    def __getitem__(self, k: int) -> dict[str, object]:
        """Return sample k and its dataset's number in the plan, as BlendedDataset does."""
        stratum, draw = self._draw(k)
        packing, _, number = self.strata.locate(stratum, draw)
        dataset = self.datasets[packing]
        assert dataset is not None, "Strata.check refuses to draw from a missing dataset"
        return {"dataset_id": self.plan.dataset_Z[stratum], **dataset[number]}
