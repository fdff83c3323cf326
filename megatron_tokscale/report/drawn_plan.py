"""The samples due by a run's plan and those that the run drew, from its files and index.

Shapes: D datasets, Z strata, W windows of consumed samples.
"""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import count, pairwise
from pathlib import Path
from typing import Final, Literal

import numpy as np

from megatron_tokscale.core.arrays import Floats, Integers
from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.core.files import is_there
from megatron_tokscale.data import (
    Plan,
    PlanIndex,
    build_index,
    dataset_names,
    with_decisions,
)
from megatron_tokscale.data.history import load_run_plan
from megatron_tokscale.data.index import count_strata, load_index
from megatron_tokscale.data.record import DataRecord, PlanRecord, load_records, record_path
from megatron_tokscale.probe import ProbeSet
from megatron_tokscale.store import Run

N_WINDOWS: Final = 50  # points in the figure of shares
_MIN_SAMPLES: Final = 20  # least samples in a window: the share of fewer is mostly noise


@dataclass(frozen=True, eq=False)
class DrawnPlan:
    """A plan and the samples that a run drew under it. Make one with `read_plan`.

    Attributes:
        plan: the plan that the run follows, with the decisions made while it trained.
        given: fingerprint of the plan without the decisions.
        edge_W1: edges of the windows in consumed samples, evenly spaced in their logarithm. The
            first is the run's first sample under the plan, the last is the number of samples at
            its last probe. A single edge if no sample was drawn.
        count_WZ: samples drawn in each window, counted in the index.
        target_WZ: samples due in each window by the plan's weights; not whole.
        base_D: weights without the plan, summing to one.
        base_from: source of `base_D`: the `plan`, or the weights of its first `stage`.
        size_Z: samples in one epoch.
        size_from: source of `size_Z`: the `job`, which has counted the samples; the `plan`, which
            was made for that number; or the `tokens` of the whole datasets, an estimate.
        colour_D: number of each dataset's colour: the probe set's, if it has the dataset.
    """

    plan: Plan
    given: str
    edge_W1: Integers
    count_WZ: Integers
    target_WZ: Floats
    base_D: Floats
    base_from: Literal["plan", "stage"]
    size_Z: Integers
    size_from: Literal["job", "plan", "tokens"]
    colour_D: tuple[int, ...]

    @cached_property
    def name_D(self) -> list[str]:
        """The names of the datasets, numbered where two are the same."""
        return dataset_names(self.plan.datasets)

    @cached_property
    def name_Z(self) -> list[str]:
        """The names of the strata, without the dataset's name before it."""
        strata = self.plan.strata
        return [each.name.removeprefix(f"{self.name_D[each.dataset]}/") for each in strata]

    @property
    def start(self) -> int:
        """The first sample that was drawn by the plan."""
        return int(self.edge_W1[0])

    @property
    def stop(self) -> int:
        """The number of samples consumed at the last probe under the plan."""
        return int(self.edge_W1[-1])

    @property
    def n_samples(self) -> int:
        """The number of samples drawn by the plan."""
        return self.stop - self.start

    @property
    def base_Z(self) -> Floats:
        """The share of each stratum among all samples without the plan."""
        return np.asarray(self.base_D[self.plan.dataset_Z] * self.plan.share_Z)

    @property
    def count_Z(self) -> Integers:
        """The number of samples drawn from each stratum."""
        return self.count_WZ.sum(axis=0)

    @property
    def target_Z(self) -> Floats:
        """The samples due from each stratum by the plan's weights; not whole."""
        return self.target_WZ.sum(axis=0)

    def weight_Z(self, n_samples: int) -> Floats:
        """Return the weights of the sample after the first `n_samples`; they sum to one."""
        return self.plan.weight_Z(self.plan.intervals(n_samples + 1)[-1][2])

    def by_dataset(self, value_Z: Integers | Floats) -> Floats:
        """Return sums over the strata of each dataset, along the last axis."""
        first_D = np.searchsorted(self.plan.dataset_Z, np.arange(len(self.plan.datasets)))
        return np.add.reduceat(value_Z, first_D, axis=-1)


