"""The dataset that follows a plan: sample k is a function of the plan and k, and of nothing else.

So it is the same for every rank, data-parallel size, number of workers and restart, and there is
nothing to save in a checkpoint.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch.utils.data import Dataset

from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.data.index import Index
from megatron_tokscale.data.permutation import epoch_permutation
from megatron_tokscale.data.plan import Plan
from megatron_tokscale.data.strata import Strata


class MapDataset(Protocol):
    """Anything with a length and items by number, such as Megatron's GPTDataset."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Mapping[str, Any]: ...


class PlannedDataset(Dataset[dict[str, Any]]):
    """Samples of several datasets in the order of a plan.

    Args:
        datasets: the plan's datasets, in the plan's order, each built at one epoch; None for one
            that is not drawn from.
        index: the plan's index.
        strata: the samples of each stratum; without it every dataset is one stratum.
        offset: sample k of the dataset is sample `offset` + k of the plan.
        consumed: samples of the plan that are not drawn any more.
        split: Megatron's samplers read it to tell training from validation.
        index_split: the same, as Megatron's single datasets name it.

    Raises:
        TokscaleError: the index draws from a stratum that has no samples, or too often.
    """

    def __init__(
        self,
        plan: Plan,
        datasets: Sequence[MapDataset | None],
        index: Index,
        strata: Strata | None = None,
        *,
        offset: int = 0,
        consumed: int = 0,
        split: object = None,
        index_split: object = None,
    ) -> None:
        if len(datasets) != len(plan.datasets):
            raise TokscaleError(
                f"the plan is for {len(plan.datasets)} datasets, the job has {len(datasets)}"
            )
        sizes_D = [0 if dataset is None else len(dataset) for dataset in datasets]
        self.plan = plan
        self.datasets = list(datasets)
        self.index = index
        self.strata = strata or Strata(plan, sizes_D, [None] * len(datasets))
        self.offset = offset
        self.split = split
        self.index_split = index_split
        self.strata.check(plan, len(index), consumed)
        epoch_permutation(1, 0, 0).image(0)  # compiled here, before loader workers are forked

    def __len__(self) -> int:
        return len(self.index) - self.offset

    def locate(self, k: int) -> tuple[int, int, int]:
        """(stratum, epoch, number of the sample in its dataset) of sample k.

        Raises:
            IndexError: k is not in range(len(self)).
        """
        stratum, draw = self._draw(k)
        return stratum, *self.strata.locate(stratum, draw)[1:]

    def _draw(self, k: int) -> tuple[int, int]:
        """Stratum and draw of sample k."""
        index = self.index
        at = k + self.offset
        if not self.offset <= at < index.stratum_N.size:
            raise IndexError(f"sample {at} of a plan built for {len(index)} samples")
        return index.stratum_N.item(at), index.draw_N.item(at)

    def __getitem__(self, k: int) -> dict[str, Any]:
        """Sample k with its dataset's number in the plan, as Megatron's BlendedDataset gives it."""
        stratum, draw = self._draw(k)
        dataset_id, _, number = self.strata.locate(stratum, draw)
        dataset = self.datasets[dataset_id]
        assert dataset is not None, "Strata.check refuses to draw from what is not there"
        return {"dataset_id": self.plan.dataset_Z[stratum], **dataset[number]}
