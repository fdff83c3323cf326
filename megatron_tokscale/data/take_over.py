"""A plan that takes over from another under a run: the past of one, the weights of the other.

No sample is lost or repeated: strata of datasets that stay must be the same, so that the counts of
their draws carry over.
"""

from collections.abc import Sequence
from dataclasses import replace

from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.data.plan import Plan
from megatron_tokscale.data.plan_parts import Acceptance, Cut, DatasetIdentity, Skip, Stage, Stratum


def take_over(past: Plan, successor: Plan, consumed: int) -> Plan:
    """Return the plan with the past of one plan and, from a sample on, the weights of another.

    Datasets may be added, or left out; the strata of those that stay must be the same.

    Args:
        past: the plan under which the run has trained so far.
        successor: the plan that takes over.
        consumed: samples consumed so far; the successor holds from this sample on.

    Raises:
        TokscaleError: the samples are of another length, or a dataset is cut otherwise.
    """
    _check_fit(past, successor)

    # The data: the datasets of the past, then those that only the successor has.
    known = {*past.datasets}
    added = [d for d, dataset in enumerate(successor.datasets) if dataset not in known]
    datasets = (*past.datasets, *(successor.datasets[d] for d in added))
    strata = (*past.strata, *_added_strata(past, successor, added))
    documents: tuple[tuple[int, int], ...] = ()
    if past.documents and successor.documents:
        documents = (*past.documents, *(successor.documents[d] for d in added))

    # The weights: the past's until now, then the successor's.
    before = [stage for stage in past.stages if stage.start < consumed]
    present = [stage for stage in successor.stages if stage.start <= consumed][-1]
    later = [stage for stage in successor.stages if stage.start > consumed]
    stages = (
        *(_translated(stage, past, datasets, strata) for stage in before),
        replace(_translated(present, successor, datasets, strata), start=consumed),
        *(_translated(stage, successor, datasets, strata) for stage in later),
    )

    # The settings: those that determine the past's order stay, the others are the successor's.
    settings = successor.replanning
    return Plan(
        datasets=datasets,
        strata=strata,
        stages=stages,
        seq_length=past.seq_length,
        seed=past.seed,
        cuts=(*past.cuts, *(successor.cuts[d] for d in added)),
        documents=documents,
        max_epochs=successor.max_epochs,
        provenance=successor.provenance,
        replanning=replace(
            settings,
            base_weights=_by_dataset(settings.base_weights, successor, datasets),
            epoch_samples=_by_dataset(settings.epoch_samples, successor, datasets),
            stratum_samples=_samples_of(strata, past, successor),
        ),
        accepted=(
            *past.accepted,
            Acceptance(consumed, past.fingerprint, successor.fingerprint),
        ),
        skips=skips_from(past, successor, consumed),
    )


def skips_from(past: Plan, successor: Plan, consumed: int) -> tuple[Skip, ...]:
    """Return the skips of a plan that takes over: the past's until now, then the successor's.

    Args:
        past: the plan under which the run has trained so far.
        successor: the plan that takes over.
        consumed: samples consumed so far.

    Raises:
        TokscaleError: the successor leaves samples out that the run may have consumed by now.
    """
    kept = [skip for skip in past.skips if skip.start < consumed]
    added = [skip for skip in successor.skips if skip not in kept]
    if added and added[0].start < consumed:
        raise TokscaleError(
            f"the plan leaves samples out from sample {added[0].start} on, the run has consumed "
            f"{consumed}; expected a later start; resume from an earlier checkpoint, or build the "
            f"plan with --from-sample {consumed}"
        )
    return (*kept, *added)


def _check_fit(past: Plan, successor: Plan) -> None:
    """Refuse a successor that orders the same samples otherwise.

    Raises:
        TokscaleError: naming the first difference.
    """
    if past.seq_length != successor.seq_length:
        raise TokscaleError(
            f"the plan is for sequence length {successor.seq_length}, the run's past for "
            f"{past.seq_length}; expected the same; start a new run"
        )
    if any(len({*plan.datasets}) < len(plan.datasets) for plan in (past, successor)):
        raise TokscaleError(
            "a plan has twins among its datasets (same name and sizes), so their draws cannot be "
            "told apart; expected datasets that differ; start a new run"
        )
    known = {dataset: d for d, dataset in enumerate(past.datasets)}
    for d, dataset in enumerate(successor.datasets):
        if dataset in known:
            _check_documents(past, known[dataset], successor, d)
            _check_strata(past, known[dataset], successor, d)


