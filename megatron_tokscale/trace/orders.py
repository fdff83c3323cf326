"""The orders in which a job draws its samples from its datasets: one dataset, a blend, a plan.

Sample i of an order is counted from the order's own first sample.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from megatron_tokscale.core.arrays import Integers
from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.data.array_files import blocks, check_array
from megatron_tokscale.data.history import followed_plan
from megatron_tokscale.data.index import load_or_compute_index
from megatron_tokscale.data.plan import Plan
from megatron_tokscale.data.record import BlendRecord, DataRecord, PlanRecord, UntracedRecord
from megatron_tokscale.data.strata import map_strata
from megatron_tokscale.trace.megatron_cache import map_cached


class SampleOrigin(NamedTuple):
    """The place that a sample comes from.

    Attributes:
        dataset: number of the dataset in the job's record; under a plan, of the packing.
        number: number of the sample in it.
        stratum: name of its stratum; None without a plan.
        epoch: epochs of the stratum before this one; None without a plan.
    """

    dataset: int
    number: int
    stratum: str | None = None
    epoch: int | None = None


class SampleOrder(Protocol):
    """An order in which samples are drawn from datasets."""

    def __len__(self) -> int: ...

    def origin(self, i: int) -> SampleOrigin:
        """Return the origin of sample i."""

    def find(self, dataset: int, numbers: Integers, start: int, stop: int) -> Integers:
        """Return the samples from `start` to `stop` that are any of `numbers` of a dataset.

        They ascend.
        """

    def numbers(self, dataset: int, start: int, stop: int) -> Integers:
        """Return the numbers in a dataset of those samples from `start` to `stop` that it gives."""

    def datasets(self, i_N: Integers) -> Integers:
        """Return the dataset of each of some samples, by its number in the job's record."""


