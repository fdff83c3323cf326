"""A plan: which strata of which data are drawn in which proportion, from which sample on.

Shapes: Z strata.
"""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from megatron_tokscale.errors import TokscaleError
from megatron_tokscale.files import check_schema, read_json, write_json

KIND: Final = "tokscale-plan"
SCHEMA_VERSION: Final = 1

# Part of the fingerprint: raised when the same plan would give another order of samples.
ORDER_VERSION: Final = 1

# Megatron's blending index is int16.
MAX_STRATA: Final = 32766


@dataclass(frozen=True)
class DatasetIdentity:
    """What tells one .bin/.idx pair from another without reading its tokens.

    Attributes:
        name: base name of the prefix.
        n_sequences: number of sequences in the whole .idx file, all splits.
        n_tokens: number of tokens in the whole .idx file, all splits.
    """

    name: str
    n_sequences: int
    n_tokens: int

    def __str__(self) -> str:
        return f"{self.name} ({self.n_sequences} sequences, {self.n_tokens} tokens)"


@dataclass(frozen=True)
class Stratum:
    """A part of the data that is drawn from as one.

    Attributes:
        name: unique in the plan; it keys the order of the stratum's samples, so that strata added
            or reordered in a later plan leave the others' order as it was.
        dataset: index into the plan's datasets.
    """

    name: str
    dataset: int


@dataclass(frozen=True)
class Stage:
    """The weights that hold from consumed sample `start` on; they need not sum to one."""

    start: int
    weights: tuple[float, ...]


@dataclass(frozen=True)
class Plan:
    """An order of training samples, whatever the number of ranks, workers and restarts.

    Attributes:
        datasets: the data it was made for; a job with other data is refused.
        strata: what is drawn from, one weight each.
        stages: weights over consumed samples, by ascending start, the first at 0.
        seq_length: sequence length in tokens that the samples are cut to.
        seed: keys the epoch permutations.
        provenance: how it was made (policy, run, parameters), plain JSON values.

    Raises:
        TokscaleError: on construction, if these do not fit together.
    """

    datasets: tuple[DatasetIdentity, ...]
    strata: tuple[Stratum, ...]
    stages: tuple[Stage, ...]
    seq_length: int
    seed: int
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_strata(self)
        _check_stages(self)
        if self.seq_length < 1:
            raise TokscaleError(f"sequence length {self.seq_length} of the plan is not positive")

    @property
    def n_strata(self) -> int:
        """Number of strata Z."""
        return len(self.strata)

    @cached_property
    def dataset_Z(self) -> NDArray[np.int16]:
        """Dataset of each stratum, an index into `datasets`."""
        return np.array([stratum.dataset for stratum in self.strata], dtype=np.int16)

    @cached_property
    def segments(self) -> tuple[Stage, ...]:
        """The stages with weights that sum to one; a stage that changes nothing is left out.

        Leaving it out makes a plan whose weights never change the plain blend, however many stages
        it is written in.
        """
        segments: list[Stage] = []
        for stage in self.stages:
            weights = _normalised(stage.weights)
            if not segments or weights != segments[-1].weights:
                segments.append(Stage(stage.start, weights))
        return tuple(segments)

    def target_Z(self, n_samples: int) -> NDArray[np.float64]:
        """Number of samples due from each stratum among the first `n_samples`; not whole."""
        target_Z = np.zeros(self.n_strata)
        for segment, stop in zip(self.segments, self._stops(n_samples), strict=True):
            target_Z += np.array(segment.weights) * max(stop - segment.start, 0)
        return target_Z

    def _stops(self, n_samples: int) -> list[int]:
        starts = [segment.start for segment in self.segments[1:]]
        return [min(start, n_samples) for start in starts] + [n_samples]

    def intervals(self, n_samples: int) -> list[tuple[int, int, NDArray[np.float64]]]:
        """(start, stop, weights_Z) of every segment that begins before sample `n_samples`."""
        return [
            (segment.start, stop, np.array(segment.weights))
            for segment, stop in zip(self.segments, self._stops(n_samples), strict=True)
            if segment.start < stop
        ]

    @property
    def fingerprint(self) -> str:
        """SHA-256 (first 16 hex digits) of everything that decides the order of the samples."""
        return self._fingerprint(self.segments)

    def fingerprint_until(self, n_samples: int) -> str:
        """The same for the first `n_samples`: equal for two plans that differ only later.

        It is what a job notes at a checkpoint to know, on resuming, that its past still holds.
        """
        return self._fingerprint(
            tuple(segment for segment in self.segments if segment.start < n_samples)
        )

    def _fingerprint(self, segments: tuple[Stage, ...]) -> str:
        content = [
            ORDER_VERSION,
            self.seq_length,
            self.seed,
            [asdict(dataset) for dataset in self.datasets],
            [asdict(stratum) for stratum in self.strata],
            [asdict(segment) for segment in segments],
        ]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]

    def save(self, path: Path) -> None:
        """Write the plan to `path` (JSON), whole or not at all."""
        write_json(path, {"kind": KIND, "schema_version": SCHEMA_VERSION, **asdict(self)})

    @staticmethod
    def load(path: Path) -> "Plan":
        """Read the plan in `path`.

        Raises:
            TokscaleError: the file is missing, no plan, newer, or its parts do not fit together.
        """
        content = read_json(path)
        if content.get("kind") != KIND:
            raise TokscaleError(f"{path} is not a plan; make one with `megatron-tokscale plan`")
        version = content.get("schema_version")
        check_schema(path, version if isinstance(version, int) else 0, SCHEMA_VERSION)
        try:
            return _from_json(content)
        except (KeyError, TypeError, ValueError) as error:
            raise TokscaleError(f"plan {path} is malformed ({error!r}); make it again") from error
        except TokscaleError as error:
            raise TokscaleError(f"plan {path}: {error}") from error


