"""Forecast of the longest runs' losses by the multi-power law of shorter runs of the same model.

Shapes: K probe steps, T steps.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from megatron_tokscale.core.arrays import Floats, Integers
from megatron_tokscale.core.errors import UndefinedError
from megatron_tokscale.laws.multi_power.learning_rates import learning_rates
from megatron_tokscale.laws.multi_power.multi_power import (
    LossCurve,
    fit_multi_power,
    predict_losses,
    score_forecast,
)
from megatron_tokscale.results.laws import ScheduleForecast
from megatron_tokscale.store import Run

_LEAST_SKIPPED = 10  # one over the share of first steps that are left out (docs/references.md 8.4)


@dataclass(frozen=True)
class NamedCurve:
    """The loss curve of one run after its warm-up, and the run's name."""

    name: str
    curve: LossCurve

    @classmethod
    def after_warmup(cls, name: str, rate_T: Floats, step_K: Integers, loss_K: Floats) -> Self:
        """Return the losses after the warm-up, and after the first tenth of the steps.

        The loss after n steps belongs to step n - 1, as steps are counted from 0.

        Args:
            name: name of the run.
            rate_T: learning rate of every step from 0 on.
            step_K: number of steps before each loss.
            loss_K: the losses, in nats.

        Raises:
            TokscaleError, UndefinedError: as in `LossCurve`.
        """
        later_K = step_K > max(int(rate_T.argmax()), len(rate_T) // _LEAST_SKIPPED)
        return cls(name, LossCurve(rate_T, step_K[later_K] - 1, loss_K[later_K]))

    @property
    def n_steps(self) -> int:
        """Number of steps of the schedule."""
        return len(self.curve.learning_rate_T)


def forecast_longest(curves: Sequence[NamedCurve]) -> tuple[ScheduleForecast, ...]:
    """Fit the law to the shorter runs of one model, and score it on each of the longest runs.

    Runs as long as the longest are never fitted: they may share a schedule with it.

    Raises:
        UndefinedError: there is no shorter run, or as in `fit_multi_power`.
    """
    longest = max((each.n_steps for each in curves), default=0)
    shorter = [each for each in curves if each.n_steps < longest]
    if not shorter:
        raise UndefinedError(
            "there is no shorter run of the same model, so no schedule to fit; give one"
        )
    law = fit_multi_power([each.curve for each in shorter])
    forecasts = []
    for held_out in (each for each in curves if each.n_steps == longest):
        curve = held_out.curve
        predicted_I = predict_losses(law, curve.learning_rate_T, curve.step_I)
        forecasts.append(
            ScheduleForecast(
                fitted_on=tuple(each.name for each in shorter),
                held_out=held_out.name,
                law=law,
                score=score_forecast(predicted_I, curve.loss_I),
                last_loss=float(curve.loss_I[-1]),
                last_loss_predicted=float(predicted_I[-1]),
            )
        )
    return tuple(forecasts)


def forecast_runs(runs: Sequence[Run], losses: Sequence[Floats]) -> tuple[ScheduleForecast, ...]:
    """Return the forecasts of the longest runs of the commonest model size.

    Args:
        runs: the runs.
        losses: loss_K of each run, in nats.

    Raises:
        UndefinedError: no size is known, the learning rates of a run are not known, or as in
            `forecast_longest`.
    """
    measures = ("parameters", "non_embedding", "flops_per_token")
    known = [each for each in measures if all(each in run.info.size for run in runs)]
    sizes = [run.info.size.get(known[0] if known else measures[0]) for run in runs]
    common = max(sizes, key=sizes.count)
    if common is None:
        raise UndefinedError("the sizes of the models are not known, so no runs are of one model")
    return forecast_longest(
        [
            NamedCurve.after_warmup(run.path.name, learning_rates(run), run.step_K, loss_K)
            for run, size, loss_K in zip(runs, sizes, losses, strict=True)
            if size == common
        ]
    )
