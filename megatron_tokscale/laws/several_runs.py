"""Laws over several runs: Chinchilla's law, and the forecast of a run that was not fitted.

Shapes: K probe steps.
"""

from collections.abc import Sequence

from megatron_tokscale.core.arrays import Floats
from megatron_tokscale.laws.chinchilla import chinchilla_over_runs, forecast_chinchilla
from megatron_tokscale.laws.multi_power.forecast import forecast_runs
from megatron_tokscale.results.estimate import defined_or_reason
from megatron_tokscale.results.laws import RunLoss, SeveralRuns
from megatron_tokscale.store import Run, check_same_tokens


def several_runs(runs: Sequence[Run], *, n_resamples: int, seed: int) -> SeveralRuns:
    """Fit the laws over runs to the runs' mean losses.

    Args:
        runs: runs with the same probe set.
        n_resamples: number of bootstrap resamples of Chinchilla's law.
        seed: seed of the bootstrap.

    Raises:
        TokscaleError: the runs watch different tokens, or no token of a run has finite losses.
    """
    check_same_tokens(runs)
    losses = [run.mean_losses() for run in runs]
    rows = tuple(_last_loss(run, loss_K) for run, loss_K in zip(runs, losses, strict=True))
    return SeveralRuns(
        runs=rows,
        chinchilla=defined_or_reason(lambda: chinchilla_over_runs(rows, n_resamples, seed)),
        chinchilla_forecast=defined_or_reason(
            lambda: forecast_chinchilla(rows, n_resamples=n_resamples, seed=seed)
        ),
        multi_power=defined_or_reason(lambda: forecast_runs(runs, losses)),
    )


def _last_loss(run: Run, loss_K: Floats) -> RunLoss:
    size = run.info.size
    return RunLoss(
        name=run.path.name,
        parameters=size.get("parameters"),
        non_embedding=size.get("non_embedding"),
        flops_per_token=size.get("flops_per_token"),
        tokens=run.records[-1].consumed_tokens,
        loss=float(loss_K[-1]),
    )
