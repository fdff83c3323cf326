"""The strata of a dataset before a job runs: their names, shares, and statistics of samples.

Megatron's order of a dataset's samples is known in the job alone, where `data/strata.py` fills the
strata. Here the training documents are laid end to end in a random order of our own and cut into
samples as Megatron cuts them: other samples with the same statistics.

Shapes: Q documents of a dataset, P documents in the order of the stream, N samples, Z strata of the
dataset, E points in time.
"""

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Final

import numpy as np
from scipy.special import ndtr

from megatron_tokscale.core.arrays import Floats, Integers
from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.corpus.bin_idx import IndexedTokens, Portion
from megatron_tokscale.data.plan_parts import Cut
from megatron_tokscale.data.samples import SampleIndex, SampleScores
from megatron_tokscale.data.scores import DocumentScores, scores_file

MIN_SAMPLES: Final = 50  # least samples of a stratum; our choice: means over fewer are mostly noise
MIN_UNLEARNED: Final = 0.01  # least share of the samples for a separate stratum; our choice
MAX_SAMPLES: Final = 20_000  # most samples used per stratum; our choice: enough for the means

MIN_SPREAD: Final = 0.1
"""Smallest spread of a sample's drop, in ln(tokens): about the spacing of probes at 8 an octave
(0.087), below which a learning time is not resolved."""


@dataclass(frozen=True)
class CutSettings:
    """Settings by which datasets are cut into strata.

    Attributes:
        quantiles: number of strata of equal shares, by learning time; lower if a stratum would hold
            fewer than 50 samples.
        unlearned: samples with a larger share of never-learned tokens form their own stratum, if
            there are at least 50 of them and at least 1%.

    Raises:
        TokscaleError: on construction, if these are out of range.
    """

    quantiles: int = 8
    unlearned: float = 0.5

    def __post_init__(self) -> None:
        if self.quantiles < 1:
            raise TokscaleError(
                f"the number of quantiles is {self.quantiles}; expected 1 or more; give another "
                "--quantiles"
            )
        if not 0 < self.unlearned <= 1:
            raise TokscaleError(
                f"the share never learned is {self.unlearned:g}; expected a number above 0 and at "
                "most 1; give another --unlearned"
            )


@dataclass(frozen=True, eq=False)
class StratumSamples:
    """Some samples of a stratum, drawn at random, or all of them.

    Attributes:
        time_N: ln(consumed tokens of the reference run) at which each is learned; 0 for a sample
            without a drop.
        spread_N: standard deviation of the same over the sample's drop, at least `MIN_SPREAD`.
        drop_N: learnable drop in nats per token.
    """

    time_N: Floats
    spread_N: Floats
    drop_N: Floats

    def learned_by(self, x_E: Floats) -> Floats:
        """Return the mean drop in nats per token learned by x = ln(tokens) of the reference run.

        Each sample's drop is spread around its learning time as a normal distribution.
        """
        z_E = ((x - self.time_N) / self.spread_N for x in x_E)
        return np.array([float(np.mean(self.drop_N * ndtr(z_N))) for z_N in z_E])


@dataclass(frozen=True, eq=False)
class CutDataset:
    """A dataset and its strata, in the order of the cut.

    Attributes:
        names: names of the strata.
        shares: fraction of the dataset's samples in each stratum, summing to one.
        samples: samples of each stratum.
        settings: settings by which it was cut.
        cut: rule by which the job ranks the dataset's samples; None for a single stratum.
        n_samples: samples of the dataset in one epoch.
        reference: id of the reference run of the scores.
        x_range: ln(consumed tokens) of the reference run at its first and last probe.
        scores: fingerprint of the scores.
    """

    names: tuple[str, ...]
    shares: tuple[float, ...]
    samples: tuple[StratumSamples, ...]
    settings: CutSettings
    cut: Cut | None
    n_samples: int
    reference: str
    x_range: tuple[float, float]
    scores: str

    @property
    def bounds(self) -> Floats:
        """Bounds of the strata among the ranked samples, from 0 to 1."""
        return np.cumsum([0.0, *self.shares])

    def learned_by(self, x_E: Floats) -> Floats:
        """Return the drop in nats per token learned by x, one column per stratum."""
        return np.stack([samples.learned_by(x_E) for samples in self.samples], axis=1)


def read_scores(tokens: IndexedTokens, folder: Path | None = None) -> DocumentScores:
    """Read the scores of a dataset: beside its .bin/.idx, or in a folder.

    Raises:
        TokscaleError: they are missing, damaged, or made for other data.
    """
    path = scores_file(tokens, folder)
    if not path.is_file():
        raise TokscaleError(
            f"{path} is not there: score the data with `megatron-tokscale score`, or plan with "
            "`megatron-tokscale plan build dataset --run RUN`, which needs no scores"
        )
    scores = DocumentScores.load(path)
    scores.check(tokens)
    return scores


