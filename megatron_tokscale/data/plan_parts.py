"""The parts of a plan: its data, strata, cuts and stages, and its changes under a run.

All of them are plain values; `core/records.py` writes them to plan.json and reads them back.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal

from megatron_tokscale.core.records import JSON
from megatron_tokscale.corpus.names import numbered

FLOOR: Final = 0.25
"""Smallest weight as a fraction of the base weight, where none is set. Our choice: no data is
starved for the sake of a forecast, and three quarters of each weight are free to move."""

MAX_CHANGE: Final = 1.5
"""Largest factor by which a weight changes in one step, where none is set. Our choice: slow enough
for an optimizer to follow, and a weight grows tenfold within six stages."""


@dataclass(frozen=True)
class DatasetIdentity:
    """The values that identify a .bin/.idx pair without reading its tokens.

    Attributes:
        name: base name of the prefix.
        n_sequences: number of sequences in the whole .idx file, all splits.
        n_tokens: number of tokens in the whole .idx file, all splits.
        prefix: the whole prefix, which tells namesakes apart; empty where it is not known. Data may
            move, so the prefix is no part of the identity.
    """

    name: str
    n_sequences: int
    n_tokens: int
    prefix: str = field(default="", compare=False)

    @property
    def path(self) -> str:
        """The prefix, or the name where the prefix is not known."""
        return self.prefix or self.name

    @property
    def content(self) -> dict[str, str | int]:
        """The values that hold wherever the files lie; part of fingerprints."""
        return {"name": self.name, "n_sequences": self.n_sequences, "n_tokens": self.n_tokens}

    def __str__(self) -> str:
        return f"{self.name} ({self.n_sequences} sequences, {self.n_tokens} tokens)"


def dataset_names(datasets: Sequence[DatasetIdentity]) -> list[str]:
    """Return a unique name for each dataset of a plan: namesakes are numbered, NAME#N."""
    return numbered([dataset.name for dataset in datasets])


@dataclass(frozen=True)
class Stratum:
    """A part of a dataset that has one weight.

    Attributes:
        name: unique in the plan; it keys the order of the stratum's samples, so that strata added
            or reordered in a later plan leave the others' order as it was.
        dataset: index into the plan's datasets.
        share: fraction of the dataset's samples; of a stratum of documents, its fraction of the
            tokens of the dataset's training documents that are not held out. The shares of one
            dataset sum to one.
    """

    name: str
    dataset: int
    share: float = 1.0


@dataclass(frozen=True)
class Cut:
    """The rule that divides a dataset into its strata.

    It divides samples, as Megatron packs them from the whole dataset, or documents, before any are
    packed together. Samples are ranked by their mean score, and the strata take their shares one
    after the other. Documents are divided by the values in `edges`.

    Attributes:
        scores: fingerprint of the document scores.
        order: the score: `learning-time`; `fall` or `target`, for documents alone; or, as a
            control, `frequency`: the mean surprisal of the tokens by their frequency alone.
        unlearned: whether the last stratum takes the samples most of whose tokens are never
            learned (by frequency: the highest surprisal), before the others are ranked.
        unit: the parts that are divided: packed samples, or documents before they are packed.
        edges: of documents: the least score of every stratum but the first, ascending. A document
            without a score lies in the first stratum.
        held_out: of documents: the number of each stratum that the training leaves out, for a
            probe set to watch; fewer in a stratum that has not twice as many.
    """

    scores: str
    order: Literal["learning-time", "frequency", "fall", "target"] = "learning-time"
    unlearned: bool = False
    unit: Literal["samples", "documents"] = "samples"
    edges: tuple[float, ...] = ()
    held_out: int = 0

    def __post_init__(self) -> None:
        # A fingerprint differs for 1 and 1.0.
        object.__setattr__(self, "edges", tuple(float(edge) for edge in self.edges))


@dataclass(frozen=True)
class Packing:
    """Documents that Megatron packs into samples together: one GPT dataset of the job.

    The strata of samples of a dataset share a packing of all its training documents. Every stratum
    of documents has its own, so that no sample mixes documents of two of them.

    Attributes:
        dataset: index into the plan's datasets.
        strata: the strata that draw from it.
        is_stratum: whether it holds the documents of one stratum alone.
    """

    dataset: int
    strata: range
    is_stratum: bool = False


