"""Weights of datasets, or of the strata within them, from the losses of a run that still trains.

    python -m megatron_tokscale.reweight.live RUN --until STEP

prints {"weights": [...], "within": [...]}, or {"reason": "..."} where the losses define no weights.
A training job starts it (`--tokscale-replan-interval`); run by hand, the command prints the same.

The learnability of a dataset or a stratum is taken to be its present slope: -dL/dx of its watched
tokens over the last factor of two of training, x = ln(step). That is the drop-weighted spectrum at
the present, seen through the width of the transitions; a fit cannot place a transition that has not
begun. Strata are weighed if one of the run's probe sets watches them: the documents that the plan
keeps out of the training (`probe build --plan`).

Shapes: D datasets, Z strata, P parts (all datasets, or all strata), K probe steps.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np

from megatron_tokscale.core.arrays import Floats
from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.corpus.names import listed
from megatron_tokscale.data import Decision, Plan, dataset_names, followed_plan, with_decisions
from megatron_tokscale.reweight.guards import apply_floor, limit_change, limit_shares
from megatron_tokscale.reweight.stages import tilt
from megatron_tokscale.store import LossRecord, Run

WINDOW: Final = 2.0  # factor of steps under a slope; our choice: recent, yet above noise
_FEWEST_PROBES: Final = 4  # least probes under a slope; our choice: a line has two parameters


class LiveWeights(NamedTuple):
    """Weights that are decided while a run trains.

    Attributes:
        weights: weight of each dataset, summing to one.
        within: weight of each stratum among all, where strata are weighed; else None.
    """

    weights: tuple[float, ...]
    within: tuple[float, ...] | None


def decide(run: Run, plan: Plan, step: int) -> LiveWeights:
    """Return weights of the plan's datasets, or of its strata, from the losses up to `step`.

    A weight is the base weight times (slope / mean slope) ** strength, with the base weights and
    the strength of the plan's `replanning`. Then its limits apply: of strata the limit on shares of
    datasets; the floor; the limit on change against the weights that hold now or are decided
    already; and the plan's limit on epochs, which shortens the move until every growing stratum
    stays within it to the end of training.

    Raises:
        TokscaleError: the run does not watch a dataset, has too few probes, or no loss falls.
    """
    settings = plan.replanning
    consumed = _record_at(run, step).consumed_samples
    now = max([consumed, *(decision.start for decision in plan.decisions)])
    segment = plan.intervals(now + 1)[-1][2]
    base_D = np.array(settings.base_weights or plan.segments[0].weights)
    base_D = base_D / base_D.sum()

    # The parts, their base weights and their present weights.
    strata = strata_run(run, plan)
    if strata is None:
        base_P, current_P = base_D, np.array(segment.weights)
        slope_P = slopes(run, plan, step)
    else:
        base_P, current_P = base_D[plan.dataset_Z] * plan.share_Z, plan.weight_Z(segment)
        slope_P = strata_slopes(strata, plan, step)

    # The weights by the slopes.
    if base_P @ slope_P <= 0:
        part = "dataset" if strata is None else "stratum"
        raise TokscaleError(f"no {part}'s loss falls; expected one that does; the weights stay")
    wanted_1P = tilt(settings.strength, base_P, slope_P)[None]

    # The limits on shares, the floor and the limit on change.
    if strata is not None and settings.share_limit is not None:
        dataset_Z = plan.dataset_Z.astype(np.int64)
        wanted_1P = limit_shares(wanted_1P, base_P, dataset_Z, settings.share_limit)
    wanted_1P = apply_floor(wanted_1P, base_P, settings.floor)
    weight_P = limit_change(np.concatenate([current_P[None], wanted_1P]), settings.max_change)[1]

    # The limit on epochs.
    if plan.max_epochs is not None:
        n_samples = _train_samples(run, plan, step)
        kept_Z, moved_Z = (
            with_decisions(plan, [_decision(plan, step, now, row_P)]).target_Z(n_samples)
            for row_P in (current_P, weight_P)
        )
        grows = moved_Z > kept_Z
        room_Z = plan.max_epochs * _epoch_samples_Z(plan) - kept_Z
        fraction = (room_Z[grows] / (moved_Z - kept_Z)[grows]).clip(0, 1).min(initial=1.0)
        weight_P = current_P + fraction * (weight_P - current_P)
    decision = _decision(plan, step, now, weight_P)
    return LiveWeights(decision.weights, decision.within)


def _decision(plan: Plan, step: int, start: int, weight_P: Floats) -> Decision:
    """Return the decision for weights of datasets, or of all strata."""
    if len(weight_P) == len(plan.datasets):
        return Decision(step, start, tuple(weight_P.tolist()))
    weight_D = np.bincount(plan.dataset_Z, weight_P)
    return Decision(step, start, tuple(weight_D.tolist()), tuple(weight_P.tolist()))


def _record_at(run: Run, step: int) -> LossRecord:
    """Return the record of a probe step.

    Raises:
        TokscaleError: the run has no losses of that step.
    """
    found = [record for record in run.records if record.step == step]
    if not found:
        raise TokscaleError(
            f"{run.path} has no losses of step {step}; expected a probe there; give another --until"
        )
    return found[0]


def strata_run(run: Run, plan: Plan) -> Run | None:
    """Return the run of the first probe set that watches the plan's strata; None without one."""
    names = {stratum.name for stratum in plan.strata}
    if len(names) == len(plan.datasets):
        return None
    runs = (run, *map(Run.open, run.paths.probe_sets))
    return next((each for each in runs if set(each.probe_set.datasets) <= names), None)


