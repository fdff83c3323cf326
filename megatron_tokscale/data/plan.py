"""A plan: which strata of which data are drawn in which proportion, from which sample on.

Shapes: D datasets, Z strata.
"""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.core.files import check_schema, check_seal, read_json, sealed, write_json
from megatron_tokscale.core.schemas import PLAN_SCHEMA
from megatron_tokscale.corpus.names import numbered

KIND: Final = "tokscale-plan"

# Part of the fingerprint: raised when the same plan would give another order of samples.
ORDER_VERSION: Final = 2

# Megatron's blending index is int16.
MAX_STRATA: Final = 32766

# Limits on weights, unless others are given (our choice).
FLOOR: Final = 0.25
MAX_CHANGE: Final = 1.5

# Shares may be off by this much from summing to one: what decimal digits lose.
_SHARES: Final = 1e-6


@dataclass(frozen=True)
class DatasetIdentity:
    """What tells one .bin/.idx pair from another without reading its tokens.

    Attributes:
        name: base name of the prefix.
        n_sequences: number of sequences in the whole .idx file, all splits.
        n_tokens: number of tokens in the whole .idx file, all splits.
        prefix: the whole prefix, which tells twins apart; empty where it is not known. Data may
            move: it makes no other identity.
    """

    name: str
    n_sequences: int
    n_tokens: int
    prefix: str = field(default="", compare=False)

    @property
    def path(self) -> str:
        """The prefix, or the name where no more is known."""
        return self.prefix or self.name

    @property
    def content(self) -> dict[str, Any]:
        """The values that tell the dataset wherever its files lie; part of fingerprints."""
        return {"name": self.name, "n_sequences": self.n_sequences, "n_tokens": self.n_tokens}

    def __str__(self) -> str:
        return f"{self.name} ({self.n_sequences} sequences, {self.n_tokens} tokens)"


@dataclass(frozen=True)
class Stratum:
    """A part of a dataset that is drawn from as one.

    Attributes:
        name: unique in the plan; it keys the order of the stratum's samples, so that strata added
            or reordered in a later plan leave the others' order as it was.
        dataset: index into the plan's datasets.
        share: its part of the dataset's samples; those of one dataset sum to one.
    """

    name: str
    dataset: int
    share: float = 1.0


@dataclass(frozen=True)
class Cut:
    """How the samples of a dataset are ranked, to be cut into its strata one after the other.

    Attributes:
        scores: fingerprint of the document scores that rank them.
        order: `learning-time`, or, as a control, `frequency`: the mean surprisal of a sample's
            tokens by their frequency alone.
        unlearned: whether the last stratum takes the samples most of whose tokens are never
            learned (by frequency: the highest surprisal), before the others are ranked.
    """

    scores: str
    order: Literal["learning-time", "frequency"] = "learning-time"
    unlearned: bool = False


@dataclass(frozen=True)
class Stage:
    """The weights that hold from consumed sample `start` on.

    Attributes:
        start: consumed samples.
        weights: of the datasets, as in --data-path; they need not sum to one.
        within: of each stratum in its dataset; they need not sum to one either. None is the
            strata's own shares: every sample is as likely as another.
    """

    start: int
    weights: tuple[float, ...]
    within: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Decision:
    """Weights of the datasets, decided while a job trains.

    Attributes:
        step: the probe step up to which losses were looked at.
        start: consumed sample from which the weights hold.
        weights: of the plan's datasets.

    Raises:
        ValueError: on construction, if it is of the very beginning, where the plan itself decides.
    """

    step: int
    start: int
    weights: tuple[float, ...]

    def __post_init__(self) -> None:
        if self.step < 0 or self.start < 1:
            raise ValueError(f"a decision after {self.step} steps, from sample {self.start}")

    @staticmethod
    def from_json(row: Mapping[str, Any]) -> "Decision":
        """Return the decision in `row`; KeyError, TypeError or ValueError if it holds none."""
        return Decision(int(row["step"]), int(row["start"]), _floats(row["weights"]))


@dataclass(frozen=True)
class Acceptance:
    """A plan that took the place of another one under a run (`--tokscale-override-plan`).

    Attributes:
        at: consumed samples when it did.
        after: fingerprint of the plan that the run followed before.
        plan: fingerprint of the plan that the job was given.
    """

    at: int
    after: str
    plan: str


