"""From a policy to a plan on disk.

Shapes: T stages, D datasets.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

import megatron_tokscale
from megatron_tokscale.data import DatasetIdentity, Plan, Stage, Stratum
from megatron_tokscale.errors import TokscaleError
from megatron_tokscale.reweight.guards import (
    Guards,
    apply_floor,
    limit_change,
    limit_repetition,
    refuse_repetition,
)
from megatron_tokscale.reweight.learnability import read_spectra
from megatron_tokscale.reweight.policy import BySpectrum, Manual, Policy, Uniform, schedule
from megatron_tokscale.store import Run

type Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Job:
    """The training that a plan is for.

    Attributes:
        datasets: its training data.
        base_weights: the weights it would have without a plan, all positive.
        train_samples: samples it will consume.
        seq_length: sequence length in tokens.
        seed: keys the order of the samples.
        train_fraction: part of the data that `--split` gives to training; only to estimate
            epochs, before Megatron has built the datasets.

    Raises:
        TokscaleError: on construction, if these do not fit together.
    """

    datasets: Sequence[DatasetIdentity]
    base_weights: Sequence[float]
    train_samples: int
    seq_length: int
    seed: int
    train_fraction: float = 1.0

    def __post_init__(self) -> None:
        if not self.datasets or len(self.datasets) != len(self.base_weights):
            raise TokscaleError(
                f"{len(self.base_weights)} base weights for {len(self.datasets)} training datasets"
            )
        if not all(0 < weight < np.inf for weight in self.base_weights):
            raise TokscaleError(f"the base weights {list(self.base_weights)} must be positive")
        if self.train_samples < 1 or self.seq_length < 1 or not 0 < self.train_fraction <= 1:
            raise TokscaleError(
                f"cannot plan {self.train_samples} samples of {self.seq_length} tokens from "
                f"{self.train_fraction:g} of the data"
            )
        for dataset, samples in zip(self.datasets, self.epoch_samples_D, strict=True):
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

    @cached_property
    def epoch_samples_D(self) -> Floats:
        """Estimated training samples in one epoch of each dataset."""
        tokens_D = np.array([dataset.n_tokens for dataset in self.datasets], dtype=np.float64)
        return tokens_D * self.train_fraction / self.seq_length


def make_plan(
    job: Job,
    policy: Policy,
    guards: Guards | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> Plan:
    """Turn a policy into a plan, one stratum per dataset.

    What follows a spectrum is bent to the guards. The base weights and a schedule by hand are
    what they are: only the limit on epochs is held against them, and refuses them.

    Raises:
        TokscaleError: the policy does not fit the job, or repeats a dataset too often.
    """
    guards = guards or Guards()
    start_T, weights_TD = schedule(policy, job.base_D, job.train_samples)
    planned = start_T < job.train_samples
    start_T, weights_TD = start_T[planned], weights_TD[planned]
    length_T = np.diff(start_T, append=job.train_samples)
    if isinstance(policy, BySpectrum):
        _refuse_repetition(job, guards, job.base_D * job.train_samples)
        weights_TD = apply_floor(weights_TD, job.base_D, guards.floor)
        weights_TD = limit_change(weights_TD, guards.max_change)
        if guards.max_epochs is not None:
            limit_D = guards.max_epochs * job.epoch_samples_D
            weights_TD = limit_repetition(weights_TD, job.base_D, length_T, limit_D)
    else:
        _refuse_repetition(job, guards, length_T @ weights_TD)
    return Plan(
        datasets=tuple(job.datasets),
        strata=_strata(job.datasets),
        stages=tuple(
            Stage(int(start), tuple(weights_D.tolist()))
            for start, weights_D in zip(start_T, weights_TD, strict=True)
        ),
        seq_length=job.seq_length,
        seed=job.seed,
        provenance={
            **(provenance or {}),
            "train_samples": job.train_samples,
            "train_fraction": job.train_fraction,
            "base_weights": [float(weight) for weight in job.base_weights],
            "guards": asdict(guards),
            "version": megatron_tokscale.__version__,
        },
    )


def _refuse_repetition(job: Job, guards: Guards, draws_D: Floats) -> None:
    if guards.max_epochs is not None:
        names = [dataset.name for dataset in job.datasets]
        refuse_repetition(names, draws_D, job.epoch_samples_D, guards.max_epochs)


def _strata(datasets: Sequence[DatasetIdentity]) -> tuple[Stratum, ...]:
    """One stratum per dataset, named after it; namesakes are numbered."""
    count = Counter(dataset.name for dataset in datasets)
    return tuple(
        Stratum(dataset.name if count[dataset.name] == 1 else f"{dataset.name}#{d}", d)
        for d, dataset in enumerate(datasets)
    )


def plan_run(
    run: Run | None,
    policy: Literal["dataset", "shuffled", "uniform"],
    job: Job,
    out: Path,
    *,
    guards: Guards | None = None,
    domains: Sequence[str] | None = None,
    window: float = 4.0,
    strength: float = 1.0,
    n_stages: int = 24,
    first: int | None = None,
    shuffle_seed: int = 0,
) -> Plan:
    """Make the plan of a policy from a reference run and write it to `out`.

    Args:
        run: the reference run, with its spectrum; `uniform` needs none.
        policy: `dataset` follows the spectra (`BySpectrum`); `shuffled` and `uniform` are its
            controls.
        job: the training to plan.
        out: the plan's file; an existing one is not overwritten.
        guards: limits on the plan.
        domains: the run's domain for each dataset of the job; by default the dataset's name.
        window: as in `BySpectrum`; so are strength, n_stages, first and shuffle_seed.

    Raises:
        TokscaleError: the file exists, the run has no spectrum, or it does not fit the job.
    """
    chosen: Policy = Uniform()
    provenance: dict[str, Any] = {"policy": policy}
    if policy != "uniform":
        if run is None:
            raise TokscaleError(f"the policy {policy} needs a reference run (--run)")
        names = list(domains or (dataset.name for dataset in job.datasets))
        chosen = BySpectrum(
            read_spectra(run).select(names),
            window,
            strength,
            n_stages,
            first,
            shuffle_seed if policy == "shuffled" else None,
        )
        provenance |= {
            "run": str(run.path),
            "domains": names,
            "window": window,
            "strength": strength,
            "n_stages": n_stages,
            "first": first,
            "shuffle_seed": chosen.shuffle_seed,
        }
    return _write(make_plan(job, chosen, guards, provenance), out)


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