def slopes(run: Run, plan: Plan, step: int) -> Floats:
    """Return -dL/dx of each dataset at `step`, in nats, by least squares; 0 for a rising loss.

    Raises:
        TokscaleError: the run does not watch a dataset, or has too few probes.
    """
    datasets = run.probe_set.dataset_indices([row.path for row in plan.datasets])
    names = dataset_names(plan.datasets)
    rows = zip(names, datasets, strict=True)
    if missing := [name for name, dataset in rows if dataset is None]:
        raise TokscaleError(
            f"the probe set watches no tokens of {listed(missing)}; expected all datasets of the "
            "plan; build the probe set from them"
        )
    return _slopes_of(run, step, names, [index for index in datasets if index is not None])


def strata_slopes(run: Run, plan: Plan, step: int) -> Floats:
    """Return -dL/dx of each stratum at `step`, in nats; 0 for a rising loss.

    A stratum that keeps no documents out of the training is taken to fall as its dataset's others.

    Args:
        run: the run of the probe set that watches the strata.
        plan: the plan.
        step: the probe step.

    Raises:
        TokscaleError: no stratum of a dataset is watched, or the run has too few probes.
    """
    _record_at(run, step)
    places = {name: place for place, name in enumerate(run.probe_set.datasets)}
    is_watched_Z = np.array([stratum.name in places for stratum in plan.strata])
    watched = [stratum.name for stratum in plan.strata if stratum.name in places]
    slope_Z = np.zeros(plan.n_strata)
    slope_Z[is_watched_Z] = _slopes_of(run, step, watched, [places[name] for name in watched])
    share_Z = plan.share_Z * is_watched_Z
    share_D = np.bincount(plan.dataset_Z, share_Z)
    if (share_D == 0).any():
        name = dataset_names(plan.datasets)[int(np.argmin(share_D))]
        raise TokscaleError(
            f"{run.path} watches no stratum of {name}; expected one at least; build its probe set "
            "with `megatron-tokscale probe build --plan`"
        )
    mean_D = np.bincount(plan.dataset_Z, share_Z * slope_Z) / share_D
    return np.where(is_watched_Z, slope_Z, mean_D[plan.dataset_Z])


def _slopes_of(run: Run, step: int, names: Sequence[str], indices: Sequence[int]) -> Floats:
    """Return the slopes of some datasets of the probe set, by their numbers there."""
    step_K = np.array(run.step_K)
    chosen = np.flatnonzero((step_K <= step) & (step_K * WINDOW >= step) & (step_K > 0))
    if len(chosen) < _FEWEST_PROBES:
        raise TokscaleError(
            f"{len(chosen)} of the {_FEWEST_PROBES} probes that a slope needs are there since step "
            f"{step / WINDOW:.0f}; probe more often"
        )
    loss_PK = np.stack([_mean_losses(run, int(at)) for at in step_K[chosen]], axis=1)[list(indices)]
    for name, loss_K in zip(names, loss_PK, strict=True):
        if np.isnan(loss_K).any():
            at = step_K[chosen][np.isnan(loss_K)][0]
            raise TokscaleError(
                f"a dataset has no finite losses: {name} at step {at}; expected some at each of "
                f"the probes since step {step / WINDOW:.0f}; the weights stay"
            )
    x_K = np.log(step_K[chosen])
    slope_P = -np.polynomial.polynomial.polyfit(x_K, loss_PK.T, 1)[1]
    return np.asarray(np.maximum(slope_P, 0.0))


def _mean_losses(run: Run, step: int) -> Floats:
    """Return the mean loss of each watched dataset at a probe step, over finite losses."""
    loss_N = run.read_losses_at(step).astype(np.float64)
    finite_N = np.isfinite(loss_N)
    dataset_N, n_datasets = run.probe_set.dataset_N, len(run.probe_set.datasets)
    total_D = np.bincount(dataset_N, np.where(finite_N, loss_N, 0.0), n_datasets)
    count_D = np.bincount(dataset_N, finite_N, n_datasets)
    with np.errstate(invalid="ignore"):
        return np.asarray(total_D / count_D)


def _train_samples(run: Run, plan: Plan, step: int) -> int:
    """Return the samples consumed at the end of the job that continues from `step`.

    Raises:
        TokscaleError: neither the plan nor the run holds the end of the training.
    """
    if plan.replanning.train_samples is not None:
        return plan.replanning.train_samples
    n_samples = run.launch_of(step + 1).planned_samples()
    if n_samples is None:
        raise TokscaleError(
            f"run.json of {run.path} does not say how long the job trains; expected its iterations "
            "and batch size, or the plan's samples; make the plan with --train-samples"
        )
    return n_samples


def _epoch_samples_Z(plan: Plan) -> Floats:
    """Return each stratum's samples; if the plan lacks them, from the whole datasets."""
    if plan.replanning.stratum_samples:
        return np.array(plan.replanning.stratum_samples, dtype=np.float64)
    every = [dataset.n_tokens // plan.seq_length for dataset in plan.datasets]
    sizes_D = np.array(plan.replanning.epoch_samples or every, dtype=np.int64)
    return plan.sizes_Z(sizes_D).astype(np.float64)


def main(argv: Sequence[str]) -> None:
    """Print the weights of `decide`, or the reason why there are none, as JSON."""
    parser = argparse.ArgumentParser(prog="python -m megatron_tokscale.reweight.live")
    parser.add_argument("run", type=Path)
    parser.add_argument("--until", type=int, required=True, metavar="STEP")
    arguments = parser.parse_args(argv)
    try:
        weights = decide(Run.open(arguments.run), followed_plan(arguments.run), arguments.until)
        print(json.dumps(weights._asdict()))
    except TokscaleError as error:
        print(json.dumps({"reason": str(error)}))


if __name__ == "__main__":
    main(sys.argv[1:])
