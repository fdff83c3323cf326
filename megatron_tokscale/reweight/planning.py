"""From a policy to a plan on disk.

Shapes: T stages, D datasets, Z strata, G grid points.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np

import megatron_tokscale
from megatron_tokscale.core.arrays import Floats, Integers
from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.data import (
    DatasetIdentity,
    Plan,
    Replanning,
    Stage,
    Stratum,
    dataset_names,
)
from megatron_tokscale.reweight.cutting import CutDataset
from megatron_tokscale.reweight.guards import (
    Guards,
    apply_floor,
    limit_change,
    limit_repetition,
    refuse_repetition,
)
from megatron_tokscale.reweight.learnability import read_spectra, watched_names
from megatron_tokscale.reweight.policy import (
    BySpectrum,
    EasyFirst,
    Frontier,
    Manual,
    Policy,
    Uniform,
    schedule,
    strata_slices,
)
from megatron_tokscale.reweight.time_map import ByRank, Clock, Progress, SameTokens
from megatron_tokscale.store import Run

type Control = Literal["easy-first", "frequency"]

_GRID: Final = 257


@dataclass(frozen=True)
class Job:
    """The training that a plan is for.

    Attributes:
        datasets: its training data.
        base_weights: the weights it would have without a plan, all positive.
        train_samples: samples it will consume.
        seq_length: sequence length in tokens.
        seed: keys the order of the samples.
        epoch_samples: training samples in one epoch of each dataset.
        documents: first document of each dataset's training part, and the one after its last;
            empty where that is not known.

    Raises:
        TokscaleError: on construction, if these do not fit together.
    """

    datasets: Sequence[DatasetIdentity]
    base_weights: Sequence[float]
    train_samples: int
    seq_length: int
    seed: int
    epoch_samples: Sequence[int]
    documents: Sequence[tuple[int, int]] = ()

    def __post_init__(self) -> None:
        if not self.datasets or len(self.datasets) != len(self.base_weights):
            raise TokscaleError(
                f"{len(self.base_weights)} base weights for {len(self.datasets)} training datasets"
            )
        names = dataset_names(self.datasets)
        for name, weight in zip(names, self.base_weights, strict=True):
            if not 0 < weight < np.inf:
                raise TokscaleError(
                    f"the base weight of {name} is {weight:g}; base weights must be positive, as "
                    "Megatron demands; leave the dataset out of the job's data"
                )
        if self.train_samples < 1 or self.seq_length < 1:
            raise TokscaleError(
                f"cannot plan {self.train_samples} samples of {self.seq_length} tokens"
            )
        for dataset, samples in zip(self.datasets, self.epoch_samples, strict=True):
            if samples < 1:
                raise TokscaleError(
                    f"dataset {dataset} has not enough training tokens for one sample of "
                    f"{self.seq_length} tokens; leave it out"
                )

    @cached_property
    def base_D(self) -> Floats:
        """Base weights, summing to one."""
        weights_D = np.array(self.base_weights, dtype=np.float64)
        return np.asarray(weights_D / weights_D.sum())


def make_plan(
    job: Job,
    policy: Policy,
    guards: Guards | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> Plan:
    """Turn a policy into a plan.

    What follows a spectrum, scores or a curriculum is bent to the guards. The base weights and a
    schedule by hand are what they are: only the limit on epochs is held against them, and refuses
    them.

    Raises:
        TokscaleError: the policy does not fit the job, or repeats a stratum too often.
    """
    guards = guards or Guards()
    draft = _draft(job, policy, guards, provenance or {})
    base_Z = job.base_D[draft.dataset_Z] * draft.share_Z
    start_T, weights_TZ = schedule(policy, base_Z, job.train_samples)
    planned = start_T < job.train_samples
    start_T, weights_TZ = start_T[planned], weights_TZ[planned]
    length_T = np.diff(start_T, append=job.train_samples)
    if isinstance(policy, Uniform | Manual):
        _refuse_repetition(draft, job, length_T @ weights_TZ)
    else:
        _refuse_repetition(draft, job, base_Z * job.train_samples)
        size_Z = draft.sizes_Z(job.epoch_samples).astype(np.float64)
        for part in _parts(policy):
            limit = _Limit(base_Z[part], length_T, size_Z[part])
            weights_TZ[:, part] = limit.bend(weights_TZ[:, part], guards)
    return replace(draft, stages=_stages(draft, job, start_T, weights_TZ, policy))


def _draft(job: Job, policy: Policy, guards: Guards, provenance: Mapping[str, Any]) -> Plan:
    """The plan of a policy, but with base weights throughout."""
    if isinstance(policy, Frontier | EasyFirst):
        strata = tuple(
            Stratum(name, d, share)
            for d, dataset in enumerate(policy.datasets)
            for name, share in zip(dataset.names, dataset.shares, strict=True)
        )
        cuts = tuple(dataset.cut for dataset in policy.datasets)
    else:
        strata = tuple(Stratum(name, d) for d, name in enumerate(dataset_names(job.datasets)))
        cuts = ()
    return Plan(
        datasets=tuple(job.datasets),
        strata=strata,
        stages=(Stage(0, tuple(job.base_weights)),),
        seq_length=job.seq_length,
        seed=job.seed,
        cuts=cuts,
        max_epochs=guards.max_epochs,
        documents=tuple(job.documents),
        provenance={**provenance, "version": megatron_tokscale.__version__},
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


def _moves_shares(policy: Policy) -> bool:
    return isinstance(policy, Manual | BySpectrum) or (
        isinstance(policy, Frontier) and policy.move_shares
    )


def _parts(policy: BySpectrum | Frontier | EasyFirst) -> list[slice]:
    """Strata that the guards look at together: of each dataset, where these keep their shares."""
    if isinstance(policy, BySpectrum) or _moves_shares(policy):
        return [slice(None)]
    return strata_slices(policy.datasets)


@dataclass(frozen=True, eq=False)
class _Limit:
    """What the guards of some strata need to know: base weights, lengths of stages, sizes."""

    base_Z: Floats
    length_T: Integers
    size_Z: Floats

    def bend(self, weights_TZ: Floats, guards: Guards) -> Floats:
        """Weights within the guards, with the same sums."""
        weights_TZ = apply_floor(weights_TZ, self.base_Z, guards.floor)
        weights_TZ = limit_change(weights_TZ, guards.max_change)
        if guards.max_epochs is None:
            return weights_TZ
        limit_Z = guards.max_epochs * self.size_Z
        return limit_repetition(weights_TZ, self.base_Z, self.length_T, limit_Z)


def _stages(
    draft: Plan, job: Job, start_T: Integers, weights_TZ: Floats, policy: Policy
) -> tuple[Stage, ...]:
    """Weights of strata as those of datasets, and within these."""
    weights_TD = np.stack(
        [np.bincount(draft.dataset_Z, weights_Z, len(job.datasets)) for weights_Z in weights_TZ]
    )
    is_cut = any(cut is not None for cut in draft.cuts)
    return tuple(
        Stage(
            int(start),
            # Shares that are kept are kept to the last bit: then a job draws as without a plan.
            tuple(weights_D.tolist()) if _moves_shares(policy) else tuple(job.base_weights),
            tuple(weights_Z.tolist()) if is_cut else None,
        )
        for start, weights_D, weights_Z in zip(start_T, weights_TD, weights_TZ, strict=True)
    )


def plan_uniform(job: Job, out: Path, *, guards: Guards | None = None) -> Plan:
    """Make the plan of the base weights, a control of every policy, and write it to `out`.

    Raises:
        TokscaleError: the file exists, or a dataset is repeated too often.
    """
    return _write(make_plan(job, Uniform(), guards, {"policy": "uniform"}), out)


def plan_run(
    run: Run,
    job: Job,
    out: Path,
    *,
    guards: Guards | None = None,
    datasets: Sequence[str] | None = None,
    window: float = 4.0,
    strength: float = 1.0,
    n_stages: int = 24,
    first: int | None = None,
) -> Plan:
    """Make the plan of weights per dataset from a reference run and write it to `out`.

    Args:
        run: the reference run, with its spectrum.
        job: the training to plan.
        out: the plan's file; an existing one is not overwritten.
        guards: limits on the plan.
        datasets: the run's dataset for each dataset of the job; by default that of its prefix.
        window: as in `BySpectrum`; so are strength, n_stages and first.

    Raises:
        TokscaleError: the file exists, the run has no spectrum, or it does not fit the job.
    """
    names = list(datasets or watched_names(run, job.datasets))
    spectra = read_spectra(run).select(names)
    policy = BySpectrum(spectra, window, strength, n_stages, first)
    provenance = {
        "policy": "dataset",
        "control": None,
        "run": str(run.path),
        "datasets": names,
        "window": window,
        "strength": strength,
        "n_stages": n_stages,
        "first": first,
    }
    return _write(make_plan(job, policy, guards, provenance), out)


def plan_frontier(
    datasets: Sequence[CutDataset],
    job: Job,
    out: Path,
    *,
    control: Control | None = None,
    clock: Run | None = None,
    guards: Guards | None = None,
    window: float = 4.0,
    strength: float = 1.0,
    n_stages: int = 24,
    first: int | None = None,
    move_shares: bool = False,
) -> Plan:
    """Make the plan of weights per stratum from document scores and write it to `out`.

    Args:
        datasets: the job's datasets, cut into strata (`cut_job`).
        job: the training to plan.
        out: the plan's file; an existing one is not overwritten.
        control: make this control instead. The frequency-matched control has the policy's weights
            and other samples.
        clock: a run with a spectrum, of the size of the training: its learning order tells when
            the training is where (`ByRank`). By default the reference run's own tokens tell.
        guards: limits on the plan.
        window: as in `Frontier`; so are strength, n_stages, first and move_shares.

    Raises:
        TokscaleError: the file exists, the scores are of several reference runs, the clock has no
            spectrum or another's data, or these do not fit the job.
    """
    _check_references(datasets)
    provenance: dict[str, Any] = {
        "policy": "frontier",
        "control": control,
        "scores": {
            name: dataset.scores
            for name, dataset in zip(dataset_names(job.datasets), datasets, strict=True)
        },
        "reference": datasets[0].reference,
        "cutting": asdict(datasets[0].cutting),
        "n_stages": n_stages,
        "first": first,
    }
    if control == "easy-first":
        curriculum = EasyFirst(datasets, n_stages=n_stages, first=first)
        provenance |= {"competence": curriculum.competence}
        return _write(make_plan(job, curriculum, guards, provenance), out)
    frontier = Frontier(
        [_controlled(dataset, control) for dataset in datasets],
        _clock(datasets, job, clock),
        job.seq_length,
        window,
        strength,
        n_stages,
        first,
        move_shares,
    )
    provenance |= {
        "clock": None if clock is None else str(clock.path),
        "window": window,
        "strength": strength,
        "move_shares": move_shares,
    }
    return _write(make_plan(job, frontier, guards, provenance), out)


def _check_references(datasets: Sequence[CutDataset]) -> None:
    references = sorted({dataset.reference for dataset in datasets})
    if len(references) > 1:
        raise TokscaleError(
            f"the scores are of several reference runs ({', '.join(references)}), whose times do "
            "not compare; score all the data from one"
        )


def _controlled(dataset: CutDataset, control: Control | None) -> CutDataset:
    """The same strata, but filled as the control fills them."""
    if dataset.cut is None or control != "frequency":
        return dataset
    return replace(dataset, cut=replace(dataset.cut, order="frequency"))


def _clock(datasets: Sequence[CutDataset], job: Job, run: Run | None) -> Clock:
    start = min(dataset.x_range[0] for dataset in datasets)
    end = min(dataset.x_range[1] for dataset in datasets)
    if run is None:
        return SameTokens(end)
    progress = Progress.from_run(run, watched_names(run, job.datasets), job.base_D)
    x_G = np.linspace(start, end, _GRID)
    learned_GD = [dataset.learned_by(x_G) @ np.array(dataset.shares) for dataset in datasets]
    return ByRank(progress, x_G, job.base_D @ np.array(learned_GD))


def plan_by_hand(manual: Manual, job: Job, out: Path, *, guards: Guards | None = None) -> Plan:
    """Make the plan of a schedule by hand and write it to `out`.

    Raises:
        TokscaleError: the file exists, or the schedule does not fit the job.
    """
    provenance = {
        "policy": "manual",
        "interpolation": manual.interpolation,
        "points": {str(start): list(weights) for start, weights in manual.points.items()},
    }
    return _write(make_plan(job, manual, guards, provenance), out)


def _write(plan: Plan, out: Path) -> Plan:
    if out.exists():
        raise TokscaleError(f"{out} exists; a job may be following it: choose another name")
    plan.save(out)
    return plan
