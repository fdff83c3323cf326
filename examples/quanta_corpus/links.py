"""Links between the truth and what a plan gains: which of them loses how much.

To first order a plan's gain is a covariance over documents: ln(speed-up) = Cov(omega, lambda), with
omega the weight of a document relative to the mean, averaged over the training, and lambda its own
fall relative to the mean. Here each document's true fall is known from its kind and its facts, so
the gain can be computed link by link: with perfect weights, with weights per stratum, with scores
in the place of the truth, with the policy's power and floor. What is left is what a first-order
formula does not see: documents that are drawn more often are learned, and others are forgotten.

Shapes: F facts, G kinds, Q documents, Z strata, N watched tokens.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

import numpy as np
from quanta_corpus.corpus import NO_FACT, Truth, WatchedTruth, World

from megatron_tokscale.core.arrays import Floats, Integers
from megatron_tokscale.corpus.bin_idx import IndexedTokens
from megatron_tokscale.data import DocumentScores, Plan
from megatron_tokscale.data.document_strata import documents_of_strata
from megatron_tokscale.reweight.by_score import STRENGTH

_BINS: Final = 24
"""Bins of facts by frequency, with equally many watched tokens, that share a mean fall. Our choice:
2,000 tokens of the full study in each, whose mean has an error of a few hundredths of a nat."""


@dataclass(frozen=True, eq=False)
class TrueFalls:
    """Falls between two steps of the reference run, in nats per token, without sampling noise.

    Attributes:
        kind_G: mean fall of the documents of each kind.
        document_Q: fall of each document of the corpus: that of its facts, by their frequencies,
            and the mean of its kind for all other tokens.
    """

    kind_G: Floats
    document_Q: Floats


def true_falls(world: World, watched: WatchedTruth, fall_N: Floats, truth: Truth) -> TrueFalls:
    """Return the true falls, from many watched documents of every kind.

    Args:
        world: the corpus.
        watched: truth about the watched tokens; every kind is among their documents.
        fall_N: fall of the loss of each watched token, in nats.
        truth: truth about the documents of the corpus.
    """
    kinds = range(world.n_kinds)
    is_fact_N = watched.fact_N != NO_FACT
    kind_G = _means(fall_N, watched.kind_N, kinds)
    other_G = _means(fall_N[~is_fact_N], watched.kind_N[~is_fact_N], kinds)
    frequency_N = world.frequency_F[watched.fact_N[is_fact_N]]
    edges = np.quantile(frequency_N, np.linspace(0, 1, _BINS + 1)[1:-1])
    bin_N, bin_F = (np.searchsorted(edges, p) for p in (frequency_N, world.frequency_F))
    fall_F = _means(fall_N[is_fact_N], bin_N, range(_BINS))[bin_F]
    of_facts_Q = np.where(truth.fact_QT == NO_FACT, 0.0, fall_F[truth.fact_QT]).sum(axis=1)
    n_facts_Q = (truth.fact_QT != NO_FACT).sum(axis=1)
    n_tokens = world.length - 1  # the header is not predicted
    others_Q = (n_tokens - n_facts_Q) * other_G[truth.kind_Q]
    return TrueFalls(kind_G, (of_facts_Q + others_Q) / n_tokens)


def _means(value_N: Floats, group_N: Integers, groups: range) -> Floats:
    """Return the mean value of each group; the overall mean for a group without a value."""
    count = np.bincount(group_N, minlength=len(groups))
    total = np.bincount(group_N, value_N, minlength=len(groups))
    return np.where(count > 0, total / np.maximum(count, 1), value_N.mean())


def log_speedup(weight_Q: Floats, fall_Q: Floats) -> float:
    """Return ln(speed-up) = Cov(omega, lambda) of weights and true falls, to first order."""
    return float(np.mean(weight_Q / weight_Q.mean() * (fall_Q / fall_Q.mean())) - 1)


def by_stratum(value_Q: Floats, stratum_Q: Integers) -> Floats:
    """Return the mean of a document's stratum in the place of its own value."""
    total_Z, count_Z = np.bincount(stratum_Q, value_Q), np.bincount(stratum_Q)
    return (total_Z / np.maximum(count_Z, 1))[stratum_Q]


def quantile_strata(value_Q: Floats, n_strata: int) -> Integers:
    """Return strata of documents of equal number, by ascending value."""
    rank_Q = np.argsort(np.argsort(value_Q, kind="stable"), kind="stable")
    return rank_Q * n_strata // len(value_Q)


@dataclass(frozen=True, eq=False)
class Drawn:
    """The training documents that a plan draws from.

    Attributes:
        document_Q: the documents.
        stratum_Q: the stratum of each.
        weight_Q: weight of its stratum over its share, averaged over the samples up to T.
    """

    document_Q: Integers
    stratum_Q: Integers
    weight_Q: Floats

    @classmethod
    def by(cls, plan: Plan, scores: DocumentScores, prefix: Path, samples: int) -> Self:
        """Return the documents that the first `samples` of a plan of one dataset are drawn from."""
        lengths_Q = IndexedTokens.open(str(prefix)).lengths
        strata = documents_of_strata(plan, 0, scores, plan.documents[0], lengths_Q)
        stratum_Q = np.repeat(np.arange(plan.n_strata), [len(stratum) for stratum in strata])
        weight_Z = plan.target_Z(samples) / samples / plan.share_Z
        return cls(np.concatenate(strata), stratum_Q, weight_Z[stratum_Q])


def links(drawn: Drawn, falls: TrueFalls, kind_Q: Integers, score_Q: Floats) -> dict[str, float]:
    """Return ln(speed-up) to first order; each entry has one link more than the one before it.

    Args:
        drawn: the documents that the plan of the policy `fall` draws from.
        falls: the true falls.
        kind_Q: the kind of each document of the corpus.
        score_Q: the score of each document of the corpus.
    """
    true_Q, score_Q = falls.document_Q[drawn.document_Q], score_Q[drawn.document_Q]
    of_kind_Q = falls.kind_G[kind_Q[drawn.document_Q]]
    n_strata = int(drawn.stratum_Q.max()) + 1
    in_strata_Q = by_stratum(score_Q, drawn.stratum_Q)
    weights = {
        "each document by its own true fall": true_Q,
        "each kind by its true fall": of_kind_Q,
        "as many strata as the plan has, cut by the true fall": by_stratum(
            true_Q, quantile_strata(true_Q, n_strata)
        ),
        "the plan's strata, cut by the scores": by_stratum(true_Q, drawn.stratum_Q),
        "weighted by their mean scores": in_strata_Q,
        f"to the power {STRENGTH:g}": np.maximum(in_strata_Q, 0.0) ** STRENGTH,
        "with the floor, and from 5% of the training on: the plan": drawn.weight_Q,
    }
    return {name: log_speedup(weight_Q, true_Q) for name, weight_Q in weights.items()}