def read_plan(run: Run) -> DrawnPlan | None:
    """Return the plan of a run, and the samples drawn up to its last probe; None without a plan.

    If the job's index is not kept, it is computed again, with 10 bytes and up to half a µs for
    every consumed sample.

    Raises:
        TokscaleError: a file of the plan, or that of the job's data, is damaged.
    """
    path = run.paths.plan
    if not is_there(path):
        return None
    try:
        given, decisions = load_run_plan(run.path)
        plan = with_decisions(given, decisions)
        known = record_path(run.path)
        records = load_records(known) if is_there(known) else ()
    except TokscaleError as error:
        raise TokscaleError(
            f"{error}; or move {path} away for a report that leaves the plan out"
        ) from error
    consumed = [record.consumed_samples for record in run.records]
    record, start, stop = _span(records, max(consumed, default=0))
    edge_W1 = window_edges(start, min((n for n in consumed if n > start), default=stop), stop)
    base_D, base_from = _base(plan)
    size_Z, size_from = _sizes(plan, record)
    return DrawnPlan(
        plan,
        given.fingerprint,
        edge_W1,
        _count(_index(plan, record, int(edge_W1[-1])), edge_W1, plan.n_strata),
        np.diff([plan.target_Z(edge) for edge in edge_W1.tolist()], axis=0),
        base_D,
        base_from,
        size_Z,
        size_from,
        _colours(plan, run.probe_set),
    )


def window_edges(start: int, first: int, stop: int) -> Integers:
    """Return edges of at most 50 windows of [start, stop), evenly spaced in ln samples.

    If `start` is 0, the first window ends at `first`, which has a place on a logarithmic axis.
    Windows of fewer than 20 samples are joined.
    """
    if stop <= start:
        return np.array([start])
    low = max(min(first, stop), 1) if start == 0 else start
    n_edges = N_WINDOWS if low > start else N_WINDOWS + 1
    edges = [start]
    for edge in np.rint(np.geomspace(low, stop, n_edges)).astype(np.int64).tolist():
        if edge - edges[-1] >= _MIN_SAMPLES and stop - edge >= _MIN_SAMPLES:
            edges.append(edge)
    return np.array([*edges, stop])


def _index(plan: Plan, record: DataRecord | None, n_samples: int) -> PlanIndex:
    """Return the index of the job, from its cache if it is still there; else compute it again."""
    order = None if record is None else record.order
    if isinstance(order, PlanRecord) and order.n_samples >= n_samples:
        with suppress(TokscaleError):  # a file that is missing or damaged
            return load_index(plan, order.n_samples, Path(order.cache_dir))
    return build_index(plan, n_samples)


def _count(index: PlanIndex, edge_W1: Integers, n_strata: int) -> Integers:
    count_WZ = np.zeros((len(edge_W1) - 1, n_strata), np.int64)
    for row, (begin, end) in enumerate(pairwise(edge_W1)):
        count_WZ[row] = count_strata(index.stratum_N[begin:end], n_strata)
    return count_WZ


def _span(records: Sequence[DataRecord], consumed: int) -> tuple[DataRecord | None, int, int]:
    """Return the job's last record under a plan, and the first and last sample that it covers."""
    stop = consumed
    for record in reversed(records):
        if record.kind == "plan":
            return record, record.start, max(min(stop, consumed), record.start)
        stop = record.start
    return None, 0, min(stop, consumed)


def _base(plan: Plan) -> tuple[Floats, Literal["plan", "stage"]]:
    """Return the weights of the datasets without the plan, and their source."""
    if weights := plan.replanning.base_weights:
        return np.array(weights) / sum(weights), "plan"
    return np.array(plan.segments[0].weights), "stage"


def _sizes(
    plan: Plan, record: DataRecord | None
) -> tuple[Integers, Literal["job", "plan", "tokens"]]:
    """Return the samples in one epoch of each stratum, and their source."""
    names = [plan.datasets[packing.dataset].name for packing in plan.packings]
    if record is not None and [packing.name for packing in record.datasets] == names:
        return plan.packed_sizes_Z([packing.size for packing in record.datasets]), "job"
    if samples := plan.replanning.epoch_samples:
        return plan.sizes_Z(samples), "plan"
    sizes = [dataset.n_tokens // plan.seq_length for dataset in plan.datasets]
    return plan.sizes_Z(sizes), "tokens"


def _colours(plan: Plan, probe_set: ProbeSet) -> tuple[int, ...]:
    """Return the number of each dataset's colour: the probe set's, or a free one if not watched."""
    free = count(len(probe_set.datasets))
    try:
        datasets = probe_set.dataset_indices([dataset.path for dataset in plan.datasets])
    except TokscaleError:  # namesakes that cannot be told apart get free colours
        datasets = [None] * len(plan.datasets)
    return tuple(next(free) if dataset is None else dataset for dataset in datasets)
