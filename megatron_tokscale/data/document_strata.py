"""The documents of each stratum of a dataset whose documents, not samples, a plan divides.

They follow from the plan and the scores alone, so that a probe set of the documents that the
training leaves out is built without the job.

Shapes: Q documents of a dataset (the sequences of its .idx file, all splits).
"""

from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_tokscale.core.arrays import Floats, Integers32
from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.data.permutation import epoch_permutation, stratum_key
from megatron_tokscale.data.plan import Plan
from megatron_tokscale.data.plan_parts import Cut
from megatron_tokscale.data.scores import DocumentScores

_ARRAYS: Final = {
    "learning-time": "learning_time_Q",
    "frequency": "surprisal_Q",
    "fall": "fall_Q",
    "target": "target_Q",
}
"""Array of a score file by the order of a cut."""


class _Members(NamedTuple):
    """The documents of a stratum, ascending: those of the training, and those left out of it."""

    trained: Integers32
    held_out: Integers32


def documents_of_strata(
    plan: Plan,
    dataset: int,
    scores: DocumentScores,
    documents: tuple[int, int],
    lengths_Q: NDArray[np.integer],
) -> list[Integers32]:
    """Return the documents that each stratum of a dataset trains on, ascending.

    Args:
        plan: the plan, which divides the dataset's documents.
        dataset: number of the dataset in the plan.
        scores: scores of the dataset's documents.
        documents: first document of the training part, and the one after its last.
        lengths_Q: tokens per document. Empty documents are in no stratum.

    Raises:
        TokscaleError: the scores lack the one that divides the documents.
    """
    return [found.trained for found in _members(plan, dataset, scores, documents, lengths_Q)]


def held_out_documents(
    plan: Plan,
    dataset: int,
    scores: DocumentScores,
    documents: tuple[int, int],
    lengths_Q: NDArray[np.integer],
) -> list[Integers32]:
    """Return the documents of each stratum that the training leaves out, ascending.

    They are drawn at random by the plan's seed and the stratum's name. Arguments and errors are
    those of `documents_of_strata`.
    """
    return [found.held_out for found in _members(plan, dataset, scores, documents, lengths_Q)]


def document_score(scores: DocumentScores, cut: Cut) -> Floats:
    """Return the score of each document that divides them by a cut.

    Raises:
        TokscaleError: the scores do not have it.
    """
    array = getattr(scores, _ARRAYS[cut.order], None)
    if array is None:
        raise TokscaleError(
            f"the scores of {scores.dataset.name} have no {cut.order}, which divides its documents "
            "in the plan; expected one of each document; score them by it with `megatron-tokscale "
            "score`, or make the plan by another score"
        )
    return np.asarray(array, dtype=np.float64)


def _members(
    plan: Plan,
    dataset: int,
    scores: DocumentScores,
    documents: tuple[int, int],
    lengths_Q: NDArray[np.integer],
) -> list[_Members]:
    cut = plan.cuts[dataset]
    assert cut is not None and cut.unit == "documents"
    start, stop = documents
    found = start + np.flatnonzero(lengths_Q[start:stop])
    score = np.nan_to_num(document_score(scores, cut)[found], nan=-np.inf)
    stratum = np.searchsorted(np.array(cut.edges), score, side="right")
    return [
        _split(found[stratum == place].astype(np.int32), plan, z)
        for place, z in enumerate(plan.strata_of(dataset))
    ]


def _split(documents: Integers32, plan: Plan, z: int) -> _Members:
    """Divide the documents of a stratum into those of the training and those held out."""
    stratum = plan.strata[z]
    cut = plan.cuts[stratum.dataset]
    assert cut is not None
    n_held_out = min(cut.held_out, len(documents) // 2)
    is_held_out = np.zeros(len(documents), np.bool_)
    if n_held_out:
        key = stratum_key(plan.seed, f"{stratum.name}/held-out")
        drawn = epoch_permutation(len(documents), key, 0).many(np.arange(n_held_out))
        is_held_out[drawn] = True
    return _Members(documents[~is_held_out], documents[is_held_out])