def lay_out(portion: Portion, seq_length: int, seed: int) -> SampleIndex:
    """Lay the documents of a part end to end in random order, and cut them as Megatron does.

    Raises:
        TokscaleError: the part has too few tokens for one sample.
    """
    document_P = portion.sequences.start + np.flatnonzero(portion.lengths)
    document_P = np.random.default_rng(seed).permutation(document_P)
    length_P = portion.tokens.lengths[document_P].astype(np.int64)
    stop_P = np.cumsum(length_P)
    n_samples = (portion.n_tokens - 1) // seq_length
    if n_samples < 1:
        raise TokscaleError(
            f"{portion.tokens.prefix} has not enough training tokens; expected one sample of "
            f"{seq_length} tokens at least; leave it out"
        )
    bound_N1 = seq_length * np.arange(n_samples + 1, dtype=np.int64)
    position_N1 = np.searchsorted(stop_P, bound_N1, side="right")
    offset_N1 = bound_N1 - (stop_P - length_P)[position_N1]
    return SampleIndex(
        portion.tokens.lengths,
        document_P,
        np.stack([position_N1, offset_N1], axis=1),
        np.arange(n_samples),
    )


def cut_dataset(
    name: str,
    portion: Portion,
    scores: DocumentScores,
    settings: CutSettings,
    seq_length: int,
    seed: int,
) -> CutDataset:
    """Cut the training part of a dataset into strata.

    Args:
        name: name of the dataset in the plan: its strata are NAME/q1, NAME/q2, ... and
            NAME/unlearned, or NAME alone.
        portion: the training part.
        scores: scores of the dataset.
        settings: number and kind of the strata.
        seq_length: sequence length in tokens.
        seed: seed of the random order, and of the draw of a stratum's samples.

    Raises:
        TokscaleError: a training document has no score, there are too few tokens for a sample, or
            the scores do not hold the range of their reference run.
    """
    x_range = _check_scores(portion, scores)
    sample_scores = SampleScores.from_document_scores(scores, lay_out(portion, seq_length, seed))
    n_samples = len(sample_scores.drop_N)
    n_quantiles, n_unlearned = _stratum_counts(sample_scores, settings)

    # Names and shares: quantiles of equal shares, then the stratum that is never learned.
    names = [f"{name}/q{q}" for q in range(1, n_quantiles + 1)]
    shares = [(n_samples - n_unlearned) / n_samples / n_quantiles] * n_quantiles
    if n_unlearned:
        names, shares = [*names, f"{name}/unlearned"], [*shares, n_unlearned / n_samples]

    # The samples of each stratum, by the rule that the job will follow.
    cut = Cut(scores.fingerprint, unlearned=n_unlearned > 0)
    bounds = np.rint(np.cumsum([0.0, *shares]) * n_samples).astype(np.int64)
    ranked = sample_scores.ranked(cut, n_unlearned)
    generator = np.random.default_rng(seed)
    is_whole = len(names) == 1
    return CutDataset(
        names=(name,) if is_whole else tuple(names),
        shares=tuple(shares),
        samples=tuple(
            _drawn_samples(sample_scores, ranked[start:stop], generator)
            for start, stop in pairwise(bounds)
        ),
        settings=settings,
        cut=None if is_whole else cut,
        n_samples=n_samples,
        reference=scores.details.reference,
        x_range=x_range,
        scores=scores.fingerprint,
    )


def _check_scores(portion: Portion, scores: DocumentScores) -> tuple[float, float]:
    """Return ln(consumed tokens) of the scores' reference run at its first and last probe.

    Raises:
        TokscaleError: a training document has no score, the scores have no learning times, or the
            range is not known.
    """
    part = slice(portion.sequences.start, portion.sequences.stop)
    missing = np.isnan(scores.require_fitted().drop_Q[part]) & (portion.lengths > 0)
    if missing.any():
        raise TokscaleError(
            f"{int(missing.sum())} of {missing.size} training documents of {portion.name} "
            f"have no score, the first is {part.start + int(np.argmax(missing))}; expected a score "
            "of each; score them without --no-predict"
        )
    if scores.details.log_tokens_range is None:
        raise TokscaleError(
            f"the scores of {portion.name} do not hold the range of their reference run; expected "
            f"its first and last tokens; make them again with `megatron-tokscale score`"
        )
    return scores.details.log_tokens_range


def _stratum_counts(scores: SampleScores, settings: CutSettings) -> tuple[int, int]:
    """Return the number of quantiles, and of samples in the stratum that is never learned."""
    n_samples = len(scores.drop_N)
    n_unlearned = int((scores.unlearned_N > settings.unlearned).sum())
    if n_unlearned < max(MIN_UNLEARNED * n_samples, MIN_SAMPLES):
        n_unlearned = 0
    n_quantiles = min(settings.quantiles, (n_samples - n_unlearned) // MIN_SAMPLES)
    return (n_quantiles, n_unlearned) if n_quantiles else (1, 0)


def _drawn_samples(
    scores: SampleScores, members: Integers, generator: np.random.Generator
) -> StratumSamples:
    """Return a stratum's samples; if they are more than 20,000, as many at random."""
    if members.size > MAX_SAMPLES:
        members = generator.choice(members, MAX_SAMPLES, replace=False)
    spread_N = np.maximum(np.nan_to_num(scores.spread_N[members]), MIN_SPREAD)
    time_N = np.nan_to_num(scores.learning_time_N[members])
    return StratumSamples(time_N, spread_N, scores.drop_N[members])