class SingleOrder:
    """A single dataset in its own order."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def origin(self, i: int) -> SampleOrigin:
        """Return sample i of the dataset."""
        return SampleOrigin(0, i)

    def find(self, dataset: int, numbers: Integers, start: int, stop: int) -> Integers:
        """Return the samples from `start` to `stop` that are any of `numbers`."""
        return np.sort(numbers[(numbers >= start) & (numbers < stop)])

    def numbers(self, dataset: int, start: int, stop: int) -> Integers:
        """Return the samples from `start` to `stop` themselves."""
        return np.arange(start, stop)

    def datasets(self, i_N: Integers) -> Integers:
        """Return dataset 0 for every sample."""
        return np.zeros(len(i_N), np.int64)


class BlendOrder:
    """Megatron's BlendedDataset, by the index that it keeps in the job's data cache."""

    def __init__(self, record: BlendRecord) -> None:
        if record.dataset_index is None or record.dataset_sample_index is None:
            raise TokscaleError(
                "Megatron kept no index of this job's blend, as the job had no --data-cache-path; "
                "expected an index in a data cache; start the job with one to trace its samples"
            )
        self.dataset_N = map_cached(record.dataset_index)
        self.number_N = map_cached(record.dataset_sample_index)
        if not len(self.dataset_N) == len(self.number_N) == record.size:
            raise TokscaleError(
                f"{record.dataset_index} is not of the blend of {record.size} samples that the job "
                "read; restore it"
            )

    def __len__(self) -> int:
        return len(self.dataset_N)

    def origin(self, i: int) -> SampleOrigin:
        """Return the origin of sample i of the blend."""
        return SampleOrigin(int(self.dataset_N[i]), int(self.number_N[i]))

    def find(self, dataset: int, numbers: Integers, start: int, stop: int) -> Integers:
        """Return the samples from `start` to `stop` that are any of `numbers` of a dataset."""
        found = [np.empty(0, np.int64)]
        for block in blocks(start, stop):
            own = block.start + np.flatnonzero(self.dataset_N[block] == dataset)
            found.append(own[np.isin(self.number_N[own], numbers)])
        return np.concatenate(found)

    def numbers(self, dataset: int, start: int, stop: int) -> Integers:
        """Return the numbers of the samples of a dataset from `start` to `stop`."""
        found = [np.empty(0, np.int64)]
        for block in blocks(start, stop):
            found.append(self.number_N[block][self.dataset_N[block] == dataset].astype(np.int64))
        return np.concatenate(found)

    def datasets(self, i_N: Integers) -> Integers:
        """Return the dataset of each of some samples."""
        return np.asarray(self.dataset_N[i_N], np.int64)


class PlanOrder:
    """The dataset that follows a plan."""

    def __init__(self, plan: Plan, record: PlanRecord, sizes_J: Sequence[int]) -> None:
        self.plan = plan
        # The index of a plan that changed while the job trained is in no file.
        self.index = load_or_compute_index(plan, record.n_samples, Path(record.cache_dir))
        files = [None if file is None else Path(file) for file in record.strata]
        self.strata = map_strata(plan, sizes_J, files)
        for path in files:
            if path is not None:
                check_array(path)

    def __len__(self) -> int:
        return len(self.index)

    def origin(self, i: int) -> SampleOrigin:
        """Return the origin of sample i of the plan."""
        stratum = int(self.index.stratum_N[i])
        packing, epoch, number = self.strata.locate(stratum, int(self.index.draw_N[i]))
        return SampleOrigin(packing, number, self.plan.strata[stratum].name, epoch)

    def find(self, dataset: int, numbers: Integers, start: int, stop: int) -> Integers:
        """Return the samples from `start` to `stop` that are any of `numbers` of a dataset."""
        strata = [
            stratum
            for stratum in self.plan.packings[dataset].strata
            if np.isin(numbers, self.strata.numbers(stratum)).any()
        ]
        found = [np.empty(0, np.int64)]
        for block in blocks(start, stop):
            for stratum in strata:
                own = block.start + np.flatnonzero(self.index.stratum_N[block] == stratum)
                _, number_N = self.strata.locate_many(stratum, self.index.draw_N[own])
                found.append(own[np.isin(number_N, numbers)])
        return np.sort(np.concatenate(found))

    def numbers(self, dataset: int, start: int, stop: int) -> Integers:
        """Return the numbers of the samples of a dataset from `start` to `stop`."""
        found = [np.empty(0, np.int64)]
        for block in blocks(start, stop):
            stratum_N, draw_N = self.index.stratum_N[block], self.index.draw_N[block]
            for stratum in self.plan.packings[dataset].strata:
                _, number_N = self.strata.locate_many(stratum, draw_N[stratum_N == stratum])
                found.append(number_N)
        return np.concatenate(found)

    def datasets(self, i_N: Integers) -> Integers:
        """Return the packing of each of some samples."""
        sizes = [len(packing.strata) for packing in self.plan.packings]
        packing_Z = np.repeat(np.arange(len(sizes)), sizes)
        return np.asarray(packing_Z[self.index.stratum_N[i_N]])


class UntracedOrder:
    """An order that cannot be traced; it has no end.

    Args:
        reason: the flag or the dataset that makes the order.
        start: first sample of the job in this order.
    """

    def __init__(self, reason: str, start: int) -> None:
        self.reason, self.start = reason, start

    def __len__(self) -> int:
        return sys.maxsize

    def origin(self, i: int) -> SampleOrigin:
        """Raise the error that says why nothing is known."""
        raise self.refusal(f"sample {i} is not known")

    def find(self, dataset: int, numbers: Integers, start: int, stop: int) -> Integers:
        """Raise the error that says why nothing is known."""
        raise self.refusal("the samples that read a document are not known")

    def numbers(self, dataset: int, start: int, stop: int) -> Integers:
        """Raise the error that says why nothing is known."""
        raise self.refusal("the documents that the samples read are not known")

    def datasets(self, i_N: Integers) -> Integers:
        """Raise the error that says why nothing is known."""
        raise self.refusal("the datasets of the samples are not known")

    def refusal(self, what: str) -> TokscaleError:
        """Return the error with the message `what` and its reason."""
        return TokscaleError(
            f"{what}: from sample {self.start} on {self.reason} orders the job's samples; expected "
            "Megatron's GPT datasets and --dataloader-type single"
        )


def open_order(record: DataRecord, plan_file: Path | None) -> SampleOrder:
    """Return the order of a job's record.

    Args:
        record: the record.
        plan_file: plan.json of the run, if the run follows a plan.

    Raises:
        TokscaleError: a file that the record names is missing, damaged or another.
    """
    if isinstance(record.order, BlendRecord):
        return BlendOrder(record.order)
    if record.order is None:
        return SingleOrder(record.datasets[0].size)
    if isinstance(record.order, UntracedRecord):
        return UntracedOrder(record.order.reason, record.start)
    if plan_file is None or not plan_file.is_file():
        raise TokscaleError(
            f"the plan that the job follows is not there; expected it in {plan_file}; restore it"
        )
    plan = followed_plan(plan_file.parent.parent)
    if plan.fingerprint != record.order.fingerprint:
        raise TokscaleError(
            f"{plan_file} is plan {plan.fingerprint}, the job follows {record.order.fingerprint}; "
            "restore that one"
        )
    return PlanOrder(plan, record.order, [row.size for row in record.datasets])
