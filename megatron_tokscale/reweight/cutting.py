"""A dataset in strata before a job runs: the names, shares and statistics of its strata.

`cut_samples.py` and `cut_documents.py` cut it; which one follows from the settings.

Shapes: Q documents of a dataset, N samples or documents of a stratum, Z strata of the dataset, E
points in time.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final, Literal

import numpy as np
from scipy.special import ndtr

from megatron_tokscale.core.arrays import Floats
from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.corpus.bin_idx import Portion
from megatron_tokscale.data.plan_parts import Cut
from megatron_tokscale.data.scores import DocumentScores, ScoreDetails

type Order = Literal["fall", "target", "learning-time", "frequency"]

MIN_SAMPLES: Final = 50  # least samples of a stratum; our choice: means over fewer are mostly noise

MIN_SPREAD: Final = 0.1
"""Smallest spread of a sample's drop, in ln(tokens): about the spacing of probes at 8 an octave
(0.087), below which a learning time is not resolved."""

QUANTILES: Final = {"samples": 8, "documents": 16}
"""Strata per dataset where no number is given. Our choice: documents, which are not averaged in
packing, differ more than samples, so that more strata are told apart."""


@dataclass(frozen=True)
class CutSettings:
    """Settings by which datasets are cut into strata.

    Attributes:
        quantiles: number of strata of about equal shares; lower if a stratum would hold fewer than
            50 samples. None: 16 of documents, 8 of samples.
        unlearned: of samples: those with a larger share of never-learned tokens form their own
            stratum, if there are at least 50 of them and at least 1%.
        unit: what a stratum holds: whole documents, or samples as Megatron packs them.
        by: score that ranks them. Samples are ranked by learning time or frequency alone.
        held_out: of documents: the number of each stratum that the training leaves out, for a
            probe set to watch.

    Raises:
        TokscaleError: on construction, if these are out of range or do not fit together.
    """

    quantiles: int | None = None
    unlearned: float = 0.5
    unit: Literal["samples", "documents"] = "samples"
    by: Order = "learning-time"
    held_out: int = 0

    def __post_init__(self) -> None:
        if self.n_quantiles < 1:
            raise TokscaleError(
                f"the number of quantiles is {self.n_quantiles}; expected 1 or more; give another "
                "--quantiles"
            )
        if not 0 < self.unlearned <= 1:
            raise TokscaleError(
                f"the share never learned is {self.unlearned:g}; expected a number above 0 and at "
                "most 1; give another --unlearned"
            )
        if self.held_out < 0:
            raise TokscaleError(
                f"the number of documents held out is {self.held_out}; expected 0 or more; give "
                "another --held-out"
            )
        if self.unit == "samples" and (self.by in ("fall", "target") or self.held_out):
            found = f"ranked by {self.by}" if self.by in ("fall", "target") else "held out"
            raise TokscaleError(
                f"samples are {found}; expected samples ranked by learning time or frequency, none "
                "of them held out; give --strata documents"
            )

    @property
    def n_quantiles(self) -> int:
        """Number of strata of about equal shares."""
        return QUANTILES[self.unit] if self.quantiles is None else self.quantiles


@dataclass(frozen=True, eq=False)
class LearningTimes:
    """Learning times of a stratum's samples or documents: of all of them, or of some at random.

    Attributes:
        time_N: ln(consumed tokens of the reference run) at which each is learned; 0 for one
            without a drop.
        spread_N: standard deviation of the same over its drop, at least `MIN_SPREAD`.
        drop_N: learnable drop in nats per token.
        tokens_N: tokens of each, by which the mean is weighted.
    """

    time_N: Floats
    spread_N: Floats
    drop_N: Floats
    tokens_N: Floats

    @classmethod
    def from_scores(
        cls, time_N: Floats, spread_N: Floats, drop_N: Floats, tokens_N: Floats
    ) -> "LearningTimes":
        """Return learning times without NaN, and with spreads that probes can resolve."""
        spread_N = np.maximum(np.nan_to_num(spread_N), MIN_SPREAD)
        return cls(np.nan_to_num(time_N), spread_N, drop_N, tokens_N)

    def learned_by(self, x_E: Floats) -> Floats:
        """Return the mean drop in nats per token learned by x = ln(tokens) of the reference run.

        Each one's drop is spread around its learning time as a normal distribution.
        """
        z_E = ((x - self.time_N) / self.spread_N for x in x_E)
        mass_N = self.drop_N * self.tokens_N / self.tokens_N.sum()
        return np.array([float(mass_N @ ndtr(z_N)) for z_N in z_E])


@dataclass(frozen=True, eq=False)
class CutDataset:
    """A dataset and its strata, in the order of the cut.

    Attributes:
        names: names of the strata.
        shares: fraction of the dataset's samples, or of its documents' tokens, in each stratum,
            summing to one.
        samples: training samples in one epoch of each stratum.
        documents: documents of each stratum; of samples: 0.
        held_out: documents of each stratum that the training leaves out.
        settings: settings by which it was cut.
        cut: rule by which the job divides the dataset; None for a single stratum of samples.
        details: origin of the scores.
        scores: fingerprint of the scores.
        scored_tokens: tokens that the reference run has scored.
        watched_share: share of the training tokens in documents with a score of their own.
        learning_Z: learning times of each stratum; None where the scores have none.
        fall_Z: mean fall of each stratum in nats per token; None where the scores have none.
        target_Z: mean target score likewise.
    """

    names: tuple[str, ...]
    shares: tuple[float, ...]
    samples: tuple[int, ...]
    documents: tuple[int, ...]
    held_out: tuple[int, ...]
    settings: CutSettings
    cut: Cut | None
    details: ScoreDetails
    scores: str
    scored_tokens: int
    watched_share: float
    learning_Z: tuple[LearningTimes, ...] | None = None
    fall_Z: Floats | None = None
    target_Z: Floats | None = None

    @property
    def n_samples(self) -> int:
        """Training samples in one epoch of the dataset."""
        return sum(self.samples)

    @property
    def bounds(self) -> Floats:
        """Bounds of the strata among the ranked samples or documents, from 0 to 1."""
        return np.cumsum([0.0, *self.shares])

    def learned_by(self, x_E: Floats) -> Floats:
        """Return the drop in nats per token learned by x, one column per stratum.

        Raises:
            TokscaleError: the scores have no learning times.
        """
        if self.learning_Z is None:
            raise self.missing("learning times", "a reference run that is fitted")
        return np.stack([times.learned_by(x_E) for times in self.learning_Z], axis=1)

    @property
    def log_tokens_range(self) -> tuple[float, float]:
        """ln(consumed tokens) of the reference run at its first and last probe.

        Raises:
            TokscaleError: the scores do not hold it.
        """
        if self.details.log_tokens_range is None:
            raise self.missing("first and last tokens of their reference run", "a fitted run")
        return self.details.log_tokens_range

    def missing(self, what: str, source: str) -> TokscaleError:
        """Return the error about something that the scores of the dataset do not hold."""
        name = self.names[0].rpartition("/")[0] or self.names[0]
        return TokscaleError(
            f"the scores of {name} have no {what}; expected some; make them again with "
            f"`megatron-tokscale score` from {source}"
        )


def check_scored(portion: Portion, scores: DocumentScores, order: str) -> None:
    """Refuse scores that a training document lacks.

    Args:
        portion: the training part.
        scores: scores of the dataset.
        order: the score that documents need: an order of a cut. One without a learning time has
            learned nothing; it needs a drop.

    Raises:
        TokscaleError: naming the first document without a score.
    """
    value_Q = (
        scores.require_fitted().drop_Q if order == "learning-time" else scores.ordering_Q(order)
    )
    part = slice(portion.sequences.start, portion.sequences.stop)
    missing = np.isnan(value_Q[part]) & (portion.lengths > 0)
    if not missing.any():
        return
    scored = scores.details.train_documents
    if scored and (part.start < scored[0] or part.stop > scored[1]):
        raise TokscaleError(
            f"the scores of {portion.name} are of training documents {scored[0]} to {scored[1]}, "
            f"the data have {part.start} to {part.stop}; expected scores of all; give --split as "
            "`megatron-tokscale score` had it, or score the data again"
        )
    raise TokscaleError(
        f"{int(missing.sum())} of {missing.size} training documents of {portion.name} "
        f"have no score, the first is {part.start + int(np.argmax(missing))}; expected a score "
        "of each; score them without --no-predict"
    )


def samples_in(portion: Portion, seq_length: int) -> int:
    """Return the samples of a training part in one epoch.

    Raises:
        TokscaleError: the part has too few tokens for one.
    """
    n_samples = (portion.n_tokens - 1) // seq_length
    if n_samples < 1:
        raise TokscaleError(
            f"{portion.tokens.prefix} has not enough training tokens; expected one sample of "
            f"{seq_length} tokens at least; leave it out"
        )
    return n_samples


def watched_share(portion: Portion, scores: DocumentScores) -> float:
    """Return the share of the training tokens in documents with a score of their own."""
    is_watched = scores.watched_Q[portion.sequences.start : portion.sequences.stop] > 0
    return float(portion.lengths[is_watched].sum(dtype=np.int64) / portion.n_tokens)


def strata_slices(datasets: Sequence[CutDataset]) -> list[slice]:
    """Return the slice of each dataset's strata among those of all datasets."""
    stops = np.cumsum([len(dataset.names) for dataset in datasets]).tolist()
    return [slice(a, b) for a, b in pairwise([0, *stops])]
