"""The checks that the parts of a plan fit together; a plan runs them when it is made or read."""

import math
from collections import Counter
from typing import TYPE_CHECKING, Final

import numpy as np

from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.data.plan_parts import Cut, Stage

if TYPE_CHECKING:
    from megatron_tokscale.data.plan import Plan

MAX_STRATA: Final = 32766
"""The largest number of strata: Megatron's blending index is int16."""

_SHARES_TOLERANCE: Final = 1e-6
"""Shares may be off by this much from summing to one: decimal digits in JSON lose less."""

_ORDERS: Final = {
    "samples": ("learning-time", "frequency"),
    "documents": ("learning-time", "frequency", "fall", "target"),
}
"""Scores that can divide each unit. A mean of falls over packed documents is of no use: packing
averages away what the strata are to tell apart."""


def check_plan(plan: "Plan") -> None:
    """Refuse a plan whose parts do not fit together.

    Raises:
        TokscaleError: naming the first part that is wrong.
    """
    _check_strata(plan)
    _check_cuts(plan)
    _check_documents(plan)
    _check_stages(plan)
    _check_replanning(plan)
    _check_skips(plan)
    if plan.seq_length < 1:
        raise _misfit(f"the plan's sequence length is {plan.seq_length}; expected 1 token or more")
    if plan.max_epochs is not None and not plan.max_epochs > 0:
        raise _misfit(f"the plan's limit on epochs is {plan.max_epochs}; expected a number above 0")


def _misfit(fault: str) -> TokscaleError:
    return TokscaleError(f"{fault}; make the plan again")


def _check_strata(plan: "Plan") -> None:
    if not 1 <= plan.n_strata <= MAX_STRATA:
        raise _misfit(f"the plan has {plan.n_strata} strata; expected 1 to {MAX_STRATA}")
    name, count = Counter(stratum.name for stratum in plan.strata).most_common(1)[0]
    if count > 1:
        raise _misfit(f"{count} strata of the plan are named {name!r}; expected unique names")
    for stratum in plan.strata:
        if not 0 <= stratum.dataset < len(plan.datasets):
            raise _misfit(
                f"stratum {stratum.name!r} of the plan is of dataset {stratum.dataset}; expected "
                f"a number below {len(plan.datasets)}, counted from 0"
            )
        if not 0 <= stratum.share <= 1:
            raise _misfit(
                f"the share of stratum {stratum.name!r} of the plan is {stratum.share}; expected "
                "0 to 1"
            )
    if (
        sorted({*plan.dataset_Z.tolist()}) != list(range(len(plan.datasets)))
        or (np.diff(plan.dataset_Z) < 0).any()
    ):
        raise _misfit(
            f"the strata of the plan are of datasets {plan.dataset_Z.tolist()}; expected them "
            "dataset by dataset, at least one of each"
        )
    share_D = np.bincount(plan.dataset_Z, plan.share_Z)
    if (np.abs(share_D - 1) > _SHARES_TOLERANCE).any():
        raise _misfit(
            f"the shares of the plan's strata sum to {share_D.tolist()}; expected 1 for each "
            "dataset"
        )


def _check_cuts(plan: "Plan") -> None:
    if len(plan.cuts) != len(plan.datasets):
        raise _misfit(
            f"the plan has {len(plan.cuts)} cuts; expected {len(plan.datasets)}, one for each "
            "dataset"
        )
    for dataset, cut in enumerate(plan.cuts):
        name, n_strata = plan.datasets[dataset].name, len(plan.strata_of(dataset))
        if cut is None and n_strata > 1:
            raise _misfit(
                f"the plan has no cut for {name}; expected one that divides it into {n_strata} "
                "strata"
            )
        if cut is not None:
            _check_cut(plan, cut, name, n_strata)


def _check_cut(plan: "Plan", cut: Cut, name: str, n_strata: int) -> None:
    orders = _ORDERS.get(cut.unit)
    if orders is None:
        raise _misfit(
            f"the plan divides {name} by {cut.unit!r}; expected one of {', '.join(_ORDERS)}"
        )
    if cut.order not in orders:
        raise _misfit(
            f"the plan ranks {name} by {cut.order!r}; expected one of {', '.join(orders)} for "
            f"strata of {cut.unit}"
        )
    if cut.unit == "samples":
        if cut.edges or cut.held_out:
            raise _misfit(
                f"the plan cuts {name} by samples and has {len(cut.edges)} edges of scores and "
                f"{cut.held_out} documents to hold out; expected these for documents alone"
            )
        return
    if len(cut.edges) != n_strata - 1:
        raise _misfit(
            f"the plan has {len(cut.edges)} edges of scores for the {n_strata} strata of {name}; "
            f"expected {n_strata - 1}, one between each stratum and the next"
        )
    if not np.isfinite(cut.edges).all() or (np.diff(cut.edges) <= 0).any():
        raise _misfit(
            f"the edges of the plan's strata of {name} are {list(cut.edges)}; expected finite "
            "numbers that ascend"
        )
    if cut.held_out < 0:
        raise _misfit(
            f"the plan holds {cut.held_out} documents out of each stratum of {name}; expected 0 or "
            "more"
        )
    if cut.unlearned:
        raise _misfit(
            f"the plan has a stratum of never-learned documents of {name}; expected one of samples "
            "alone"
        )
    if not plan.documents:
        raise _misfit(
            f"the plan divides the documents of {name}, and its training part is not known; "
            "expected the training part of each dataset"
        )


