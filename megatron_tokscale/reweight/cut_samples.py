"""Strata of samples, ranked by the learning times of their documents, before a job runs.

Megatron's order of a dataset's samples is known in the job alone, where `data/strata.py` fills the
strata. Here the training documents are laid end to end in a random order of our own and cut into
samples as Megatron cuts them: other samples with the same statistics.

Shapes: Q documents of a dataset, P documents in the order of the stream, N samples, Z strata.
"""

from itertools import pairwise
from typing import Final

import numpy as np

from megatron_tokscale.core.arrays import Floats, Floats32, Integers
from megatron_tokscale.corpus.bin_idx import Portion
from megatron_tokscale.data.plan_parts import Cut
from megatron_tokscale.data.samples import SampleIndex, SampleScores
from megatron_tokscale.data.scores import DocumentScores
from megatron_tokscale.reweight.cutting import (
    MIN_SAMPLES,
    CutDataset,
    CutSettings,
    LearningTimes,
    check_scored,
    samples_in,
    watched_share,
)

MIN_UNLEARNED: Final = 0.01  # least share of the samples for a separate stratum; our choice
MAX_SAMPLES: Final = 20_000  # most samples used per stratum; our choice: enough for the means


def lay_out(portion: Portion, seq_length: int, seed: int) -> SampleIndex:
    """Lay the documents of a part end to end in random order, and cut them as Megatron does.

    Raises:
        TokscaleError: the part has too few tokens for one sample.
    """
    document_P = portion.sequences.start + np.flatnonzero(portion.lengths)
    document_P = np.random.default_rng(seed).permutation(document_P)
    length_P = portion.tokens.lengths[document_P].astype(np.int64)
    stop_P = np.cumsum(length_P)
    n_samples = samples_in(portion, seq_length)
    bound_N1 = seq_length * np.arange(n_samples + 1, dtype=np.int64)
    position_N1 = np.searchsorted(stop_P, bound_N1, side="right")
    offset_N1 = bound_N1 - (stop_P - length_P)[position_N1]
    return SampleIndex(
        portion.tokens.lengths,
        document_P,
        np.stack([position_N1, offset_N1], axis=1),
        np.arange(n_samples),
    )


def cut_samples(
    name: str,
    portion: Portion,
    scores: DocumentScores,
    settings: CutSettings,
    seq_length: int,
    seed: int,
) -> CutDataset:
    """Cut the samples of a dataset's training part into strata NAME/q1, ... and NAME/unlearned.

    A single stratum is named NAME. Arguments as in `cut_dataset`; the seed is that of the random
    order, and of the draw of a stratum's samples.

    Raises:
        TokscaleError: a training document has no score, or there are too few tokens for a sample.
    """
    check_scored(portion, scores, "learning-time")
    index = lay_out(portion, seq_length, seed)
    sample_scores = SampleScores.from_document_scores(scores, index)
    n_samples = len(sample_scores.drop_N)
    n_quantiles, n_unlearned = _stratum_counts(sample_scores, settings)

    # Names and shares: quantiles of equal shares, then the stratum that is never learned.
    names = [f"{name}/q{q}" for q in range(1, n_quantiles + 1)]
    shares = [(n_samples - n_unlearned) / n_samples / n_quantiles] * n_quantiles
    if n_unlearned:
        names, shares = [*names, f"{name}/unlearned"], [*shares, n_unlearned / n_samples]

    # The samples of each stratum, by the rule that the job will follow.
    cut = Cut(scores.fingerprint, settings.by, unlearned=n_unlearned > 0)
    bounds = np.rint(np.cumsum([0.0, *shares]) * n_samples).astype(np.int64)
    ranked = sample_scores.ranked(cut, n_unlearned)
    strata = [ranked[start:stop] for start, stop in pairwise(bounds)]
    generator = np.random.default_rng(seed)
    is_whole = len(names) == 1
    return CutDataset(
        names=(name,) if is_whole else tuple(names),
        shares=tuple(shares),
        samples=tuple(len(members) for members in strata),
        documents=(0,) * len(names),
        held_out=(0,) * len(names),
        settings=settings,
        cut=None if is_whole else cut,
        details=scores.details,
        scores=scores.fingerprint,
        scored_tokens=int(scores.watched_Q.sum(dtype=np.int64)),
        watched_share=watched_share(portion, scores),
        learning_Z=tuple(_learning_times(sample_scores, each, generator) for each in strata),
        fall_Z=_means(scores.fall_Q, index, strata),
        target_Z=_means(scores.target_Q, index, strata),
    )


def _stratum_counts(scores: SampleScores, settings: CutSettings) -> tuple[int, int]:
    """Return the number of quantiles, and of samples in the stratum that is never learned."""
    n_samples = len(scores.drop_N)
    n_unlearned = int((scores.unlearned_N > settings.unlearned).sum())
    if n_unlearned < max(MIN_UNLEARNED * n_samples, MIN_SAMPLES):
        n_unlearned = 0
    n_quantiles = min(settings.n_quantiles, (n_samples - n_unlearned) // MIN_SAMPLES)
    return (n_quantiles, n_unlearned) if n_quantiles else (1, 0)


def _learning_times(
    scores: SampleScores, members: Integers, generator: np.random.Generator
) -> LearningTimes:
    """Return learning times of a stratum; of more than 20,000 samples as many at random."""
    if members.size > MAX_SAMPLES:
        members = generator.choice(members, MAX_SAMPLES, replace=False)
    return LearningTimes.from_scores(
        scores.learning_time_N[members],
        scores.spread_N[members],
        scores.drop_N[members],
        np.ones(members.size),
    )


def _means(value_Q: Floats32 | None, index: SampleIndex, strata: list[Integers]) -> Floats | None:
    """Return the mean over the samples of each stratum of a score of documents, if there is one."""
    if value_Q is None:
        return None
    sum_N = index.sum_over_labels(np.nan_to_num(value_Q).astype(np.float64))
    return np.array([sum_N[each].sum() / index.n_labels_N[each].sum() for each in strata])
