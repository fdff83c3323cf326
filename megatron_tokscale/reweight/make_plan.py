"""From a policy to a plan: its stages, kept within the guards, over a job's datasets and strata.

Shapes: T stages, D datasets, Z strata.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

import megatron_tokscale
from megatron_tokscale.core.arrays import Floats, Integers
from megatron_tokscale.data import (
    Plan,
    PlanProvenance,
    Replanning,
    Stage,
    Stratum,
    dataset_names,
)
from megatron_tokscale.reweight.by_score import ByFall, ByTarget
from megatron_tokscale.reweight.controls import permuted, transferred
from megatron_tokscale.reweight.cutting import CutDataset, strata_slices
from megatron_tokscale.reweight.guards import (
    Guards,
    apply_floor,
    limit_change,
    limit_repetition,
    limit_shares,
    refuse_repetition,
)
from megatron_tokscale.reweight.job import Job
from megatron_tokscale.reweight.policy import (
    BySpectrum,
    EasyFirst,
    Frontier,
    Manual,
    Policy,
    Uniform,
    policy_stages,
)


def make_plan(
    job: Job,
    policy: Policy,
    guards: Guards | None = None,
    provenance: PlanProvenance | None = None,
    *,
    permute: bool = False,
    drawn: Sequence[CutDataset] = (),
) -> Plan:
    """Return the plan of a policy for a job.

    Weights from a spectrum, scores or a curriculum are kept within the guards. Base weights and
    weights by hand are not changed; they are refused if they exceed the limit on epochs.

    Args:
        job: the job.
        policy: the policy.
        guards: limits on the plan.
        provenance: origin of the plan.
        permute: give each stratum the relative weight of another of about its size, as a control.
        drawn: the datasets in other strata, which get the weights by rank, as a control; empty: the
            policy's own strata.

    Raises:
        TokscaleError: the policy does not fit the job, or repeats a stratum too often.
    """
    guards = guards or Guards()
    datasets = _datasets_of(policy)
    draft = _draft(job, policy, drawn or datasets, guards, provenance or PlanProvenance())

    # The policy's stages, up to the end of training.
    base_Z = _base_Z(job, datasets)
    stages = policy_stages(policy, base_Z, job.train_samples)
    begun = stages.start_T < job.train_samples
    start_T, weights_TZ = stages.start_T[begun], stages.weights_TZ[begun]
    length_T = np.diff(start_T, append=job.train_samples)

    # The controls. A permutation matches the change that is left within the limit on shares.
    if permute:
        weights_TZ = _with_shares_limited(policy, draft, weights_TZ, base_Z)
        weights_TZ = permuted(weights_TZ, base_Z, _kept_together(policy, draft), job.seed)
    if drawn:
        pairs = zip(datasets, strata_slices(datasets), drawn, strict=True)
        moved = [transferred(weights_TZ[:, own], a.bounds, b.bounds) for a, own, b in pairs]
        weights_TZ = np.concatenate(moved, axis=1)

    # The guards.
    base_Z = _base_Z(job, drawn or datasets)
    size_Z = _size_Z(draft, job)
    if isinstance(policy, Uniform | Manual):
        _refuse_repetition(draft, length_T @ weights_TZ, size_Z)
    else:
        _refuse_repetition(draft, base_Z * job.train_samples, size_Z)
        weights_TZ = _with_shares_limited(policy, draft, weights_TZ, base_Z)
        for part in _kept_together(policy, draft):
            weights_TZ[:, part] = _within_guards(
                weights_TZ[:, part], guards, base_Z[part], length_T, size_Z[part]
            )
    return replace(draft, stages=_plan_stages(draft, job, start_T, weights_TZ, policy))


def _datasets_of(policy: Policy) -> Sequence[CutDataset]:
    """Return the datasets of a policy, cut into strata; empty where datasets are the strata."""
    return () if isinstance(policy, Manual | BySpectrum) else policy.datasets


def _base_Z(job: Job, datasets: Sequence[CutDataset]) -> Floats:
    """Return the base weights of the strata, which are the datasets where these are not cut."""
    if not datasets:
        return job.base_D
    shares = [np.array(dataset.shares) for dataset in datasets]
    return np.concatenate([w * share for w, share in zip(job.base_D, shares, strict=True)])


def _draft(
    job: Job,
    policy: Policy,
    datasets: Sequence[CutDataset],
    guards: Guards,
    provenance: PlanProvenance,
) -> Plan:
    """Return the plan of a policy with base weights throughout."""
    if datasets:
        strata = tuple(
            Stratum(name, d, share)
            for d, dataset in enumerate(datasets)
            for name, share in zip(dataset.names, dataset.shares, strict=True)
        )
    else:
        strata = tuple(Stratum(name, d) for d, name in enumerate(dataset_names(job.datasets)))
    share_limit = policy.share_limit if isinstance(policy, ByFall | ByTarget) else None
    return Plan(
        datasets=tuple(job.datasets),
        strata=strata,
        stages=(Stage(0, tuple(job.base_weights)),),
        seq_length=job.seq_length,
        seed=job.seed,
        cuts=tuple(dataset.cut for dataset in datasets),
        max_epochs=guards.max_epochs,
        documents=tuple(job.documents),
        provenance=replace(provenance, version=megatron_tokscale.__version__),
        replanning=Replanning(
            base_weights=tuple(job.base_weights),
            epoch_samples=tuple(int(samples) for samples in job.epoch_samples),
            # Strata of samples are cut from the job's own number of samples, by their shares.
            stratum_samples=tuple(
                n for each in datasets if each.settings.unit == "documents" for n in each.samples
            ),
            train_samples=job.train_samples,
            strength=policy.strength if isinstance(policy, BySpectrum | Frontier | ByFall) else 1.0,
            floor=guards.floor,
            max_change=guards.max_change,
            share_limit=share_limit,
        ),
    )


def _size_Z(plan: Plan, job: Job) -> Floats:
    """Return the samples of each stratum in one epoch."""
    known = plan.replanning.stratum_samples
    return np.array(known or plan.sizes_Z(job.epoch_samples), dtype=np.float64)


def _refuse_repetition(plan: Plan, draws_Z: Floats, size_Z: Floats) -> None:
    if plan.max_epochs is not None:
        names = [stratum.name for stratum in plan.strata]
        refuse_repetition(names, draws_Z, size_Z, plan.max_epochs)


def _with_shares_limited(policy: Policy, plan: Plan, weights_TZ: Floats, base_Z: Floats) -> Floats:
    """Return weights within the policy's limit on the shares of datasets, if it has one."""
    if not isinstance(policy, ByFall | ByTarget):
        return weights_TZ
    dataset_Z = plan.dataset_Z.astype(np.int64)
    return limit_shares(weights_TZ, base_Z, dataset_Z, policy.share_limit)