def _from_json(content: Mapping[str, Any]) -> Plan:
    return Plan(
        datasets=tuple(
            DatasetIdentity(str(row["name"]), _whole(row["n_sequences"]), _whole(row["n_tokens"]))
            for row in content["datasets"]
        ),
        strata=tuple(
            Stratum(str(row["name"]), _whole(row["dataset"])) for row in content["strata"]
        ),
        stages=tuple(
            Stage(_whole(row["start"]), tuple(float(weight) for weight in row["weights"]))
            for row in content["stages"]
        ),
        seq_length=_whole(content["seq_length"]),
        seed=_whole(content["seed"]),
        provenance=dict(content.get("provenance", {})),
    )


def _whole(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{value!r} is not a whole number")
    return value


def _normalised(weights: tuple[float, ...]) -> tuple[float, ...]:
    """Weights over their sum, computed as Megatron does, to the last bit."""
    weights_Z = np.array(weights, dtype=np.float64)
    return tuple((weights_Z / np.sum(weights_Z)).tolist())


def _check_strata(plan: Plan) -> None:
    if not plan.strata:
        raise TokscaleError("the plan has no strata")
    if plan.n_strata > MAX_STRATA:
        raise TokscaleError(f"the plan has {plan.n_strata} strata, at most {MAX_STRATA} can be")
    name, count = Counter(stratum.name for stratum in plan.strata).most_common(1)[0]
    if count > 1:
        raise TokscaleError(f"{count} strata of the plan are named {name!r}; names must be unique")
    for stratum in plan.strata:
        if not 0 <= stratum.dataset < len(plan.datasets):
            raise TokscaleError(
                f"stratum {stratum.name!r} of the plan is of dataset {stratum.dataset}, "
                f"but there are {len(plan.datasets)} (from 0)"
            )


def _check_stages(plan: Plan) -> None:
    if not plan.stages or plan.stages[0].start != 0:
        raise TokscaleError("the first stage of the plan must start at sample 0")
    previous = -1
    for stage in plan.stages:
        if stage.start <= previous:
            raise TokscaleError(
                f"the plan's stage at sample {stage.start} follows the one at {previous}; "
                "starts must ascend"
            )
        previous = stage.start
        if len(stage.weights) != plan.n_strata:
            raise TokscaleError(
                f"the plan's stage at sample {stage.start} has {len(stage.weights)} weights "
                f"for {plan.n_strata} strata"
            )
        if not all(math.isfinite(weight) and weight >= 0 for weight in stage.weights):
            raise TokscaleError(
                f"the plan's stage at sample {stage.start} has a weight that is negative or not "
                f"finite: {list(stage.weights)}"
            )
        if not 0 < math.fsum(stage.weights) < math.inf:
            raise TokscaleError(
                f"the weights of the plan's stage at sample {stage.start} sum to nothing; "
                "at least one must be positive"
            )