def _check_documents(plan: "Plan") -> None:
    if plan.documents and len(plan.documents) != len(plan.datasets):
        raise _misfit(
            f"the plan has {len(plan.documents)} training parts for {len(plan.datasets)} datasets; "
            "expected one of each"
        )
    for dataset, (start, stop) in zip(plan.datasets, plan.documents, strict=False):
        if not 0 <= start <= stop <= dataset.n_sequences:
            raise _misfit(
                f"the training part of {dataset.name} in the plan is documents {start} to {stop}; "
                f"expected a part of its {dataset.n_sequences}"
            )


def _check_replanning(plan: "Plan") -> None:
    settings = plan.replanning
    for values, name, count, part in (
        (settings.base_weights, "base weights", len(plan.datasets), "dataset"),
        (settings.epoch_samples, "numbers of samples in an epoch", len(plan.datasets), "dataset"),
        (settings.stratum_samples, "numbers of samples in an epoch", plan.n_strata, "stratum"),
    ):
        if values and len(values) != count:
            raise _misfit(
                f"the plan's replanning has {len(values)} {name}; expected {count}, one for each "
                f"{part}"
            )
        if values and not (all(value >= 0 for value in values) and 0 < sum(values) < math.inf):
            raise _misfit(
                f"the {name} of the plan's replanning are {list(values)}; expected 0 or more, "
                "finite, and not all 0"
            )
    if settings.train_samples is not None and settings.train_samples < 1:
        raise _misfit(
            f"the plan's replanning is for {settings.train_samples} samples; expected 1 or more"
        )
    if not (
        0 <= settings.strength < math.inf and 0 < settings.floor <= 1 and settings.max_change > 1
    ):
        raise _misfit(
            f"the plan's replanning has strength {settings.strength:g}, floor {settings.floor:g} "
            f"and change {settings.max_change:g}; expected 0 or more, above 0 and at most 1, and "
            "above 1"
        )
    if settings.share_limit is not None and not settings.share_limit >= 1:
        raise _misfit(
            f"the plan's replanning has a limit of {settings.share_limit:g} on shares; expected a "
            "factor of 1 or more"
        )


def _check_skips(plan: "Plan") -> None:
    names = {stratum.name for stratum in plan.strata}
    starts = [skip.start for skip in plan.skips]
    if starts != sorted(starts) or min(starts, default=0) < 0:
        raise _misfit(
            f"the plan leaves samples out from samples {starts} on; expected starts of 0 or more "
            "that ascend"
        )
    for skip in plan.skips:
        if skip.stratum not in names:
            raise _misfit(
                f"the plan leaves samples of {skip.stratum!r} out; expected one of its strata"
            )
        if not 0 <= skip.first <= skip.end:
            raise _misfit(
                f"the plan replaces draws {skip.first} to {skip.end} of {skip.stratum!r}; expected "
                "numbers that ascend from 0 or more"
            )
        if not skip.samples or list(skip.samples) != sorted({*skip.samples}) or skip.samples[0] < 0:
            raise _misfit(
                f"the samples of {skip.stratum!r} that the plan leaves out are not numbers of 0 or "
                "more that ascend; expected one or more"
            )


def _check_stages(plan: "Plan") -> None:
    starts = [stage.start for stage in plan.stages]
    if not starts or starts[0] != 0:
        raise _misfit(
            f"the plan's first stage starts at sample {starts[0] if starts else 'none'}; expected "
            "a stage that starts at sample 0"
        )
    previous = -1
    for stage in plan.stages:
        if stage.start <= previous:
            raise _misfit(
                f"the plan's stage at sample {stage.start} follows the one at {previous}; "
                "expected ascending starts"
            )
        previous = stage.start
        _check_weights(plan, stage)


def _check_weights(plan: "Plan", stage: Stage) -> None:
    stage_at = f"the plan's stage at sample {stage.start}"
    for weights, count, parts in (
        (stage.weights, len(plan.datasets), "datasets"),
        (stage.within, plan.n_strata, "strata"),
    ):
        if weights is None:
            continue
        if len(weights) != count:
            raise _misfit(
                f"{stage_at} has {len(weights)} weights for {count} {parts}; expected one for each"
            )
        if not all(math.isfinite(weight) and weight >= 0 for weight in weights):
            raise _misfit(
                f"{stage_at} has a weight that is negative or not finite: {list(weights)}; "
                "expected finite weights of 0 or more"
            )
    if not 0 < math.fsum(stage.weights) < math.inf:
        raise _misfit(
            f"the weights of {stage_at} sum to {math.fsum(stage.weights):g}; expected a finite sum "
            "above 0"
        )
    if stage.within is None:
        return
    for dataset, weight in enumerate(stage.weights):
        if weight and not any(stage.within[z] for z in plan.strata_of(dataset)):
            raise _misfit(
                f"the weights of {stage_at} within {plan.datasets[dataset].name} sum to 0; "
                "expected one above 0"
            )