@dataclass(frozen=True)
class Replanning:
    """The settings by which a job with `--tokscale-replan-interval` decides new weights.

    Attributes:
        base_weights: weights of the datasets without the plan; if empty, those of its first stage.
        epoch_samples: training samples in one epoch of each dataset; empty if unknown.
        train_samples: samples consumed at the end of training; if None, the run says.
        strength: power of a dataset's relative slope that its weight follows.
        floor: smallest weight of a dataset, as a fraction of its base weight.
        max_change: largest factor by which a weight grows or shrinks in one decision.
    """

    base_weights: tuple[float, ...] = ()
    epoch_samples: tuple[int, ...] = ()
    train_samples: int | None = None
    strength: float = 1.0
    floor: float = FLOOR
    max_change: float = MAX_CHANGE

    def __post_init__(self) -> None:
        # Fingerprints tell 1 from 1.0.
        object.__setattr__(self, "base_weights", _floats(self.base_weights))
        for name in ("strength", "floor", "max_change"):
            object.__setattr__(self, name, float(getattr(self, name)))


@dataclass(frozen=True)
class Plan:
    """An order of training samples, whatever the number of ranks, workers and restarts.

    Attributes:
        datasets: the data it was made for; a job with other data is refused.
        strata: what is drawn from, dataset by dataset.
        stages: weights over consumed samples, by ascending start, the first at 0.
        seq_length: sequence length in tokens that the samples are cut to.
        seed: keys the epoch permutations.
        cuts: how each dataset's samples fall into its strata; None where it has but one.
        max_epochs: how often a stratum may be gone through; a job that would exceed it is refused.
            None is no limit.
        provenance: how it was made (policy, run, parameters), plain JSON values for people to
            read: it decides nothing, and may be edited.
        documents: of each dataset the first document of its training part, and the one after the
            last; a job with another training part is refused. Empty: not known, as in plans made
            before these were noted.
        replanning: how a job that may change the weights decides them.
        decisions: weights decided while a job trained, in order; the stages hold them already.
        accepted: plans that took the place of others under a run, in order.

    Raises:
        TokscaleError: on construction, if these do not fit together.
    """

    datasets: tuple[DatasetIdentity, ...]
    strata: tuple[Stratum, ...]
    stages: tuple[Stage, ...]
    seq_length: int
    seed: int
    cuts: tuple[Cut | None, ...] = ()
    max_epochs: float | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)
    documents: tuple[tuple[int, int], ...] = ()
    replanning: Replanning = field(default_factory=Replanning)
    decisions: tuple[Decision, ...] = ()
    accepted: tuple[Acceptance, ...] = ()

    def __post_init__(self) -> None:
        if not self.cuts:
            object.__setattr__(self, "cuts", (None,) * len(self.datasets))
        _check_strata(self)
        _check_cuts(self)
        _check_documents(self)
        _check_stages(self)
        _check_replanning(self)
        if self.seq_length < 1:
            raise TokscaleError(f"sequence length {self.seq_length} of the plan is not positive")
        if self.max_epochs is not None and not self.max_epochs > 0:
            raise TokscaleError(f"the plan's limit on epochs, {self.max_epochs}, is not positive")

    @property
    def n_strata(self) -> int:
        """Number of strata Z."""
        return len(self.strata)

    @cached_property
    def dataset_Z(self) -> NDArray[np.int16]:
        """Dataset of each stratum, an index into `datasets`."""
        return np.array([stratum.dataset for stratum in self.strata], dtype=np.int16)

    @cached_property
    def share_Z(self) -> NDArray[np.float64]:
        """Part of its dataset's samples that each stratum is."""
        return np.array([stratum.share for stratum in self.strata])

    def strata_of(self, dataset: int) -> range:
        """The strata of a dataset, which follow each other."""
        first, last = np.searchsorted(self.dataset_Z, [dataset, dataset + 1])
        return range(int(first), int(last))

    def sizes_Z(self, sizes_D: Sequence[int] | NDArray[np.integer[Any]]) -> NDArray[np.int64]:
        """Samples of each stratum in one epoch, given those of each dataset."""
        sizes = [
            np.diff(np.rint(self.bounds_of(dataset) * size).astype(np.int64))
            for dataset, size in enumerate(sizes_D)
        ]
        return np.concatenate(sizes)

    def bounds_of(self, dataset: int) -> NDArray[np.float64]:
        """Where the strata of a dataset begin and end among its ranked samples, from 0 to 1."""
        bounds = np.cumsum([0.0, *self.share_Z[self.strata_of(dataset)]])
        return np.asarray(bounds / bounds[-1])

    @cached_property
    def segments(self) -> tuple["Segment", ...]:
        """The stages with weights that sum to one; a stage that changes nothing is left out."""
        segments: list[Segment] = []
        for stage in self.stages:
            segment = Segment(
                stage.start,
                _normalised(stage.weights),
                tuple(
                    weight
                    for dataset in range(len(self.datasets))
                    for weight in self._within(stage, dataset)
                ),
            )
            if not segments or not segment.weighs_as(segments[-1]):
                segments.append(segment)
        return tuple(segments)

    def _within(self, stage: Stage, dataset: int) -> tuple[float, ...]:
        strata = self.strata_of(dataset)
        shares = tuple(self.strata[z].share for z in strata)
        weights = shares if stage.within is None else tuple(stage.within[z] for z in strata)
        return _normalised(weights if any(weights) else shares)

    def weight_Z(self, segment: "Segment") -> NDArray[np.float64]:
        """Weight of each stratum among all samples in a segment; these sum to one."""
        return np.asarray(np.array(segment.weights)[self.dataset_Z] * np.array(segment.within))

    def target_D(self, n_samples: int) -> NDArray[np.float64]:
        """Number of samples due from each dataset among the first `n_samples`; not whole."""
        target_D = np.zeros(len(self.datasets))
        for start, stop, segment in self.intervals(n_samples):
            target_D += np.array(segment.weights) * (stop - start)
        return target_D

    def target_Z(self, n_samples: int) -> NDArray[np.float64]:
        """Number of samples due from each stratum among the first `n_samples`; not whole."""
        target_Z = np.zeros(self.n_strata)
        for start, stop, segment in self.intervals(n_samples):
            target_Z += self.weight_Z(segment) * (stop - start)
        return target_Z

    def intervals(self, n_samples: int) -> list[tuple[int, int, "Segment"]]:
        """(start, stop, segment) of every segment that begins before sample `n_samples`."""
        stops = [min(segment.start, n_samples) for segment in self.segments[1:]] + [n_samples]
        return [
            (segment.start, stop, segment)
            for segment, stop in zip(self.segments, stops, strict=True)
            if segment.start < stop
        ]

    @property
    def fingerprint(self) -> str:
        """SHA-256 (first 16 hex digits) of everything that decides the order of the samples.

        That includes what decides weights while a job trains.
        """
        return _digest(
            [
                *self._order(self.segments),
                asdict(self.replanning),
                [(decision.step, decision.start) for decision in self.decisions],
                [asdict(acceptance) for acceptance in self.accepted],
            ]
        )

    def fingerprint_until(self, n_samples: int) -> str:
        """Return a fingerprint of the first `n_samples`: equal for plans that differ only later.

        By it a job knows, on resuming, whether its past still holds.
        """
        past = tuple(segment for segment in self.segments if segment.start < n_samples)
        return _digest(self._order(past))

    def _order(self, segments: tuple["Segment", ...]) -> list[Any]:
        return [
            ORDER_VERSION,
            self.seq_length,
            self.seed,
            [dataset.content for dataset in self.datasets],
            [asdict(stratum) for stratum in self.strata],
            [cut and asdict(cut) for cut in self.cuts],
            [asdict(segment) for segment in segments],
            *([self.documents] if self.documents else []),
        ]

    def to_json(self) -> dict[str, Any]:
        """The plan as plain values."""
        return {"kind": KIND, "schema_version": PLAN_SCHEMA, **asdict(self)}

    @staticmethod
    def from_json(content: Mapping[str, Any]) -> "Plan":
        """The plan that `to_json` gave.

        Raises:
            TokscaleError: its parts do not fit together.
            KeyError, TypeError, ValueError: it is no plan.
        """
        return _from_json(content)

    def save(self, path: Path) -> None:
        """Write the plan to `path` (JSON), whole or not at all."""
        write_json(path, sealed(self.to_json()))

    @staticmethod
    def load(path: Path | str) -> "Plan":
        """Read the plan in `path`.

        Raises:
            TokscaleError: the file is missing, no plan, newer, or its parts do not fit together.
        """
        path = Path(path)
        content = read_json(path)
        if content.get("kind") != KIND:
            raise TokscaleError(f"{path} is not a plan; make one with `megatron-tokscale plan`")
        version = content.get("schema_version")
        check_schema(path, version if isinstance(version, int) else 0, PLAN_SCHEMA)
        if version != PLAN_SCHEMA:
            raise TokscaleError(
                f"plan {path} is of an older version; build it again with "
                "`megatron-tokscale plan build`"
            )
        try:
            plan = _from_json(content)
        except (KeyError, TypeError, ValueError) as error:
            raise TokscaleError(f"plan {path} is malformed ({error!r}); make it again") from error
        except TokscaleError as error:
            raise TokscaleError(f"plan {path}: {error}") from error
        check_seal(path, content)
        return plan


