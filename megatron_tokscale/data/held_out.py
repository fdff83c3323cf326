"""The documents that a plan keeps out of the training, read from its data and scores."""

from pathlib import Path
from typing import NamedTuple

from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.corpus.bin_idx import IndexedTokens, Portion
from megatron_tokscale.corpus.source import DataSource
from megatron_tokscale.data.document_strata import held_out_documents
from megatron_tokscale.data.match import match_datasets
from megatron_tokscale.data.plan import Plan
from megatron_tokscale.data.plan_scores import scores_of_plan
from megatron_tokscale.data.scores import identity_of


class HeldOut(NamedTuple):
    """Documents that a plan keeps out of the training.

    Attributes:
        portions: the documents of each stratum that has some, under the stratum's name.
        vocab_size: size of the vocabulary, as the plan's scores have it; None if not known.
    """

    portions: list[Portion]
    vocab_size: int | None


def held_out_of_plan(
    plan: Plan, scores_dir: Path | None, data: DataSource | None = None
) -> HeldOut:
    """Return the documents that the plan keeps out of the training.

    Args:
        plan: the plan.
        scores_dir: folder of the scores that the plan was made with; None: beside the data.
        data: the plan's data, where they are now; None: where they were when it was made.

    Raises:
        TokscaleError: the plan keeps no document out of the training, or its data or scores are
            missing or have changed.
    """
    prefixes = [dataset.path for dataset in plan.datasets]
    if data is not None:
        files = [portion.tokens for portion in data.portions("train")]
        order = match_datasets(plan, [identity_of(each) for each in files], plan.seq_length)
        for dataset, place in enumerate(order):
            if place is not None:
                prefixes[dataset] = files[place].prefix
    found: list[Portion] = []
    vocab_size = None
    for dataset, cut in enumerate(plan.cuts):
        if cut is not None and cut.held_out:
            portions, vocab_size = _of_dataset(plan, dataset, prefixes[dataset], scores_dir)
            found += portions
    if not found:
        raise TokscaleError(
            f"plan {plan.fingerprint} keeps no documents out of the training; expected some of "
            "each stratum; make it with `megatron-tokscale plan build` and --held-out"
        )
    return HeldOut(found, vocab_size)


def _of_dataset(plan: Plan, dataset: int, prefix: str, scores_dir: Path | None) -> HeldOut:
    identity, strata = plan.datasets[dataset], plan.strata_of(dataset)
    tokens = IndexedTokens.open(prefix)
    if identity_of(tokens) != identity:
        raise TokscaleError(
            f"{tokens.prefix} is {identity_of(tokens)}; expected {identity}, for which the plan "
            "was made; restore the data, or make the plan again"
        )
    start, stop = plan.documents[dataset]
    scores = scores_of_plan(plan, dataset, tokens.prefix, range(start, stop), scores_dir)
    documents = held_out_documents(plan, dataset, scores, (start, stop), tokens.lengths)
    portions = [
        Portion(tokens, range(start, stop), 1.0, plan.strata[z].name, chosen)
        for z, chosen in zip(strata, documents, strict=True)
        if (tokens.lengths[chosen] > 1).any()
    ]
    return HeldOut(portions, scores.details.vocab_size)
