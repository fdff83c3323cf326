"""Kinds of documents in the study's results: the scores of each, and how often a plan draws it.

The kinds come from the side file of the pool. No verb has seen them.

Shapes: D datasets, G kinds, N watched tokens, Q documents of a dataset, Z strata.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np

from megatron_tokscale.core.arrays import Floats, Integers
from megatron_tokscale.core.files import read_json
from megatron_tokscale.corpus.bin_idx import IndexedTokens
from megatron_tokscale.corpus.names import base_name
from megatron_tokscale.data import Cut, DocumentScores, Plan
from megatron_tokscale.data.document_strata import documents_of_strata
from megatron_tokscale.probe import ProbeSet


@dataclass(frozen=True, eq=False)
class Kinds:
    """The kind of each document.

    Attributes:
        names: names of the kinds.
        of_dataset: kind of each document, an index into `names`, by dataset.
    """

    names: tuple[str, ...]
    of_dataset: Mapping[str, Integers]

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read the side file of a pool: the names of the documents' kinds by dataset."""
        found = {name: np.array(kinds) for name, kinds in read_json(path).items()}
        names = np.unique(np.concatenate(list(found.values())))
        of_dataset = {name: np.searchsorted(names, kinds) for name, kinds in found.items()}
        return cls(tuple(names.tolist()), of_dataset)

    def of(self, probe_set: ProbeSet) -> Integers:
        """Return the kind of the document of each watched token, shape [N]."""
        datasets = [self.of_dataset[base_name(prefix)] for prefix in probe_set.prefixes]
        pairs = zip(probe_set.dataset_N, probe_set.document_N, strict=True)
        return np.array([datasets[d][document] for d, document in pairs])


@dataclass(frozen=True)
class OfKind:
    """Training documents of one kind.

    Attributes:
        documents: number of documents.
        tokens: their tokens.
        watched: documents that were watched.
        score: mean score by which the plan divides documents, in nats per token.
        weight: weight over share of the kind, averaged over the samples up to T.
    """

    documents: int
    tokens: int
    watched: int
    score: float
    weight: float


def what_is_drawn(
    plan: Plan, scores_D: Sequence[DocumentScores], kinds: Kinds, samples: int
) -> dict[str, OfKind]:
    """Return each kind's documents, scores and weights in the first `samples` of a plan."""
    n_kinds = len(kinds.names)
    documents_G, watched_G = np.zeros(n_kinds, int), np.zeros(n_kinds, int)
    tokens_G, score_G, drawn_G = np.zeros(n_kinds), np.zeros(n_kinds), np.zeros(n_kinds)
    target_Z = plan.target_Z(samples)
    for d, (dataset, scores) in enumerate(zip(plan.datasets, scores_D, strict=True)):
        kind_Q, score_Q = kinds.of_dataset[dataset.name], _score_Q(scores, plan.cuts[d])
        length_Q = IndexedTokens.open(dataset.path).lengths
        strata = documents_of_strata(plan, d, scores, plan.documents[d], length_Q)
        for z, trained in zip(plan.strata_of(d), strata, strict=True):
            kind, length = kind_Q[trained], length_Q[trained]
            stratum_tokens_G = np.bincount(kind, length, n_kinds)
            documents_G += np.bincount(kind, minlength=n_kinds)
            watched_G += np.bincount(kind, scores.watched_Q[trained] > 0, n_kinds).astype(int)
            tokens_G += stratum_tokens_G
            drawn_G += target_Z[z] * stratum_tokens_G / max(length.sum(), 1)
            score_G += np.bincount(kind, length * score_Q[trained], n_kinds)
    weight_G = drawn_G / drawn_G.sum() / np.maximum(tokens_G / tokens_G.sum(), 1e-12)
    return {
        kinds.names[g]: OfKind(
            int(documents_G[g]),
            int(tokens_G[g]),
            int(watched_G[g]),
            float(score_G[g] / tokens_G[g]),
            float(weight_G[g]),
        )
        for g in np.flatnonzero(tokens_G)
    }


def _score_Q(scores: DocumentScores, cut: Cut | None) -> Floats:
    """Return the score by which a plan divides documents; 0 for an empty document."""
    assert cut is not None, "the study's plans divide the documents of every dataset"
    return np.nan_to_num(scores.ordering_Q(cut.order))
