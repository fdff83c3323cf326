"""Is this plan for this job's data? Yes, in this order; or one line that says why not."""

from collections.abc import Sequence

from megatron_tokscale.data.plan import DatasetIdentity, Plan
from megatron_tokscale.errors import TokscaleError


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
        has, and that is not drawn from after `consumed`. Twins (same name and sizes) are taken in
        the order they come.

    Raises:
        TokscaleError: the job trains on other data, or cuts it to another length.
    """
    if seq_length != plan.seq_length:
        raise TokscaleError(
            f"the plan is for sequence length {plan.seq_length}, the job's is {seq_length}; "
            "make a plan for this job"
        )
    left = dict(enumerate(found))
    order: list[int | None] = []
    last = plan.segments[-1].start
    is_drawn_D = plan.target_D(max(last, consumed) + 1) > plan.target_D(consumed)
    for dataset, is_drawn in zip(plan.datasets, is_drawn_D, strict=True):
        position = next((i for i, other in left.items() if other == dataset), None)
        if position is None and is_drawn:
            raise TokscaleError(_missing(dataset, list(left.values())))
        order.append(position)
        if position is not None:
            del left[position]
    if left:
        extra = ", ".join(str(dataset) for dataset in left.values())
        raise TokscaleError(f"the plan is for other data: it does not know {extra}")
    return order


def check_documents(
    plan: Plan, order: Sequence[int | None], found: Sequence[tuple[int, int]]
) -> None:
    """Refuse a job whose training part of a dataset is not that of the plan.

    Args:
        plan: the plan; one that does not know its training parts is let through.
        order: as `match_datasets` has found it.
        found: of each of the job's datasets the first document that it trains on, and the one
            after the last.

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
    shown = ", ".join(str(other) for other in named or candidates) or "no other dataset"
    return f"the plan is for other data: it has {dataset}, the job has {shown}"