def _kept_together(policy: Policy, plan: Plan) -> list[slice]:
    """Return the groups of strata that share a total: datasets, where these keep their shares."""
    if _moves_shares(policy):
        return [slice(0, plan.n_strata)]
    strata = [plan.strata_of(dataset) for dataset in range(len(plan.datasets))]
    return [slice(each.start, each.stop) for each in strata]


def _moves_shares(policy: Policy) -> bool:
    """Return whether a policy changes the weights of datasets, not only of strata within them."""
    match policy:
        case Manual() | BySpectrum():
            return True
        case Frontier():
            return policy.move_shares
        case ByFall() | ByTarget():
            return policy.share_limit > 1
        case Uniform() | EasyFirst():
            return False


def _within_guards(
    weights_TZ: Floats, guards: Guards, base_Z: Floats, length_T: Integers, size_Z: Floats
) -> Floats:
    """Return the weights of some strata within the guards, with the same sums.

    Args:
        weights_TZ: the policy's weights.
        guards: the guards.
        base_Z: base weight of each stratum.
        length_T: samples of each stage.
        size_Z: samples of each stratum in one epoch.
    """
    weights_TZ = apply_floor(weights_TZ, base_Z, guards.floor)
    weights_TZ = limit_change(weights_TZ, guards.max_change)
    if guards.max_epochs is None:
        return weights_TZ
    return limit_repetition(weights_TZ, base_Z, length_T, guards.max_epochs * size_Z)


def _plan_stages(
    draft: Plan, job: Job, start_T: Integers, weights_TZ: Floats, policy: Policy
) -> tuple[Stage, ...]:
    """Return weights of strata as weights of datasets, and within these."""
    n_datasets = len(job.datasets)
    is_cut = any(cut is not None for cut in draft.cuts)
    return tuple(
        Stage(
            int(start),
            # Shares are kept to the last bit, so that a job draws as without a plan.
            tuple(np.bincount(draft.dataset_Z, weights_Z, n_datasets).tolist())
            if _moves_shares(policy)
            else tuple(job.base_weights),
            tuple(weights_Z.tolist()) if is_cut else None,
        )
        for start, weights_Z in zip(start_T, weights_TZ, strict=True)
    )
