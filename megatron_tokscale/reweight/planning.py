"""The plans of `megatron-tokscale plan build`, one function for each kind.

Shapes: G grid points.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Final, Literal

import numpy as np

from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.core.records import JSON
from megatron_tokscale.core.writable import check_new_file
from megatron_tokscale.data import Plan, PlanProvenance, PlanSources, dataset_names
from megatron_tokscale.results.gain import with_gain
from megatron_tokscale.reweight.by_score import ByFall, ByTarget
from megatron_tokscale.reweight.controls import Control
from megatron_tokscale.reweight.cutting import CutDataset
from megatron_tokscale.reweight.gain import GainSettings, gain_of, target_shift
from megatron_tokscale.reweight.guards import Guards
from megatron_tokscale.reweight.job import Job
from megatron_tokscale.reweight.learnability import read_spectra, watched_names
from megatron_tokscale.reweight.make_plan import make_plan
from megatron_tokscale.reweight.policy import (
    BySpectrum,
    EasyFirst,
    Frontier,
    Manual,
    Policy,
    Uniform,
)
from megatron_tokscale.reweight.time_map import ByRank, LearnedByTime, SameTokens, TokenTimeMap
from megatron_tokscale.store import Run

type PlainControl = Literal["uniform", "permuted"]

_NAMES: Final = {ByFall: "fall", ByTarget: "target", Frontier: "frontier"}

_GRID: Final = 257
"""Points in ln(consumed tokens) of the reference run's learning curve. Our choice: 256 steps over
its probed range are finer than its probes."""


@dataclass(frozen=True)
class PlanOptions:
    """Options of every plan by scores.

    Attributes:
        control: make this control of the policy instead.
        guards: limits on the plan.
        gain: settings of the estimate of what the plan can gain.
        by_frequency: the datasets in strata by token frequency, for the control `frequency`.

    Raises:
        TokscaleError: on construction, if the control `frequency` lacks its strata.
    """

    control: Control | None = None
    guards: Guards = field(default_factory=Guards)
    gain: GainSettings = field(default_factory=GainSettings)
    by_frequency: Sequence[CutDataset] = ()

    def __post_init__(self) -> None:
        if self.control == "frequency" and not self.by_frequency:
            raise TokscaleError(
                "the control frequency has no strata; expected the datasets in strata by token "
                "frequency; give them as by_frequency"
            )


def plan_uniform(job: Job, out: Path) -> Plan:
    """Make the plan of the base weights, a control of every policy, and write it to `out`.

    Raises:
        TokscaleError: the file exists, or a dataset is repeated too often.
    """
    return _write(make_plan(job, Uniform(), provenance=PlanProvenance("uniform")), out)


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
    control: PlainControl | None = None,
) -> Plan:
    """Make the plan of weights per dataset from a reference run and write it to `out`.

    Args:
        run: the reference run, with its spectrum.
        job: the job to plan for.
        out: the plan's file; an existing one is not overwritten.
        guards: limits on the plan.
        datasets: the run's dataset for each dataset of the job; by default that of its prefix.
        window: as in `BySpectrum`; so are strength, n_stages and first.
        control: make this control instead.

    Raises:
        TokscaleError: the file exists, the run has no spectrum, or it does not fit the job.
    """
    names = list(datasets or watched_names(run, job.datasets))
    spectra = read_spectra(run).select(names)
    policy = BySpectrum(spectra, window, strength, n_stages, first)
    provenance = PlanProvenance(
        "dataset",
        control,
        sources=PlanSources(run=str(run.path)),
        settings={
            "datasets": names,
            "window": window,
            "strength": strength,
            "n_stages": n_stages,
            "first": first,
        },
    )
    return _write(_controlled(job, policy, guards, provenance), out)


def _controlled(
    job: Job, policy: Policy, guards: Guards | None, provenance: PlanProvenance
) -> Plan:
    """Return the plan of a policy by dataset, or of the control that its provenance names."""
    if provenance.control == "uniform":
        policy = Uniform()
    permute = provenance.control == "permuted"
    return make_plan(job, policy, guards, provenance, permute=permute)


def plan_by_scores(
    policy: ByFall | ByTarget | Frontier, job: Job, out: Path, options: PlanOptions | None = None
) -> Plan:
    """Make the plan of a policy by scores, or a control of it, and write it to `out`.

    What the plan can gain is among the settings of its provenance, where the scores tell.

    Args:
        policy: the policy, with the job's datasets cut into strata (`cut_job`).
        job: the job to plan for.
        out: the plan's file; an existing one is not overwritten.
        options: control, guards, settings of the gain.

    Raises:
        TokscaleError: the file exists, the scores are of several reference runs or lack what the
            policy needs, or these do not fit the job.
    """
    options = options or PlanOptions()
    datasets, control = policy.datasets, options.control
    references = sorted({dataset.details.reference for dataset in datasets})
    if len(references) > 1:
        raise TokscaleError(
            f"the scores are of several reference runs ({', '.join(references)}), whose times "
            "do not compare; expected one; score all the data from one run"
        )
    settings: dict[str, JSON] = {
        each.name: getattr(policy, each.name)
        for each in fields(policy)
        if each.name not in {"datasets", "time_map", "seq_length"}
    }
    settings["cutting"] = asdict(datasets[0].settings)
    time_map = policy.time_map if isinstance(policy, Frontier) else None
    names = dataset_names(job.datasets)
    sources = PlanSources(
        reference=references[0],
        time_map=time_map.run if isinstance(time_map, ByRank) else None,
        scores={each: dataset.scores for each, dataset in zip(names, datasets, strict=True)},
    )
    chosen: Policy = policy
    if control == "uniform":
        chosen = Uniform(datasets)
    if control == "easy-first":
        _check_ranked_by_time(datasets)
        chosen = EasyFirst(datasets, n_stages=policy.n_stages, first=policy.first)
        settings["competence"] = chosen.competence
    drawn = options.by_frequency if control == "frequency" else ()
    provenance = PlanProvenance(_NAMES[type(policy)], control, sources, settings)
    plan = make_plan(
        job, chosen, options.guards, provenance, permute=control == "permuted", drawn=drawn
    )
    estimate = target_shift if isinstance(policy, ByTarget) else gain_of
    gain = estimate(plan, drawn or datasets, options.gain)
    return _write(with_gain(plan, gain) if gain else plan, out)


def _check_ranked_by_time(datasets: Sequence[CutDataset]) -> None:
    by = datasets[0].settings.by
    if by != "learning-time":
        raise TokscaleError(
            f"the strata of the control easy-first are ranked by {by}; expected the order of "
            "learning; give --by learning-time"
        )


def time_map_of(datasets: Sequence[CutDataset], job: Job, run: Run | None = None) -> TokenTimeMap:
    """Return the map of the policy `Frontier` from a training to the reference run of its scores.

    Args:
        datasets: the job's datasets, cut into strata.
        job: the job to plan for.
        run: a run with a spectrum, of the size of the training, whose learning order maps it
            (`ByRank`). None maps equal tokens to each other.

    Raises:
        TokscaleError: the scores have no learning times, or the run has no spectrum or watched
            other data.
    """
    start = min(dataset.log_tokens_range[0] for dataset in datasets)
    end = min(dataset.log_tokens_range[1] for dataset in datasets)
    if run is None:
        return SameTokens(end)
    learned = LearnedByTime.from_run(run, watched_names(run, job.datasets), job.base_D)
    x_G = np.linspace(start, end, _GRID)
    learned_GD = [dataset.learned_by(x_G) @ np.array(dataset.shares) for dataset in datasets]
    return ByRank(learned, x_G, job.base_D @ np.array(learned_GD), str(run.path))


def plan_by_hand(
    manual: Manual,
    job: Job,
    out: Path,
    *,
    guards: Guards | None = None,
    control: PlainControl | None = None,
) -> Plan:
    """Make the plan of weights by hand, or a control of it, and write it to `out`.

    Raises:
        TokscaleError: the file exists, or the weights do not fit the job.
    """
    provenance = PlanProvenance(
        "manual",
        control,
        settings={
            "interpolation": manual.interpolation,
            "points": {str(start): list(weights) for start, weights in manual.points.items()},
        },
    )
    return _write(_controlled(job, manual, guards, provenance), out)


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