@dataclass(frozen=True)
class Segment:
    """A stage of a plan whose weights sum to one: those of the datasets, and within each dataset.

    Attributes:
        start: consumed samples.
        weights: of the datasets.
        within: of each stratum in its dataset.
    """

    start: int
    weights: tuple[float, ...]
    within: tuple[float, ...]

    def weighs_as(self, other: "Segment") -> bool:
        """Whether the weights are the same."""
        return (self.weights, self.within) == (other.weights, other.within)


def dataset_names(datasets: Sequence[DatasetIdentity]) -> list[str]:
    """Names that tell the datasets of a plan apart: namesakes are numbered."""
    return numbered([dataset.name for dataset in datasets])


def _from_json(content: Mapping[str, Any]) -> Plan:
    max_epochs = content["max_epochs"]
    return Plan(
        datasets=tuple(
            DatasetIdentity(
                str(row["name"]),
                _whole(row["n_sequences"]),
                _whole(row["n_tokens"]),
                str(row.get("prefix", "")),
            )
            for row in content["datasets"]
        ),
        strata=tuple(
            Stratum(str(row["name"]), _whole(row["dataset"]), float(row["share"]))
            for row in content["strata"]
        ),
        stages=tuple(
            Stage(_whole(row["start"]), _floats(row["weights"]), _optional_floats(row["within"]))
            for row in content["stages"]
        ),
        seq_length=_whole(content["seq_length"]),
        seed=_whole(content["seed"]),
        cuts=tuple(row and Cut(**row) for row in content["cuts"]),
        max_epochs=None if max_epochs is None else float(max_epochs),
        provenance=dict(content.get("provenance", {})),
        documents=tuple(
            (_whole(start), _whole(stop)) for start, stop in content.get("documents", ())
        ),
        replanning=_replanning(content["replanning"]),
        decisions=tuple(Decision.from_json(row) for row in content["decisions"]),
        accepted=tuple(
            Acceptance(_whole(row["at"]), str(row["after"]), str(row["plan"]))
            for row in content["accepted"]
        ),
    )