def _check_documents(past: Plan, past_d: int, successor: Plan, d: int) -> None:
    """Refuse another training part of a dataset that both plans have."""
    if not (past.documents and successor.documents):
        return
    had, has = past.documents[past_d], successor.documents[d]
    if had != has:
        raise TokscaleError(
            f"the plan's training part of {successor.datasets[d].name} is documents {has[0]} to "
            f"{has[1]}, the run's past had {had[0]} to {had[1]}, so samples could come twice; make "
            "the plan with the --split of the run, or start a new run"
        )


def _check_strata(past: Plan, past_d: int, successor: Plan, d: int) -> None:
    """Refuse other strata of a dataset that both plans have."""
    if _division(successor, d) == _division(past, past_d):
        return
    dataset = successor.datasets[d]
    now, earlier = (
        plan.strata[plan.strata_of(number)[0]].name.partition("/")[0]
        for plan, number in ((successor, d), (past, past_d))
    )
    if now != earlier:
        raise TokscaleError(
            f"the plan calls {dataset.path} {now}, the run's past {earlier}; make the plan with "
            "the datasets in the same order, added ones last, or start a new run"
        )
    raise TokscaleError(
        f"the plan cuts {dataset.name} into other strata than the run's past did, so its samples "
        "could come twice; make the plan with the same scores and quantiles, or start a new run"
    )


def _division(plan: Plan, dataset: int) -> tuple[Cut | None, list[tuple[str, float]]]:
    """Return the values that determine which samples of a dataset are in which stratum."""
    strata = [plan.strata[z] for z in plan.strata_of(dataset)]
    return plan.cuts[dataset], [(stratum.name, stratum.share) for stratum in strata]


def _added_strata(past: Plan, successor: Plan, added: Sequence[int]) -> list[Stratum]:
    """Return the strata of datasets that only the successor has, numbered behind the past's.

    Raises:
        TokscaleError: a stratum of the past has the name of an added one.
    """
    strata = [
        replace(successor.strata[z], dataset=len(past.datasets) + number)
        for number, d in enumerate(added)
        for z in successor.strata_of(d)
    ]
    known = {stratum.name for stratum in past.strata}
    if again := sorted(known & {stratum.name for stratum in strata}):
        raise TokscaleError(
            f"the plan has other data under a name in the run's past, {again[0]}; give the "
            "files another name"
        )
    return strata


def _translated(
    stage: Stage, plan: Plan, datasets: Sequence[DatasetIdentity], strata: Sequence[Stratum]
) -> Stage:
    """Return a plan's stage as one of `datasets` and `strata`.

    Datasets that the plan does not have get weight 0, and their strata their shares.
    """
    names = [stratum.name for stratum in plan.strata]
    shares = [stratum.share for stratum in plan.strata]
    within = dict(zip(names, stage.within or shares, strict=True))
    return Stage(
        stage.start,
        _by_dataset(stage.weights, plan, datasets),
        tuple(within.get(stratum.name, stratum.share) for stratum in strata),
    )


def _samples_of(strata: Sequence[Stratum], *plans: Plan) -> tuple[int, ...]:
    """Return the samples of strata in one epoch, by their names; empty if a plan lacks them."""
    known = {
        stratum.name: n_samples
        for plan in plans
        for stratum, n_samples in zip(plan.strata, plan.replanning.stratum_samples, strict=False)
    }
    found = [known[stratum.name] for stratum in strata if stratum.name in known]
    return tuple(found) if len(found) == len(strata) else ()


def _by_dataset[Number: (int, float)](
    values: tuple[Number, ...], plan: Plan, datasets: Sequence[DatasetIdentity]
) -> tuple[Number, ...]:
    """Return a plan's values for `datasets`, with 0 for a dataset that the plan does not have."""
    if not values:
        return ()
    known = dict(zip(plan.datasets, values, strict=True))
    return tuple(known.get(dataset, type(values[0])(0)) for dataset in datasets)
