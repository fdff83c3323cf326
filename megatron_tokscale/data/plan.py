"""A plan: which strata of which data are drawn in which proportion, from which sample on.

`data/plan_parts.py` has its parts, `data/plan_checks.py` the checks that they fit together.

Shapes: D datasets, Z strata, J packings.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Final, Self, cast

import numpy as np
from numpy.typing import NDArray

from megatron_tokscale.core.arrays import Floats, Integers
from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.core.files import (
    check_schema,
    check_seal,
    read_json,
    schema_version,
    sealed,
    write_json,
)
from megatron_tokscale.core.records import JSON, from_json, to_json
from megatron_tokscale.core.schemas import PLAN_SCHEMA
from megatron_tokscale.data.plan_checks import check_plan
from megatron_tokscale.data.plan_parts import (
    Acceptance,
    Cut,
    DatasetIdentity,
    Decision,
    Packing,
    PlanProvenance,
    Replanning,
    Segment,
    Skip,
    Stage,
    Stratum,
)

KIND: Final = "tokscale-plan"

ORDER_VERSION: Final = 2
"""Part of the fingerprint: raised when the same plan would give another order of samples."""

_OF_THE_FILE: Final = {"kind", "schema_version", "checksum"}
"""Keys of plan.json that are no fields of a plan."""

_OLDEST_READ: Final = 5
"""Oldest schema of plan.json that is read: the next one added samples that are left out."""


@dataclass(frozen=True)
class Plan:
    """An order of training samples, whatever the number of ranks, workers and restarts.

    Attributes:
        datasets: the data it was made for; a job with other data is refused.
        strata: the parts of the datasets that are drawn from, dataset by dataset.
        stages: weights over consumed samples, by ascending start, the first at 0.
        seq_length: sequence length in tokens that the samples are cut to.
        seed: keys the epoch permutations.
        cuts: the rule that cuts each dataset into its strata; None where it has but one.
        max_epochs: largest number of epochs of a stratum; a job that would exceed it is refused.
            None is no limit.
        provenance: how it was made, for people to read: nothing depends on it.
        documents: of each dataset the first document of its training part, and the one after the
            last; a job with another training part is refused. Empty: not known.
        replanning: settings of a job that changes the weights while it trains.
        decisions: weights decided while a job trained, in order; the stages hold them already.
        accepted: plans that took over from others under a run, in order.
        skips: samples that are left out from a sample on, by ascending start.

    Raises:
        TokscaleError: on construction, if the parts do not fit together.
    """

    datasets: tuple[DatasetIdentity, ...]
    strata: tuple[Stratum, ...]
    stages: tuple[Stage, ...]
    seq_length: int
    seed: int
    cuts: tuple[Cut | None, ...] = ()
    max_epochs: float | None = None
    provenance: PlanProvenance = field(default_factory=PlanProvenance)
    documents: tuple[tuple[int, int], ...] = ()
    replanning: Replanning = field(default_factory=Replanning)
    decisions: tuple[Decision, ...] = ()
    accepted: tuple[Acceptance, ...] = ()
    skips: tuple[Skip, ...] = ()

    def __post_init__(self) -> None:
        if not self.cuts:
            object.__setattr__(self, "cuts", (None,) * len(self.datasets))
        check_plan(self)

    @property
    def n_strata(self) -> int:
        """Number of strata Z."""
        return len(self.strata)

    @cached_property
    def dataset_Z(self) -> NDArray[np.int16]:
        """Dataset of each stratum, an index into `datasets`."""
        return np.array([stratum.dataset for stratum in self.strata], dtype=np.int16)

    @cached_property
    def share_Z(self) -> Floats:
        """Fraction of its dataset's samples that each stratum holds."""
        return np.array([stratum.share for stratum in self.strata])

    def strata_of(self, dataset: int) -> range:
        """Return the strata of a dataset, which follow each other."""
        first, last = np.searchsorted(self.dataset_Z, [dataset, dataset + 1])
        return range(int(first), int(last))

    @cached_property
    def packings(self) -> tuple[Packing, ...]:
        """The sets of documents that are packed into samples together, in the order of the plan.

        In a plan without strata of documents they are the datasets.
        """
        found: list[Packing] = []
        for dataset, cut in enumerate(self.cuts):
            strata = self.strata_of(dataset)
            if cut is not None and cut.unit == "documents":
                found += [Packing(dataset, range(z, z + 1), is_stratum=True) for z in strata]
            else:
                found.append(Packing(dataset, strata))
        return tuple(found)

    def sizes_Z(self, sizes_D: Sequence[int] | Integers) -> Integers:
        """Return the samples of each stratum in one epoch from the samples of each dataset.

        Of strata of documents this is an estimate by their shares of the tokens.
        """
        sizes = [self._sizes_of(dataset, size) for dataset, size in enumerate(sizes_D)]
        return np.concatenate(sizes)

    def packed_sizes_Z(self, sizes_J: Sequence[int]) -> Integers:
        """Return the samples of each stratum in one epoch from the samples of each packing."""
        sizes = [
            np.array([size]) if packing.is_stratum else self._sizes_of(packing.dataset, size)
            for packing, size in zip(self.packings, sizes_J, strict=True)
        ]
        return np.concatenate(sizes)

    def _sizes_of(self, dataset: int, size: int) -> Integers:
        bounds = np.rint(self.bounds_of(dataset) * size).astype(np.int64)
        return bounds[1:] - bounds[:-1]

    def bounds_of(self, dataset: int) -> Floats:
        """Return where a dataset's strata begin and end among its ranked samples, from 0 to 1."""
        bounds = np.cumsum([0.0, *self.share_Z[self.strata_of(dataset)]])
        return np.asarray(bounds / bounds[-1])

    @cached_property
    def segments(self) -> tuple[Segment, ...]:
        """The stages with weights that sum to one, without stages that change nothing."""
        segments: list[Segment] = []
        for stage in self.stages:
            within = tuple(
                weight
                for dataset in range(len(self.datasets))
                for weight in self._within(stage, dataset)
            )
            segment = Segment(stage.start, _normalised(stage.weights), within)
            if not segments or not segment.weighs_as(segments[-1]):
                segments.append(segment)
        return tuple(segments)

    def _within(self, stage: Stage, dataset: int) -> tuple[float, ...]:
        """Return the normalised weights of a dataset's strata; their shares where all are 0."""
        strata = self.strata_of(dataset)
        shares = tuple(self.strata[z].share for z in strata)
        weights = shares if stage.within is None else tuple(stage.within[z] for z in strata)
        return _normalised(weights if any(weights) else shares)

    def weight_Z(self, segment: Segment) -> Floats:
        """Return the weight of each stratum among all samples of a segment; they sum to one."""
        return np.asarray(np.array(segment.weights)[self.dataset_Z] * np.array(segment.within))

    def target_D(self, n_samples: int) -> Floats:
        """Return the samples due from each dataset among the first `n_samples`; not whole."""
        target_D = np.zeros(len(self.datasets))
        for start, stop, segment in self.intervals(n_samples):
            target_D += np.array(segment.weights) * (stop - start)
        return target_D

    def target_Z(self, n_samples: int) -> Floats:
        """Return the samples due from each stratum among the first `n_samples`; not whole."""
        target_Z = np.zeros(self.n_strata)
        for start, stop, segment in self.intervals(n_samples):
            target_Z += self.weight_Z(segment) * (stop - start)
        return target_Z

    def intervals(self, n_samples: int) -> list[tuple[int, int, Segment]]:
        """Return (start, stop, segment) of every segment that begins before sample `n_samples`."""
        stops = [min(segment.start, n_samples) for segment in self.segments[1:]] + [n_samples]
        return [
            (segment.start, stop, segment)
            for segment, stop in zip(self.segments, stops, strict=True)
            if segment.start < stop
        ]

    @property
    def fingerprint(self) -> str:
        """SHA-256 (first 16 hex digits) of everything that decides the order of the samples.

        That includes the settings that decide weights while a job trains.
        """
        return _digest(
            [
                *self._ordering_values(self.segments, self.skips),
                asdict(self.replanning),
                [(decision.step, decision.start) for decision in self.decisions],
                [asdict(acceptance) for acceptance in self.accepted],
            ]
        )

    def fingerprint_until(self, n_samples: int) -> str:
        """Return a fingerprint of the first `n_samples`: equal for plans that differ only later.

        A job that resumes compares it to know whether its past still holds.
        """
        past = tuple(segment for segment in self.segments if segment.start < n_samples)
        skips = tuple(skip for skip in self.skips if skip.start < n_samples)
        return _digest(self._ordering_values(past, skips))

    def _ordering_values(
        self, segments: tuple[Segment, ...], skips: tuple[Skip, ...]
    ) -> list[object]:
        """Return the plain values that decide the order of the samples of some segments."""
        return [
            ORDER_VERSION,
            self.seq_length,
            self.seed,
            [dataset.content for dataset in self.datasets],
            [asdict(stratum) for stratum in self.strata],
            [cut and asdict(cut) for cut in self.cuts],
            [asdict(segment) for segment in segments],
            *([self.documents] if self.documents else []),
            *([[asdict(skip) for skip in skips]] if skips else []),
        ]

    def save(self, path: Path) -> None:
        """Write the plan to `path` (JSON), whole or not at all."""
        fields = cast("dict[str, JSON]", to_json(self))
        write_json(path, sealed({"kind": KIND, "schema_version": PLAN_SCHEMA, **fields}))

    @classmethod
    def load(cls, path: Path | str) -> Self:
        """Read the plan in `path`.

        Raises:
            TokscaleError: the file is missing, holds no plan, has another schema version, or its
                parts do not fit together.
        """
        path = Path(path)
        content = read_json(path)
        if content.get("kind") != KIND:
            raise TokscaleError(f"{path} is not a plan; make one with `megatron-tokscale plan`")
        version = schema_version(path, content)
        check_schema(path, version, PLAN_SCHEMA)
        if version < _OLDEST_READ:
            raise TokscaleError(
                f"plan {path} is of an older version, {version}; expected {PLAN_SCHEMA}; build it "
                "again with `megatron-tokscale plan build`"
            )
        fields = {name: content[name] for name in content.keys() - _OF_THE_FILE}
        try:
            plan = from_json(cls, fields)
        except ValueError as error:
            raise TokscaleError(
                f"plan {path} is damaged: {error}; restore it, or build it again with "
                "`megatron-tokscale plan build`"
            ) from error
        except TokscaleError as error:
            raise TokscaleError(f"plan {path}: {error}") from error
        check_seal(path, content)
        return plan


def _normalised(weights: tuple[float, ...]) -> tuple[float, ...]:
    """Return weights over their sum, computed as Megatron does, to the last bit.

    Megatron's builder divides by the sum, and then its blend does. Zeros, which Megatron does not
    allow, do not change how the others round: a dataset without weight that joins a plan leaves its
    past as it was.
    """
    weights_Z = np.array(weights, dtype=np.float64)
    for _ in range(2):
        weights_Z = weights_Z / np.sum(weights_Z[weights_Z > 0])
    return tuple(weights_Z.tolist())


def _digest(content: list[object]) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
