"""The score files of a plan: those by which it divides its datasets."""

from pathlib import Path

import numpy as np

from megatron_tokscale.core.arrays import Integers32
from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.corpus.bin_idx import IndexedTokens
from megatron_tokscale.data.plan import Plan
from megatron_tokscale.data.scores import DocumentScores, read_scores, scores_file


def scores_of_plan(
    plan: Plan,
    dataset: int,
    prefix: str,
    documents: Integers32 | range,
    folder: Path | None,
) -> DocumentScores:
    """Read the scores by which the plan cuts a dataset.

    Args:
        plan: the plan.
        dataset: number of the dataset in the plan.
        prefix: prefix of the dataset's .bin/.idx.
        documents: the documents that the job trains on.
        folder: folder of the scores; None: beside the data.

    Raises:
        TokscaleError: the scores are missing, of other data, or not those of the plan.
    """
    cut = plan.cuts[dataset]
    assert cut is not None
    tokens = IndexedTokens.open(prefix)
    scores = read_scores(tokens, folder)
    if scores.fingerprint != cut.scores:
        raise TokscaleError(
            f"the plan was made with scores {cut.scores} of {tokens.name}, "
            f"{scores_file(tokens, folder)} holds {scores.fingerprint}; make the plan "
            "again, or restore the scores"
        )
    score_Q = scores.ordering_Q(cut.order)
    if cut.order == "learning-time":  # NaN too where nothing is learned
        score_Q = scores.require_fitted().drop_Q
    indices = np.asarray(documents)
    if np.isnan(score_Q[indices[tokens.lengths[indices] > 0]]).any():
        raise TokscaleError(
            f"{scores_file(tokens, folder)} has no score for some training documents; is --split "
            "that of the scores?"
        )
    return scores
