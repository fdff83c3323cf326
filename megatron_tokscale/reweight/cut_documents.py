"""Strata of documents: quantiles by tokens of a score, so that packing averages nothing away.

Shapes: P training documents of a dataset that are not empty, Z strata.
"""

import numpy as np

from megatron_tokscale.core.arrays import Floats, Floats32, Integers, Integers32
from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.corpus.bin_idx import Portion
from megatron_tokscale.data.document_strata import documents_of_strata, held_out_documents
from megatron_tokscale.data.plan import Plan
from megatron_tokscale.data.plan_parts import Cut, Stage, Stratum
from megatron_tokscale.data.scores import DocumentScores, identity_of
from megatron_tokscale.reweight.cutting import (
    MIN_SAMPLES,
    CutDataset,
    CutSettings,
    LearningTimes,
    check_scored,
    samples_in,
    watched_share,
)


def cut_documents(
    name: str,
    portion: Portion,
    scores: DocumentScores,
    settings: CutSettings,
    seq_length: int,
    seed: int,
) -> CutDataset:
    """Cut the documents of a dataset's training part into strata NAME/q1, ..., by ascending score.

    Arguments as in `cut_dataset`.

    Raises:
        TokscaleError: a training document has no score, or a stratum has too few tokens for a
            sample.
    """
    check_scored(portion, scores, settings.by)
    document_P = portion.sequences.start + np.flatnonzero(portion.lengths)
    length_P = portion.tokens.lengths[document_P].astype(np.int64)
    samples_in(portion, seq_length)
    score_P = scores.ordering_Q(settings.by)[document_P].astype(np.float64)
    least = MIN_SAMPLES * seq_length + 1
    edges = quantile_edges(score_P, length_P, settings.n_quantiles, least)
    cut = Cut(
        scores.fingerprint, settings.by, unit="documents", edges=edges, held_out=settings.held_out
    )
    names = [f"{name}/q{q}" for q in range(1, len(edges) + 2)]

    # The documents of each stratum, by the rule that the job will follow.
    part = portion.sequences.start, portion.sequences.stop
    alone = Plan(
        datasets=(identity_of(portion.tokens),),
        strata=tuple(Stratum(each, 0, 1 / len(names)) for each in names),
        stages=(Stage(0, (1.0,)),),
        seq_length=seq_length,
        seed=seed,
        cuts=(cut,),
        documents=(part,),
    )
    strata, held_out = (
        divide(alone, 0, scores, part, portion.tokens.lengths)
        for divide in (documents_of_strata, held_out_documents)
    )
    tokens_Z = np.array([portion.tokens.lengths[each].sum(dtype=np.int64) for each in strata])
    if (short_Z := tokens_Z <= seq_length).any():
        raise TokscaleError(
            f"stratum {names[int(np.argmax(short_Z))]} has {tokens_Z.min()} tokens without the "
            f"documents held out; expected more than {seq_length}; lower --held-out"
        )
    return CutDataset(
        names=tuple(names),
        shares=tuple((tokens_Z / tokens_Z.sum()).tolist()),
        samples=tuple(((tokens_Z - 1) // seq_length).tolist()),
        documents=tuple(len(each) for each in strata),
        held_out=tuple(len(each) for each in held_out),
        settings=settings,
        cut=cut,
        details=scores.details,
        scores=scores.fingerprint,
        scored_tokens=int(scores.watched_Q.sum(dtype=np.int64)),
        watched_share=watched_share(portion, scores),
        learning_Z=_learning_times(scores, strata, portion.tokens.lengths),
        fall_Z=_means(scores.fall_Q, strata, portion.tokens.lengths),
        target_Z=_means(scores.target_Q, strata, portion.tokens.lengths),
    )


def quantile_edges(
    score_P: Floats, length_P: Integers, n_quantiles: int, least: int
) -> tuple[float, ...]:
    """Return the scores at which strata of about equal numbers of tokens begin, but the first.

    Documents of equal scores stay together: an edge lies where the score changes, as near to its
    quantile as that allows. So strata may differ in size, and there may be fewer.

    Args:
        score_P: scores; a document without one comes first.
        length_P: tokens per document.
        n_quantiles: number of strata at most.
        least: least tokens of a stratum.
    """
    score_P = np.nan_to_num(score_P, nan=-np.inf)
    order = np.argsort(score_P, kind="stable")
    score_P, before_P = score_P[order], np.cumsum(length_P[order]) - length_P[order]
    total = int(length_P.sum())

    # The places at which the score changes: their scores, and the tokens before them.
    changes = 1 + np.flatnonzero(score_P[1:] > score_P[:-1])
    n_strata = min(n_quantiles, total // least) if changes.size else 1
    edges, stop = [], 0
    for quantile in range(1, n_strata):
        due = total * quantile / n_strata
        above = min(int(np.searchsorted(before_P[changes], due)), changes.size - 1)
        near = min(max(above - 1, 0), above, key=lambda at: abs(before_P[changes[at]] - due))
        place = changes[near]
        if before_P[place] - stop >= least and total - before_P[place] >= least:
            edges.append(float(score_P[place]))
            stop = int(before_P[place])
    return tuple(edges)


def _learning_times(
    scores: DocumentScores, strata: list[Integers32], lengths_Q: Integers32
) -> tuple[LearningTimes, ...] | None:
    if (fitted := scores.fitted) is None:
        return None
    return tuple(
        LearningTimes.from_scores(
            fitted.learning_time_Q[each].astype(np.float64),
            fitted.spread_Q[each].astype(np.float64),
            np.nan_to_num(fitted.drop_Q[each].astype(np.float64)),
            lengths_Q[each].astype(np.float64),
        )
        for each in strata
    )


def _means(
    value_Q: Floats32 | None, strata: list[Integers32], lengths_Q: Integers32
) -> Floats | None:
    """Return the mean of a score over the tokens of each stratum, if there is such a score."""
    if value_Q is None:
        return None
    return np.array(
        [np.average(np.nan_to_num(value_Q[each]), weights=lengths_Q[each]) for each in strata],
        dtype=np.float64,
    )
