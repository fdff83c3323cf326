"""The table of explanations: each theory's claims on a run, with predictions and measurements.

A function per theory returns its rows; `explanations` joins them, and corrects their verdicts as
one family.
"""

from dataclasses import dataclass

from megatron_tokscale.results.estimate import Undefined, format_estimate
from megatron_tokscale.results.laws import (
    CagnettaResult,
    Deceleration,
    ExplanationRow,
    GroupTest,
    LawsResult,
    OneThirdResult,
    QuantaResult,
    ScheduleForecast,
    SeveralRuns,
    language,
    one_third,
    power_law,
    quanta,
)
from megatron_tokscale.results.laws import deceleration as deceleration_claims
from megatron_tokscale.results.laws import several_runs as runs_claims
from megatron_tokscale.results.verdict import Claim, ClaimTest, holm

SPECTRUM = "learning-time spectrum"


@dataclass(frozen=True)
class _Row:
    """A row before the correction for the number of tests."""

    explanation: str
    test: ClaimTest
    predicted: str
    measured: str


def explanations(laws: LawsResult) -> tuple[ExplanationRow, ...]:
    """Return the rows of the table; all its claims are one family (Holm).

    Args:
        laws: laws of a run; its own table is not read.
    """
    rows = [
        _tail(laws),
        *_one_third(laws.one_third),
        _quanta(laws.quanta),
        _cagnetta(laws.cagnetta),
        _deceleration(laws.deceleration),
        *_several(laws.several),
    ]
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


def _tail(laws: LawsResult) -> _Row:
    difference = laws.tail_minus_law
    if isinstance(difference, Undefined):
        return _undecided(SPECTRUM, power_law.CLAIM, difference)
    tail = Undefined("") if isinstance(laws.tail, Undefined) else laws.tail.exponent
    measured = (
        f"alpha = {format_estimate(tail)} for {format_estimate(difference.law.exponent_documents)}"
    )
    predicted = f"a difference {difference.test.claim.rule}"
    return _Row(SPECTRUM, difference.test, predicted, measured)


def _one_third(theory: OneThirdResult | Undefined) -> list[_Row]:
    name = "one-third law (softmax)"
    if isinstance(theory, Undefined):
        return [_undecided(name, one_third.CLAIM, theory)]
    law = theory.law
    measured = format_estimate(law.exponent)
    exponent = _Row(name, law.test, f"1/3: {law.test.claim.rule}", measured)
    return [exponent, _frequency_groups(name, theory.frequency_groups)]


def _frequency_groups(name: str, groups: GroupTest | Undefined) -> _Row:
    if isinstance(groups, Undefined):
        return _undecided(name, one_third.GROUP_CLAIM, groups)
    slope, times = (groups.models[model].held_out_error for model in ("one slope", "own times"))
    measured = f"held-out error {slope:.3g} with one slope, {times:.3g} with own times"
    return _Row(name, groups.test, "one slope errs less", measured)


def _quanta(theory: QuantaResult) -> _Row:
    name, frequency = "quantization model", theory.frequency
    if isinstance(frequency, Undefined):
        return _undecided(name, quanta.CLAIM, frequency)
    measured = (
        f"frequency^-b with b = {format_estimate(frequency.b)}, onset {frequency.onset:,.4g}; "
        f"without an onset {format_estimate(frequency.b_without_onset)}"
    )
    return _Row(name, frequency.test, f"b = 1: {frequency.test.claim.rule}", measured)


def _cagnetta(theory: CagnettaResult) -> _Row:
    name = "statistics of the language"
    gamma, beta, comparison = theory.gamma, theory.beta, theory.comparison
    if isinstance(theory.predicted, Undefined):
        found = {
            "gamma": gamma.undefined
            if isinstance(gamma, Undefined)
            else format_estimate(gamma.gamma),
            "beta": beta.undefined if isinstance(beta, Undefined) else format_estimate(beta.beta),
        }
        measured = "; ".join(f"{each}: {words}" for each, words in found.items())
        return _undecided(name, language.CLAIM, Undefined(measured))
    predicted = f"alpha_D = {format_estimate(theory.predicted.exponent)}"
    if isinstance(comparison, Undefined):
        return _undecided(name, language.CLAIM, comparison, predicted)
    measured = f"predicted minus measured {format_estimate(comparison.difference)}"
    return _Row(
        name, comparison.test, f"{predicted}; difference {comparison.test.claim.rule}", measured
    )


def _deceleration(theory: Deceleration | Undefined) -> _Row:
    name = "loss deceleration"
    if isinstance(theory, Undefined):
        return _undecided(name, deceleration_claims.CLAIM, theory)
    measured = (
        f"late rate over early {format_estimate(theory.rate_ratio)}; break at step "
        f"{theory.break_step.value:,.0f}, rate {theory.early_rate:.3f} to "
        f"{theory.late_rate.value:.3f}; delta BIC {theory.delta_bic:.1f}"
    )
    return _Row(name, theory.test, f"a ratio {theory.test.claim.rule}", measured)


def _several(theory: SeveralRuns | None) -> list[_Row]:
    if theory is None:
        return []
    forecast, name = theory.chinchilla_forecast, "Chinchilla"
    if isinstance(forecast, Undefined):
        rows = [_undecided(name, runs_claims.CHINCHILLA_CLAIM, forecast)]
    else:
        measured = f"mean relative error {format_estimate(forecast.error, '+.4f')}"
        rows = [_Row(name, forecast.test, f"an error {forecast.test.claim.rule}", measured)]
    name = "multi-power law"
    if isinstance(theory.multi_power, Undefined):
        return [*rows, _undecided(name, runs_claims.MULTI_POWER_CLAIM, theory.multi_power)]
    return [*rows, *(_schedule(name, each) for each in theory.multi_power)]


def _schedule(name: str, forecast: ScheduleForecast) -> _Row:
    score = forecast.score
    measured = (
        f"{forecast.held_out}: mean relative error {format_estimate(score.mean_relative, '.4f')}, "
        f"R^2 {score.r2:.3f}, last loss {forecast.last_loss_predicted:.3f} for "
        f"{forecast.last_loss:.3f}"
    )
    return _Row(name, forecast.test, f"an error {forecast.test.claim.rule}", measured)


def _undecided(name: str, claim: Claim, reason: Undefined, predicted: str = "-") -> _Row:
    return _Row(name, ClaimTest.of(claim, reason), predicted, reason.undefined)