def _replanning(row: Mapping[str, Any]) -> Replanning:
    train_samples = row["train_samples"]
    return Replanning(
        base_weights=_floats(row["base_weights"]),
        epoch_samples=tuple(_whole(samples) for samples in row["epoch_samples"]),
        train_samples=None if train_samples is None else _whole(train_samples),
        strength=float(row["strength"]),
        floor=float(row["floor"]),
        max_change=float(row["max_change"]),
    )


def _digest(content: list[Any]) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def _floats(row: Sequence[Any]) -> tuple[float, ...]:
    return tuple(float(value) for value in row)


def _optional_floats(row: Sequence[Any] | None) -> tuple[float, ...] | None:
    return None if row is None else _floats(row)


def _whole(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{value!r} is not a whole number")
    return value


def _normalised(weights: tuple[float, ...]) -> tuple[float, ...]:
    """Weights over their sum, computed as Megatron does, to the last bit.

    Its builder divides by the sum, and then its blend does. Zeros, which Megatron does not
    allow, do not change how the others round: a dataset without weight that joins a plan leaves its
    past as it was.
    """
    weights_Z = np.array(weights, dtype=np.float64)
    for _ in range(2):
        weights_Z = weights_Z / np.sum(weights_Z[weights_Z > 0])
    return tuple(weights_Z.tolist())


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
        if not 0 <= stratum.share <= 1:
            raise TokscaleError(f"the share {stratum.share} of stratum {stratum.name!r} is none")
    if (
        sorted({*plan.dataset_Z.tolist()}) != list(range(len(plan.datasets)))
        or (np.diff(plan.dataset_Z) < 0).any()
    ):
        raise TokscaleError("the strata of the plan must come dataset by dataset, one at least")
    share_D = np.bincount(plan.dataset_Z, plan.share_Z)
    if (np.abs(share_D - 1) > _SHARES).any():
        raise TokscaleError(f"the shares of the plan's strata sum to {share_D.tolist()}, not to 1")


def _check_cuts(plan: Plan) -> None:
    if len(plan.cuts) != len(plan.datasets):
        raise TokscaleError(f"the plan has {len(plan.cuts)} cuts, {len(plan.datasets)} datasets")
    for dataset, cut in enumerate(plan.cuts):
        name, n_strata = plan.datasets[dataset].name, len(plan.strata_of(dataset))
        if cut is None and n_strata > 1:
            raise TokscaleError(f"the plan does not say how {name} is cut into {n_strata} strata")
        if cut is not None and cut.order not in ("learning-time", "frequency"):
            raise TokscaleError(f"the plan ranks {name} by {cut.order!r}, which is unknown")


def _check_documents(plan: Plan) -> None:
    if plan.documents and len(plan.documents) != len(plan.datasets):
        raise TokscaleError(
            f"the plan has {len(plan.documents)} training parts for {len(plan.datasets)} datasets; "
            "expected one of each; make it again"
        )
    for dataset, (start, stop) in zip(plan.datasets, plan.documents, strict=False):
        if not 0 <= start <= stop <= dataset.n_sequences:
            raise TokscaleError(
                f"the training part of {dataset.name} in the plan is documents {start} to {stop}; "
                f"expected a part of its {dataset.n_sequences}; make the plan again"
            )


def _check_replanning(plan: Plan) -> None:
    how = plan.replanning
    for values, name in (
        (how.base_weights, "base weights"),
        (how.epoch_samples, "numbers of samples in an epoch"),
    ):
        if values and len(values) != len(plan.datasets):
            raise TokscaleError(
                f"the plan's replanning has {len(values)} {name}; expected {len(plan.datasets)}, "
                "one for each dataset"
            )
        if values and not (all(value >= 0 for value in values) and 0 < sum(values) < math.inf):
            raise TokscaleError(
                f"the {name} of the plan's replanning are {list(values)}; expected 0 or more, "
                "finite, and not all 0"
            )
    if how.train_samples is not None and how.train_samples < 1:
        raise TokscaleError(
            f"the plan's replanning is for {how.train_samples} samples; expected 1 or more"
        )
    if not (0 <= how.strength < math.inf and 0 < how.floor <= 1 and how.max_change > 1):
        raise TokscaleError(
            f"the plan's replanning has strength {how.strength:g}, floor {how.floor:g} and change "
            f"{how.max_change:g}; expected 0 or more, above 0 and at most 1, and above 1"
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
        _check_weights(plan, stage)


def _check_weights(plan: Plan, stage: Stage) -> None:
    stage_at = f"the plan's stage at sample {stage.start}"
    for weights, count, of in (
        (stage.weights, len(plan.datasets), "datasets"),
        (stage.within, plan.n_strata, "strata"),
    ):
        if weights is None:
            continue
        if len(weights) != count:
            raise TokscaleError(f"{stage_at} has {len(weights)} weights for {count} {of}")
        if not all(math.isfinite(weight) and weight >= 0 for weight in weights):
            raise TokscaleError(
                f"{stage_at} has a weight that is negative or not finite: {list(weights)}"
            )
    if not 0 < math.fsum(stage.weights) < math.inf:
        raise TokscaleError(
            f"the weights of {stage_at} sum to nothing; at least one must be positive"
        )
    if stage.within is None:
        return
    for dataset, weight in enumerate(stage.weights):
        if weight and not any(stage.within[z] for z in plan.strata_of(dataset)):
            raise TokscaleError(
                f"the weights of {stage_at} within {plan.datasets[dataset].name} sum to nothing; "
                "at least one must be positive"
            )
