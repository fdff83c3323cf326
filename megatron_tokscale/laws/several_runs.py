"""Laws over several runs: Chinchilla's, and the multi-power law of a run that it has not seen.

Shapes: I runs, K probe steps, T steps.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from megatron_tokscale.core.arrays import Floats
from megatron_tokscale.core.errors import TokscaleError, UndefinedError
from megatron_tokscale.laws.chinchilla import fit_chinchilla
from megatron_tokscale.laws.multi_power.learning_rates import learning_rates
from megatron_tokscale.laws.multi_power.multi_power import LossCurve, fit_multi_power, score
from megatron_tokscale.laws.plain import or_reason, plain
from megatron_tokscale.store import Run, check_same_tokens


def several_runs(runs: Sequence[Run], *, n_resamples: int = 200, seed: int = 0) -> dict[str, Any]:
    """The table of the runs' last losses, and the laws fitted to it.

    Raises:
        TokscaleError: the runs watch different tokens.
    """
    check_same_tokens(runs)
    losses = {run.path: mean_losses(run) for run in runs}
    rows = [_row(run, losses[run.path]) for run in runs]
    return {
        "runs": rows,
        "chinchilla": or_reason(lambda: _chinchilla(rows, n_resamples, seed)),
        "multi_power": or_reason(lambda: _multi_power(runs, losses)),
    }


def mean_losses(run: Run) -> Floats:
    """Mean loss at each probe over the tokens whose losses are finite at all, by blocks."""
    total_K, count = np.zeros(len(run.records)), 0
    for _, loss_NK in run.finite_blocks():
        total_K += loss_NK.sum(axis=0, dtype=np.float64)
        count += len(loss_NK)
    if not count:
        raise TokscaleError(f"no token of {run.path} has finite losses at all probes")
    return total_K / count


def _row(run: Run, loss_K: Floats) -> dict[str, Any]:
    size = run.info.size
    return {
        "name": run.path.name,
        "parameters": size.get("parameters"),
        "non_embedding": size.get("non_embedding"),
        "flops_per_token": size.get("flops_per_token"),
        "tokens": run.records[-1].consumed_tokens,
        "loss": float(loss_K[-1]),
    }


def _chinchilla(rows: list[dict[str, Any]], n_resamples: int, seed: int) -> Any:
    unknown = [row["name"] for row in rows if row["non_embedding"] is None]
    if unknown:
        raise UndefinedError(f"run.json of {unknown[0]} does not say how large its model is")
    if unknown := [row["name"] for row in rows if row["tokens"] is None]:
        raise UndefinedError(f"{unknown[0]} does not know how many tokens it has consumed")
    columns = [[row[name] for row in rows] for name in ("non_embedding", "tokens", "loss")]
    return plain(fit_chinchilla(*columns, n_resamples=n_resamples, seed=seed))


def _multi_power(runs: Sequence[Run], losses: dict[Any, Floats]) -> Any:
    """Of the model that is there most often: fitted to the shorter runs, scored on the longest.

    Runs with the schedule of the longest are in neither part: it is to be one that was not seen.
    """
    sizes = [run.info.size.get("parameters") for run in runs]
    common = max(sizes, key=sizes.count)
    alike = [run for run, size in zip(runs, sizes, strict=True) if size == common]
    longest = max(alike, key=lambda run: int(run.step_K[-1]))
    shorter = [run for run in alike if run.step_K[-1] < longest.step_K[-1]]
    if common is None or not shorter:
        raise UndefinedError("no shorter run of the same model: no schedule to predict another by")
    law = fit_multi_power([_curve(run, losses[run.path]) for run in shorter])
    held_out = _curve(longest, losses[longest.path])
    predicted_I = law.predict(held_out.learning_rate_T, held_out.step_I)
    return {
        "fitted_on": [run.path.name for run in shorter],
        "held_out": longest.path.name,
        "law": plain(law),
        "score": plain(score(predicted_I, held_out.loss_I)),
        "last_loss": float(held_out.loss_I[-1]),
        "last_loss_predicted": float(predicted_I[-1]),
    }


def _curve(run: Run, loss_K: Floats) -> LossCurve:
    """The losses after the warm-up; the probe after n steps is at the n-th rate, from 0."""
    rate_T = learning_rates(run)
    later_K = run.step_K > max(int(rate_T.argmax()), len(rate_T) // 10)
    return LossCurve(rate_T, run.step_K[later_K] - 1, loss_K[later_K])
