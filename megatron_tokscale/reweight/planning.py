"""The plans of `megatron-tokscale plan build`, one function for each kind.

Shapes: G grid points.
"""

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Final, Literal

import numpy as np

from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.core.records import JSON
from megatron_tokscale.core.writable import check_new_file
from megatron_tokscale.data import Plan, PlanProvenance, PlanSources, dataset_names
from megatron_tokscale.reweight.cutting import CutDataset
from megatron_tokscale.reweight.guards import Guards
from megatron_tokscale.reweight.job import Job
from megatron_tokscale.reweight.learnability import read_spectra, watched_names
from megatron_tokscale.reweight.make_plan import make_plan
from megatron_tokscale.reweight.policy import BySpectrum, EasyFirst, Frontier, Manual, Uniform
from megatron_tokscale.reweight.time_map import ByRank, LearnedByTime, SameTokens, TokenTimeMap
from megatron_tokscale.store import Run

type Control = Literal["easy-first", "frequency"]

_GRID: Final = 257
"""Points in ln(consumed tokens) of the reference run's learning curve. Our choice: 256 steps over
its probed range are finer than its probes."""


def plan_uniform(job: Job, out: Path, *, guards: Guards | None = None) -> Plan:
    """Make the plan of the base weights, a control of every policy, and write it to `out`.

    Raises:
        TokscaleError: the file exists, or a dataset is repeated too often.
    """
    return _write(make_plan(job, Uniform(), guards, PlanProvenance("uniform")), out)


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
        job: the job to plan for.
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
    provenance = PlanProvenance(
        "dataset",
        sources=PlanSources(run=str(run.path)),
        settings={
            "datasets": names,
            "window": window,
            "strength": strength,
            "n_stages": n_stages,
            "first": first,
        },
    )
    return _write(make_plan(job, policy, guards, provenance), out)


def plan_frontier(
    datasets: Sequence[CutDataset],
    job: Job,
    out: Path,
    *,
    control: Control | None = None,
    time_map: Run | None = None,
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
        job: the job to plan for.
        out: the plan's file; an existing one is not overwritten.
        control: make this control instead. The frequency-matched control has the policy's weights
            and other samples.
        time_map: a run with a spectrum, of the size of the training, whose learning order maps
            the training to the reference run (`ByRank`). None maps equal tokens to each other.
        guards: limits on the plan.
        window: as in `Frontier`; so are strength, n_stages, first and move_shares.

    Raises:
        TokscaleError: the file exists, the scores are of several reference runs, the run of the
            time map has no spectrum or watched other data, or these do not fit the job.
    """
    _check_references(datasets)
    names = dataset_names(job.datasets)
    scores = {name: dataset.scores for name, dataset in zip(names, datasets, strict=True)}
    sources = PlanSources(reference=datasets[0].reference, scores=scores)
    settings: dict[str, JSON] = {
        "cutting": asdict(datasets[0].settings),
        "n_stages": n_stages,
        "first": first,
    }
    policy: EasyFirst | Frontier
    if control == "easy-first":
        policy = EasyFirst(datasets, n_stages=n_stages, first=first)
        settings["competence"] = policy.competence
    else:
        policy = Frontier(
            [_controlled(dataset, control) for dataset in datasets],
            _time_map(datasets, job, time_map),
            job.seq_length,
            window,
            strength,
            n_stages,
            first,
            move_shares,
        )
        sources = replace(sources, time_map=None if time_map is None else str(time_map.path))
        settings |= {"window": window, "strength": strength, "move_shares": move_shares}
    provenance = PlanProvenance("frontier", control, sources, settings)
    return _write(make_plan(job, policy, guards, provenance), out)


def _check_references(datasets: Sequence[CutDataset]) -> None:
    references = sorted({dataset.reference for dataset in datasets})
    if len(references) > 1:
        raise TokscaleError(
            f"the scores are of several reference runs ({', '.join(references)}), whose times do "
            "not compare; expected one; score all the data from one run"
        )


def _controlled(dataset: CutDataset, control: Control | None) -> CutDataset:
    """Return a dataset with the same strata, filled as the control fills them."""
    if dataset.cut is None or control != "frequency":
        return dataset
    return replace(dataset, cut=replace(dataset.cut, order="frequency"))


def _time_map(datasets: Sequence[CutDataset], job: Job, run: Run | None) -> TokenTimeMap:
    """Return the map by a run's learning order, or by equal tokens without a run."""
    start = min(dataset.x_range[0] for dataset in datasets)
    end = min(dataset.x_range[1] for dataset in datasets)
    if run is None:
        return SameTokens(end)
    learned = LearnedByTime.from_run(run, watched_names(run, job.datasets), job.base_D)
    x_G = np.linspace(start, end, _GRID)
    learned_GD = [dataset.learned_by(x_G) @ np.array(dataset.shares) for dataset in datasets]
    return ByRank(learned, x_G, job.base_D @ np.array(learned_GD))


def plan_by_hand(manual: Manual, job: Job, out: Path, *, guards: Guards | None = None) -> Plan:
    """Make the plan of weights by hand and write it to `out`.

    Raises:
        TokscaleError: the file exists, or the weights do not fit the job.
    """
    provenance = PlanProvenance(
        "manual",
        settings={
            "interpolation": manual.interpolation,
            "points": {str(start): list(weights) for start, weights in manual.points.items()},
        },
    )
    return _write(make_plan(job, manual, guards, provenance), out)


def check_new_plan(out: Path) -> None:
    """Refuse a path for a new plan that exists already, or that this user could not write.

    Raises:
        TokscaleError: something is at `out`, or no file can be made there.
    """
    check_new_file(out, "a job may be following it")


def _write(plan: Plan, out: Path) -> Plan:
    check_new_plan(out)
    plan.save(out)
    return plan