@dataclass(frozen=True)
class Stage:
    """A stretch of consumed samples with constant weights, which ends where the next begins.

    Attributes:
        start: consumed samples at which the stage begins.
        weights: weight of each dataset, as in --data-path; they need not sum to one.
        within: weight of each stratum in its dataset; they need not sum to one either. None weighs
            the strata by their shares: every sample of a dataset is as likely as another.
    """

    start: int
    weights: tuple[float, ...]
    within: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Segment:
    """A stage whose weights are normalised: over the datasets, and within each dataset.

    Attributes:
        start: consumed samples at which the segment begins.
        weights: weight of each dataset; they sum to one.
        within: weight of each stratum in its dataset; those of one dataset sum to one.
    """

    start: int
    weights: tuple[float, ...]
    within: tuple[float, ...]

    def weighs_as(self, other: "Segment") -> bool:
        """Return whether the weights are those of another segment."""
        return (self.weights, self.within) == (other.weights, other.within)


@dataclass(frozen=True)
class Decision:
    """Weights of the datasets, and of the strata within them, decided while a job trains.

    Attributes:
        step: the probe step whose losses, and those before it, were used.
        start: consumed samples from which on the weights hold.
        weights: weight of each dataset of the plan.
        within: weight of each stratum in its dataset; None leaves the plan's own.

    Raises:
        ValueError: on construction, if the decision is for the first sample, whose weights are the
            plan's own.
    """

    step: int
    start: int
    weights: tuple[float, ...]
    within: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if self.step < 0 or self.start < 1:
            raise ValueError(
                f"a decision is of step {self.step}, from sample {self.start} on; expected step 0 "
                "or later, and sample 1 or later"
            )


@dataclass(frozen=True)
class Acceptance:
    """The place at which another plan took over under a run (`--tokscale-override-plan`).

    Attributes:
        at: consumed samples at which it took over.
        after: fingerprint of the plan that the run followed before.
        plan: fingerprint of the plan that the job was started with.
    """

    at: int
    after: str
    plan: str


@dataclass(frozen=True)
class Skip:
    """Samples of a stratum that are left out of the training from a sample on.

    All counts are frozen when the plan is made, so the order of the samples stays a function of the
    plan and k alone. `data/skips.py` has the rule.

    Attributes:
        start: consumed samples from which on they are left out.
        stratum: name of the stratum.
        samples: their numbers in the stratum's packing, ascending.
        first: draws from the stratum before `start`; only draws from this one on are replaced.
        end: draws from the stratum by the planned end of the training; the samples that take the
            places of those left out are drawn from this one on.
        order: the flags that, with the documents, determine which sample has which number.
    """

    start: int
    stratum: str
    samples: tuple[int, ...]
    first: int
    end: int
    order: str


@dataclass(frozen=True)
class Replanning:
    """The settings by which a job with `--tokscale-replan-interval` decides new weights.

    Attributes:
        base_weights: weight of each dataset without the plan; if empty, the weights of the plan's
            first stage.
        epoch_samples: training samples in one epoch of each dataset; empty if unknown.
        train_samples: samples consumed at the end of training; if None, read from the run.
        strength: exponent with which a dataset's weight follows its relative slope.
        floor: smallest weight of a dataset, as a fraction of its base weight.
        max_change: largest factor by which a weight grows or shrinks in one decision.
        stratum_samples: training samples in one epoch of each stratum; if empty, by the strata's
            shares in `epoch_samples`.
        share_limit: largest factor by which a dataset's share departs from its base share, either
            way, where strata are weighed; None for no limit.
    """

    base_weights: tuple[float, ...] = ()
    epoch_samples: tuple[int, ...] = ()
    train_samples: int | None = None
    strength: float = 1.0
    floor: float = FLOOR
    max_change: float = MAX_CHANGE
    stratum_samples: tuple[int, ...] = ()
    share_limit: float | None = None

    def __post_init__(self) -> None:
        # A fingerprint differs for 1 and 1.0.
        weights = tuple(float(weight) for weight in self.base_weights)
        object.__setattr__(self, "base_weights", weights)
        for name in ("strength", "floor", "max_change", "share_limit"):
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, float(value))


@dataclass(frozen=True)
class PlanSources:
    """The runs and scores that a plan was made from.

    Attributes:
        run: path of the run whose spectra gave the weights.
        reference: id of the reference run that the scores are of.
        time_map: path of the run whose learning order maps the training to the reference run.
        scores: fingerprint of each dataset's scores, by the dataset's name.
    """

    run: str | None = None
    reference: str | None = None
    time_map: str | None = None
    scores: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class PlanProvenance:
    """Origin of a plan, for people to read: no weight and no order depends on it.

    Attributes:
        policy: name of the policy.
        control: name of the control that the plan is instead of the policy, if it is one.
        sources: runs and scores that it was made from.
        settings: the policy's parameters by name.
        version: version of megatron-tokscale that made it.
    """

    policy: str = "unknown"
    control: str | None = None
    sources: PlanSources = field(default_factory=PlanSources)
    settings: Mapping[str, JSON] = field(default_factory=dict)
    version: str = ""
