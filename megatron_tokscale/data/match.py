"""The check that a plan is for a job's data, and the order in which the job has the datasets."""

from collections.abc import Sequence

from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.corpus.names import listed, match_prefixes
from megatron_tokscale.data.plan import Plan
from megatron_tokscale.data.plan_parts import DatasetIdentity


def match_datasets(
    plan: Plan, found: Sequence[DatasetIdentity], seq_length: int, consumed: int = 0
) -> list[int | None]:
    """Find each dataset of the plan among those of the job, whatever their order.

    Args:
        plan: the plan.
        found: the job's training datasets.
        seq_length: the job's sequence length in tokens.
        consumed: samples that the job has consumed.

    Returns:
        For each dataset of the plan its position in `found`; None for one that the job no longer
        has, and that is not drawn from after `consumed`. Twins (same name and sizes) are told apart
        by their prefixes, and matched in order where the plan does not hold the prefixes. A dataset
        that the job has twice counts once.

    Raises:
        TokscaleError: the job trains on other data, or on sequences of another length, or its twins
            cannot be told apart.
    """
    if seq_length != plan.seq_length:
        raise TokscaleError(
            f"the plan is for sequence length {plan.seq_length}, the job's is {seq_length}; "
            "expected the same; make a plan for this job"
        )
    left = dict(enumerate(found))
    order = _same_content(plan.datasets, found)
    last = plan.segments[-1].start
    is_drawn_D = plan.target_D(max(last, consumed) + 1) > plan.target_D(consumed)
    for position in order:
        if position is not None:
            del left[position]
    for dataset, is_drawn, position in zip(plan.datasets, is_drawn_D, order, strict=True):
        if position is None and is_drawn:
            raise TokscaleError(_missing(dataset, list(left.values())))
    known = {found[position].prefix for position in order if position is not None}
    extra = [str(dataset) for dataset in left.values() if dataset.prefix not in known - {""}]
    if extra:
        raise TokscaleError(
            f"the plan is for other data: it lacks {listed(extra)}; make a plan for this job's data"
        )
    return order


def check_skipped_order(plan: Plan, orders_D: Sequence[str | None]) -> None:
    """Refuse a job whose samples are numbered otherwise than those that the plan leaves out.

    Args:
        plan: the plan.
        orders_D: for each dataset of the plan the flags of the job that determine the numbers of
            its samples; None for a dataset that the job does not draw from.

    Raises:
        TokscaleError: naming the dataset and the two orders.
    """
    dataset_of = {stratum.name: stratum.dataset for stratum in plan.strata}
    for skip in plan.skips:
        found = orders_D[dataset_of[skip.stratum]]
        if found is not None and found != skip.order:
            raise TokscaleError(
                f"the samples of {plan.datasets[dataset_of[skip.stratum]].name} that the plan "
                f"leaves out are numbered by {skip.order}, this job's by {found}; expected the "
                f"same; train with {skip.order}"
            )


def _same_content(
    datasets: Sequence[DatasetIdentity], found: Sequence[DatasetIdentity]
) -> list[int | None]:
    """Return the position of each dataset among those of its name and sizes; None if missing."""
    order: list[int | None] = [None] * len(datasets)
    for content in dict.fromkeys(datasets):
        wanted = [d for d, dataset in enumerate(datasets) if dataset == content]
        places = [i for i, dataset in enumerate(found) if dataset == content]
        mine, theirs = [datasets[d].prefix for d in wanted], [found[i].prefix for i in places]
        chosen: Sequence[int | None] = range(min(len(wanted), len(places)))
        if all([*mine, *theirs]) and max(len({*mine}), len({*theirs})) > 1:
            chosen = match_prefixes(mine, theirs, "the job")
        for d, k in zip(wanted, chosen, strict=False):
            order[d] = None if k is None else places[k]
    return order


def check_documents(
    plan: Plan, order: Sequence[int | None], found: Sequence[tuple[int, int]]
) -> None:
    """Refuse a job whose training part of a dataset is not that of the plan.

    Args:
        plan: the plan; a plan without its training parts passes.
        order: position in `found` of each dataset of the plan, by `match_datasets`.
        found: for each dataset of the job, the first document that it trains on and the one after
            the last.

    Raises:
        TokscaleError: naming the first such dataset.
    """
    for dataset, place, made_for in zip(plan.datasets, order, plan.documents, strict=False):
        if place is None:
            continue
        start, stop = found[place]
        if range(*made_for) != range(start, stop):  # two empty ranges are equal
            raise TokscaleError(
                f"the plan is for other data: its training part of {dataset.name} is documents "
                f"{made_for[0]} to {made_for[1]}, the job's is {start} to {stop}; give the job the "
                "plan's --split, or make a plan with the job's"
            )


def _missing(dataset: DatasetIdentity, candidates: list[DatasetIdentity]) -> str:
    named = [other for other in candidates if other.name == dataset.name]
    shown = listed([str(other) for other in named or candidates]) or "no other dataset"
    return (
        f"the plan is for other data: it has {dataset}, the job has {shown}; make a plan for this "
        "job's data"
    )
