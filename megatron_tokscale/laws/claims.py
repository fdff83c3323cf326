"""Rows of a table of claims: of a law that both runs and tables of curves have."""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_tokscale.core.words import time_text
from megatron_tokscale.results.estimate import Undefined, format_estimate
from megatron_tokscale.results.laws import (
    ChinchillaForecast,
    Deceleration,
    ExplanationRow,
    OneThirdLaw,
    ScheduleForecast,
    deceleration,
    one_third,
    several_runs,
)
from megatron_tokscale.results.verdict import Claim, ClaimTest, holm

ONE_THIRD = "one-third law (softmax)"
DECELERATION = "loss deceleration"
CHINCHILLA = "Chinchilla"
MULTI_POWER = "multi-power law"


@dataclass(frozen=True)
class ClaimRow:
    """A row before the correction for the number of tests.

    Attributes:
        explanation: name of the theory.
        test: test of its claim.
        predicted: the prediction and its margin, in words.
        measured: the measured number, in words.
    """

    explanation: str
    test: ClaimTest
    predicted: str
    measured: str


def corrected(rows: Sequence[ClaimRow]) -> tuple[ExplanationRow, ...]:
    """Return the rows with Holm's correction; they are one family."""
    tests = holm([row.test for row in rows])
    return tuple(
        ExplanationRow(
            row.explanation,
            test.claim.name,
            row.predicted,
            row.measured,
            test.verdict,
            test.p_value,
        )
        for row, test in zip(rows, tests, strict=True)
    )


def undecided(name: str, claim: Claim, reason: Undefined, predicted: str = "-") -> ClaimRow:
    """Return the row of a number that is undefined."""
    return ClaimRow(name, ClaimTest.of(claim, reason), predicted, reason.undefined)


def one_third_row(law: OneThirdLaw | Undefined) -> ClaimRow:
    """Return the row of the exponent in the summed learning rate."""
    if isinstance(law, Undefined):
        return undecided(ONE_THIRD, one_third.CLAIM, law)
    measured = format_estimate(law.exponent)
    return ClaimRow(ONE_THIRD, law.test, f"1/3: {law.test.claim.rule}", measured)


def deceleration_row(law: Deceleration | Undefined) -> ClaimRow:
    """Return the row of the break to a slower power law."""
    if isinstance(law, Undefined):
        return undecided(DECELERATION, deceleration.CLAIM, law)
    measured = (
        f"late rate over early {format_estimate(law.rate_ratio)}; break at "
        f"{time_text(law.break_step.value)}, rate {law.early_rate:.3f} to "
        f"{law.late_rate.value:.3f}; delta BIC {law.delta_bic:.1f}"
    )
    return ClaimRow(DECELERATION, law.test, f"a ratio {law.test.claim.rule}", measured)


def chinchilla_row(forecast: ChinchillaForecast | Undefined) -> ClaimRow:
    """Return the row of the forecast of the largest model."""
    if isinstance(forecast, Undefined):
        return undecided(CHINCHILLA, several_runs.CHINCHILLA_CLAIM, forecast)
    measured = f"mean relative error {format_estimate(forecast.error, '+.4f')}"
    rule = forecast.test.claim.rule
    return ClaimRow(CHINCHILLA, forecast.test, f"an error {rule}", measured)


def multi_power_rows(forecasts: Sequence[ScheduleForecast] | Undefined) -> list[ClaimRow]:
    """Return the rows of the forecasts of schedules."""
    if isinstance(forecasts, Undefined):
        return [undecided(MULTI_POWER, several_runs.MULTI_POWER_CLAIM, forecasts)]
    return [_schedule_row(each) for each in forecasts]


def _schedule_row(forecast: ScheduleForecast) -> ClaimRow:
    score = forecast.score
    measured = (
        f"{forecast.held_out}: mean relative error {format_estimate(score.mean_relative, '.4f')}, "
        f"R^2 {score.r2:.3f}, last loss {forecast.last_loss_predicted:.3f} for "
        f"{forecast.last_loss:.3f}"
    )
    rule = forecast.test.claim.rule
    return ClaimRow(MULTI_POWER, forecast.test, f"an error {rule}", measured)
