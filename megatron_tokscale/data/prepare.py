"""The set-up of a plan on the datasets of a job: match, check, index, dataset.

`match_job` finds the plan's datasets among those of the job, from their headers alone;
`check_draws` refuses a plan that draws too much from too little, from the sizes alone; `prepare`
makes the dataset that follows the plan, with the plan's files in a cache.

Shapes: J packings of the plan.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.data.dataset import MapDataset, PlannedDataset
from megatron_tokscale.data.index import PlanIndex, count_strata, load_or_build_index
from megatron_tokscale.data.match import check_documents, match_datasets
from megatron_tokscale.data.plan import Plan
from megatron_tokscale.data.plan_parts import DatasetIdentity, Skip
from megatron_tokscale.data.samples import SampleScores
from megatron_tokscale.data.strata import Strata, load_or_build_strata


@dataclass(frozen=True)
class JobDataset:
    """A training dataset of a job, as its headers describe it.

    Attributes:
        identity: identity of the whole .bin/.idx pair.
        documents: first document that the job trains on, and the document after the last one.
    """

    identity: DatasetIdentity
    documents: tuple[int, int]


@dataclass(frozen=True)
class PlanPart:
    """A packing of a plan, opened.

    Attributes:
        dataset: its training samples, each once.
        key: identifies the order of the samples.
        scores: returns the scores that cut the samples into strata; called for a packing that is
            cut, and only when files are built.
    """

    dataset: MapDataset
    key: str
    scores: Callable[[], SampleScores]


def match_job(
    plan: Plan, found: Sequence[JobDataset], seq_length: int, consumed: int
) -> list[int | None]:
    """Return for each dataset of the plan its position in `found`; None where it is not needed.

    Args:
        plan: the plan.
        found: the job's training datasets.
        seq_length: the job's sequence length in tokens.
        consumed: samples that the job has consumed.

    Raises:
        TokscaleError: the job trains on other data or other documents than the plan is for.
    """
    order = match_datasets(plan, [row.identity for row in found], seq_length, consumed)
    check_documents(plan, order, [row.documents for row in found])
    return order


def check_draws(plan: Plan, sizes_J: Sequence[int], n_samples: int, consumed: int) -> None:
    """Refuse a plan that draws from an empty stratum, or from a stratum too often.

    Args:
        plan: the plan.
        sizes_J: samples of each packing; 0 for one that is not drawn from.
        n_samples: samples of the whole job, from the first of the plan on.
        consumed: how many of them are drawn already.

    Raises:
        TokscaleError: naming the stratum.
    """
    Strata(plan, sizes_J, [None] * len(sizes_J)).check(plan, n_samples, consumed)


def check_skips(plan: Plan, index: PlanIndex, consumed: int, followed: Sequence[Skip] = ()) -> None:
    """Refuse skips that would replace draws that the run has made without them.

    Args:
        plan: the plan.
        index: its index.
        consumed: samples that are drawn already.
        followed: skips that the run follows already: they hold from their first draw on, which
            live weights may have moved before their start.

    Raises:
        TokscaleError: naming the stratum.
    """
    ahead = [skip for skip in plan.skips if skip.start >= consumed and skip not in followed]
    if not ahead:
        return
    count_Z = count_strata(index.stratum_N[:consumed], plan.n_strata)
    drawn = {stratum.name: count_Z[z] for z, stratum in enumerate(plan.strata)}
    for skip in ahead:
        if drawn[skip.stratum] > skip.first:
            raise TokscaleError(
                f"the plan leaves samples of stratum {skip.stratum!r} out from its draw "
                f"{skip.first} on, the job has made {drawn[skip.stratum]} draws from it; expected "
                "no more; build the plan again from what the run follows now"
            )


def prepare(
    plan: Plan,
    parts: Sequence[PlanPart | None],
    n_samples: int,
    cache: Path,
    *,
    build: bool,
    consumed: int = 0,
    offset: int = 0,
    shares_index: bool = False,
    like: PlannedDataset | None = None,
    split: object = None,
    index_split: object = None,
) -> PlannedDataset:
    """Return the dataset that follows a plan, with the plan's files mapped from `cache`.

    Args:
        plan: the plan.
        parts: the plan's packings, in the order of the plan; None for one that is not drawn from.
        n_samples: samples of the dataset.
        cache: folder of the plan's files.
        build: make missing or damaged files. Set on one rank; the others call without it
            afterwards.
        consumed: samples of the plan that are drawn already.
        offset: the first sample of the dataset is sample `offset` of the plan.
        shares_index: keep the index in memory that forked processes share, so that it can change.
        like: a dataset of the same plan and samples, whose index and strata are reused.
        split: Megatron's samplers read it to tell training from validation.
        index_split: the split under the name that Megatron's single datasets give it.

    Raises:
        TokscaleError: the plan cannot be drawn from these datasets; a file is damaged, or missing
            and not to be built.
        OSError: the cache cannot be written.
    """
    datasets = [None if part is None else part.dataset for part in parts]
    sizes_J = [0 if dataset is None else len(dataset) for dataset in datasets]
    check_draws(plan, sizes_J, offset + n_samples, consumed)
    if like is not None:
        strata, index = like.strata, like.index
    else:
        keys = ["" if part is None else part.key for part in parts]
        strata = load_or_build_strata(
            plan, sizes_J, keys, lambda j: _part(parts, j).scores(), cache, build=build
        )
        index = load_or_build_index(plan, offset + n_samples, cache, build=build)
        if shares_index:
            index = index.shared()
    return PlannedDataset(
        plan,
        datasets,
        index,
        strata,
        offset=offset,
        consumed=consumed,
        split=split,
        index_split=index_split,
    )


def _part(parts: Sequence[PlanPart | None], number: int) -> PlanPart:
    """Return a packing that is drawn from."""
    part = parts[number]
    assert part is not None, "only packings that are drawn from are cut into strata"
    return part
