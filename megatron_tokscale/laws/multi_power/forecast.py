"""Forecast of the longest run's losses by the multi-power law of shorter runs of the same model.

Shapes: K probe steps, T steps.
"""

from collections.abc import Sequence

from megatron_tokscale.core.arrays import Floats
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


def forecast_longest(runs: Sequence[Run], losses: Sequence[Floats]) -> ScheduleForecast:
    """Fit the law to shorter runs of the commonest model size, and score it on the longest run.

    Other runs as long as it are left out: they may have its schedule, which must not be fitted.

    Args:
        runs: the runs.
        losses: loss_K of each run, in nats.

    Raises:
        UndefinedError: there is no shorter run of the same model, the learning rates of a run are
            not known, or as in `fit_multi_power`.
    """
    sizes = [run.info.size.get("parameters") for run in runs]
    common = max(sizes, key=sizes.count)
    alike = [
        (run, loss_K)
        for run, size, loss_K in zip(runs, sizes, losses, strict=True)
        if size == common
    ]
    longest, longest_loss_K = max(alike, key=lambda pair: int(pair[0].step_K[-1]))
    shorter = [pair for pair in alike if pair[0].step_K[-1] < longest.step_K[-1]]
    if common is None or not shorter:
        raise UndefinedError(
            "there is no shorter run of the same model, so no schedule to fit; give one"
        )
    law = fit_multi_power([_loss_curve(*pair) for pair in shorter])
    held_out = _loss_curve(longest, longest_loss_K)
    predicted_I = predict_losses(law, held_out.learning_rate_T, held_out.step_I)
    return ScheduleForecast(
        fitted_on=tuple(run.path.name for run, _ in shorter),
        held_out=longest.path.name,
        law=law,
        score=score_forecast(predicted_I, held_out.loss_I),
        last_loss=float(held_out.loss_I[-1]),
        last_loss_predicted=float(predicted_I[-1]),
    )


def _loss_curve(run: Run, loss_K: Floats) -> LossCurve:
    """Return the losses after the warm-up.

    The probe after n steps belongs to step n - 1, as steps are counted from 0.
    """
    rate_T = learning_rates(run)
    later_K = run.step_K > max(int(rate_T.argmax()), len(rate_T) // _LEAST_SKIPPED)
    return LossCurve(rate_T, run.step_K[later_K] - 1, loss_K[later_K])
