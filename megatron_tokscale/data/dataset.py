"""The dataset that follows a plan: sample k is a function of the plan and k, and of nothing else.

So it is the same for every rank, data-parallel size, number of workers and restart, and there is
nothing to save in a checkpoint.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch.utils.data import Dataset

from megatron_tokscale.data.index import Index
from megatron_tokscale.data.permutation import epoch_permutation, stratum_key
from megatron_tokscale.data.plan import Plan
from megatron_tokscale.errors import TokscaleError


class MapDataset(Protocol):
    """Anything with a length and items by number, such as Megatron's GPTDataset."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Mapping[str, Any]: ...


class PlannedDataset(Dataset[dict[str, Any]]):
    """Samples of several datasets in the order of a plan.

    Draw j of a stratum of n samples is in epoch e = j // n: position j % n of the permutation of
    range(n) keyed by (seed, stratum, e). Every sample of a stratum is seen once before any is seen
    again, also across stages.

    Args:
        plan: the plan.
        datasets: the plan's datasets, in the plan's order, each built at one epoch.
        index: the plan's index; its length is the dataset's.
        split: Megatron's samplers read it to tell training from validation.
        index_split: the same, as Megatron's single datasets name it.

    Raises:
        TokscaleError: a stratum that the index draws from has no samples.
    """

    def __init__(
        self,
        plan: Plan,
        datasets: Sequence[MapDataset],
        index: Index,
        *,
        split: object = None,
        index_split: object = None,
    ) -> None:
        if len(datasets) != len(plan.datasets):
            raise TokscaleError(
                f"the plan is for {len(plan.datasets)} datasets, the job has {len(datasets)}"
            )
        self.plan = plan
        self.datasets = list(datasets)
        self.index = index
        self.split = split
        self.index_split = index_split
        self.stratum_sizes = [len(self.datasets[stratum.dataset]) for stratum in plan.strata]
        self._keys = [stratum_key(plan.seed, stratum.name) for stratum in plan.strata]
        for z in (plan.target_Z(len(index)) > 0).nonzero()[0]:
            if not self.stratum_sizes[z]:
                raise TokscaleError(
                    f"stratum {plan.strata[z].name!r} of the plan has no training samples; "
                    "give it weight 0 or check --split"
                )

    def __len__(self) -> int:
        return len(self.index)

    def locate(self, k: int) -> tuple[int, int, int]:
        """(stratum, epoch, number of the sample in its dataset) of sample k.

        Raises:
            IndexError: k is not in range(len(self)).
        """
        if not 0 <= k < len(self.index):
            raise IndexError(f"sample {k} of a plan built for {len(self.index)} samples")
        stratum = int(self.index.stratum_N[k])
        size = self.stratum_sizes[stratum]
        epoch, position = divmod(int(self.index.draw_N[k]), size)
        return stratum, epoch, epoch_permutation(size, self._keys[stratum], epoch)(position)

    def __getitem__(self, k: int) -> dict[str, Any]:
        """Sample k with its dataset's number in the plan, as Megatron's BlendedDataset gives it."""
        stratum, _, number = self.locate(k)
        dataset_id = self.plan.dataset_Z[stratum]
        return {"dataset_id": dataset_id, **self.datasets[dataset_id][number]}
