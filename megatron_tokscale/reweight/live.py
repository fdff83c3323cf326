"""Weights of the datasets from the losses of a run that is still training.

    python -m megatron_tokscale.reweight.live RUN --until STEP

prints {"weights": [...]}, or {"reason": "..."} where the losses define no weights. A training job
starts it (`--tokscale-replan-interval`); run by hand, the command prints the same.

A dataset's learnability is taken to be its present slope: -dL/dx of its watched tokens over the
last factor of two of training, x = ln(step). That is the drop-weighted spectrum at the present,
seen through the width of the transitions; a fit cannot place a transition that has not begun.

Shapes: D datasets, Z strata, K probe steps.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np

from megatron_tokscale.core.arrays import Floats
from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.corpus.names import listed
from megatron_tokscale.data import Decision, Plan, dataset_names, followed_plan, with_decisions
from megatron_tokscale.reweight.guards import apply_floor, limit_change
from megatron_tokscale.store import Run

WINDOW: Final = 2.0  # factor of steps under a slope; our choice: recent, yet above noise
_FEWEST_PROBES: Final = 4  # least probes under a slope; our choice: a line has two parameters


def decide(run: Run, plan: Plan, step: int) -> Floats:
    """Return weights of the plan's datasets, summing to one, from the losses up to `step`.

    A weight is the base weight times (slope / mean slope) ** strength, with the base weights and
    the strength of the plan's `replanning`. Then its limits apply: the floor; the limit on change
    against the weights that hold now or are decided already; and the plan's limit on epochs, which
    shortens the move until every growing stratum stays within it to the end of training.

    Raises:
        TokscaleError: the run does not watch a dataset, has too few probes, or no loss falls.
    """
    records = [record for record in run.records if record.step <= step]
    if not records or records[-1].step != step:
        raise TokscaleError(
            f"{run.path} has no losses of step {step}; expected a probe there; give another --until"
        )
    settings = plan.replanning
    now = max([records[-1].consumed_samples, *(decision.start for decision in plan.decisions)])
    current_D = np.array(plan.intervals(now + 1)[-1][2].weights)
    base_D = np.array(settings.base_weights or plan.segments[0].weights)
    base_D = base_D / base_D.sum()

    # The weights by the slopes.
    slope_D = slopes(run, plan, step)
    mean = float(base_D @ slope_D)
    if mean <= 0:
        raise TokscaleError("no dataset's loss falls; expected one that does; the weights stay")
    wanted_D = base_D * (slope_D / mean) ** settings.strength

    # The floor and the limit on change.
    wanted_D = apply_floor((wanted_D / wanted_D.sum())[None], base_D, settings.floor)
    weight_D = limit_change(np.stack([current_D, wanted_D[0]]), settings.max_change)[1]

    # The limit on epochs.
    if plan.max_epochs is None:
        return np.asarray(weight_D)
    n_samples = _train_samples(run, plan, step)
    kept_Z, moved_Z = (
        with_decisions(plan, [Decision(step, now, tuple(row_D))]).target_Z(n_samples)
        for row_D in (current_D, weight_D)
    )
    grows = moved_Z > kept_Z
    room_Z = plan.max_epochs * _epoch_samples_Z(plan) - kept_Z
    fraction = (room_Z[grows] / (moved_Z - kept_Z)[grows]).clip(0, 1).min(initial=1.0)
    return np.asarray(current_D + fraction * (weight_D - current_D))


def slopes(run: Run, plan: Plan, step: int) -> Floats:
    """Return -dL/dx of each dataset at `step`, in nats, by least squares; 0 for a rising loss.

    Raises:
        TokscaleError: the run does not watch a dataset, or has too few probes.
    """
    names = list(run.probe_set.datasets)
    datasets = run.probe_set.dataset_indices([row.path for row in plan.datasets])
    rows = zip(dataset_names(plan.datasets), datasets, strict=True)
    if missing := [name for name, dataset in rows if dataset is None]:
        raise TokscaleError(
            f"the probe set watches no tokens of {listed(missing)}; expected all datasets of the "
            "plan; build the probe set from them"
        )
    step_K = np.array(run.step_K)
    chosen = np.flatnonzero((step_K <= step) & (step_K * WINDOW >= step) & (step_K > 0))
    if len(chosen) < _FEWEST_PROBES:
        raise TokscaleError(
            f"{len(chosen)} of the {_FEWEST_PROBES} probes that a slope needs are there since step "
            f"{step / WINDOW:.0f}; probe more often"
        )
    loss_DK = np.stack([_mean_losses(run, int(at), names) for at in step_K[chosen]], axis=1)
    loss_DK = loss_DK[[dataset for dataset in datasets if dataset is not None]]
    for name, loss_K in zip(dataset_names(plan.datasets), loss_DK, strict=True):
        if np.isnan(loss_K).any():
            at = step_K[chosen][np.isnan(loss_K)][0]
            raise TokscaleError(
                f"a dataset has no finite losses: {name} at step {at}; expected some at each of "
                f"the probes since step {step / WINDOW:.0f}; the weights stay"
            )
    x_K = np.log(step_K[chosen])
    slope_D = -np.polynomial.polynomial.polyfit(x_K, loss_DK.T, 1)[1]
    return np.asarray(np.maximum(slope_D, 0.0))


def _mean_losses(run: Run, step: int, names: Sequence[str]) -> Floats:
    """Return the mean loss of each dataset at a probe step, over tokens with a finite loss."""
    loss_N = run.read_losses_at(step).astype(np.float64)
    finite_N = np.isfinite(loss_N)
    dataset_N = run.probe_set.dataset_N
    total_D = np.bincount(dataset_N, np.where(finite_N, loss_N, 0.0), len(names))
    count_D = np.bincount(dataset_N, finite_N, len(names))
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
        print(json.dumps({"weights": weights.tolist()}))
    except TokscaleError as error:
        print(json.dumps({"reason": str(error)}))


if __name__ == "__main__":
    main(sys.argv[1:])
