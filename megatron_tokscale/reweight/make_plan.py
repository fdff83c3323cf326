"""From a policy to a plan: its stages, kept within the guards, over a job's datasets and strata.

Shapes: T stages, D datasets, Z strata.
"""

from dataclasses import replace

import numpy as np

import megatron_tokscale
from megatron_tokscale.core.arrays import Floats, Integers
from megatron_tokscale.data import (
    Cut,
    Plan,
    PlanProvenance,
    Replanning,
    Stage,
    Stratum,
    dataset_names,
)
from megatron_tokscale.reweight.guards import (
    Guards,
    apply_floor,
    limit_change,
    limit_repetition,
    refuse_repetition,
)
from megatron_tokscale.reweight.job import Job
from megatron_tokscale.reweight.policy import (
    BySpectrum,
    EasyFirst,
    Frontier,
    Manual,
    Policy,
    PolicyStages,
    Uniform,
    policy_stages,
    strata_slices,
)


def make_plan(
    job: Job,
    policy: Policy,
    guards: Guards | None = None,
    provenance: PlanProvenance | None = None,
) -> Plan:
    """Return the plan of a policy for a job.

    Weights from a spectrum, scores or a curriculum are kept within the guards. Base weights and
    weights by hand are not changed; they are refused if they exceed the limit on epochs.

    Raises:
        TokscaleError: the policy does not fit the job, or repeats a stratum too often.
    """
    guards = guards or Guards()
    draft = _draft(job, policy, guards, provenance or PlanProvenance())
    base_Z = job.base_D[draft.dataset_Z] * draft.share_Z

    # The policy's stages, up to the end of training.
    stages = policy_stages(policy, base_Z, job.train_samples)
    begun = stages.start_T < job.train_samples
    start_T, weights_TZ = stages.start_T[begun], stages.weights_TZ[begun]
    length_T = np.diff(start_T, append=job.train_samples)

    # The guards.
    if isinstance(policy, Uniform | Manual):
        _refuse_repetition(draft, job, length_T @ weights_TZ)
    else:
        _refuse_repetition(draft, job, base_Z * job.train_samples)
        size_Z = draft.sizes_Z(job.epoch_samples).astype(np.float64)
        for part in _guarded_together(policy):
            weights_TZ[:, part] = _within_guards(
                weights_TZ[:, part], guards, base_Z[part], length_T, size_Z[part]
            )
    kept = PolicyStages(start_T, weights_TZ)
    return replace(draft, stages=_plan_stages(draft, job, kept, policy))


def _draft(job: Job, policy: Policy, guards: Guards, provenance: PlanProvenance) -> Plan:
    """Return the plan of a policy with base weights throughout."""
    cuts: tuple[Cut | None, ...] = ()
    if isinstance(policy, Frontier | EasyFirst):
        strata = tuple(
            Stratum(name, d, share)
            for d, dataset in enumerate(policy.datasets)
            for name, share in zip(dataset.names, dataset.shares, strict=True)
        )
        cuts = tuple(dataset.cut for dataset in policy.datasets)
    else:
        strata = tuple(Stratum(name, d) for d, name in enumerate(dataset_names(job.datasets)))
    return Plan(
        datasets=tuple(job.datasets),
        strata=strata,
        stages=(Stage(0, tuple(job.base_weights)),),
        seq_length=job.seq_length,
        seed=job.seed,
        cuts=cuts,
        max_epochs=guards.max_epochs,
        documents=tuple(job.documents),
        provenance=replace(provenance, version=megatron_tokscale.__version__),
        replanning=Replanning(
            base_weights=tuple(job.base_weights),
            epoch_samples=tuple(int(samples) for samples in job.epoch_samples),
            train_samples=job.train_samples,
            strength=policy.strength if isinstance(policy, BySpectrum | Frontier) else 1.0,
            floor=guards.floor,
            max_change=guards.max_change,
        ),
    )


def _refuse_repetition(plan: Plan, job: Job, draws_Z: Floats) -> None:
    if plan.max_epochs is not None:
        names = [stratum.name for stratum in plan.strata]
        size_Z = plan.sizes_Z(job.epoch_samples).astype(np.float64)
        refuse_repetition(names, draws_Z, size_Z, plan.max_epochs)


def _guarded_together(policy: BySpectrum | Frontier | EasyFirst) -> list[slice]:
    """Return the groups of strata that share a total: datasets, where these keep their shares."""
    if isinstance(policy, BySpectrum) or _moves_shares(policy):
        return [slice(None)]
    return strata_slices(policy.datasets)


def _moves_shares(policy: Policy) -> bool:
    """Return whether a policy changes the weights of datasets, not only of strata within them."""
    return isinstance(policy, Manual | BySpectrum) or (
        isinstance(policy, Frontier) and policy.move_shares
    )


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


def _plan_stages(draft: Plan, job: Job, stages: PolicyStages, policy: Policy) -> tuple[Stage, ...]:
    """Return weights of strata as weights of datasets, and within these."""
    weights_TD = np.stack(
        [
            np.bincount(draft.dataset_Z, weights_Z, len(job.datasets))
            for weights_Z in stages.weights_TZ
        ]
    )
    is_cut = any(cut is not None for cut in draft.cuts)
    return tuple(
        Stage(
            int(start),
            # Shares are kept to the last bit, so that a job draws as without a plan.
            tuple(weights_D.tolist()) if _moves_shares(policy) else tuple(job.base_weights),
            tuple(weights_Z.tolist()) if is_cut else None,
        )
        for start, weights_D, weights_Z in zip(
            stages.start_T, weights_TD, stages.weights_TZ, strict=True
        )
    )
