"""The table of explanations: each theory's claims on a run, with predictions and measurements.

A function per theory returns its rows; `explanations` joins them.
"""

from megatron_tokscale.results.estimate import Undefined, format_estimate
from megatron_tokscale.results.evidence import Locality
from megatron_tokscale.results.laws import (
    CagnettaResult,
    ClaimVerdict,
    Deceleration,
    ExplanationRow,
    GroupTest,
    GroupVerdict,
    LawsResult,
    OneThirdResult,
    QuantaResult,
    SeveralRuns,
)
from megatron_tokscale.results.verdict import Verdict

SPECTRUM = "learning-time spectrum"
_VERDICTS = {
    Verdict.HOLDS: ClaimVerdict.HOLDS,
    Verdict.FAILS: ClaimVerdict.DOES_NOT_HOLD,
    Verdict.UNDECIDED: ClaimVerdict.UNDECIDED,
}
_B_OF_THEORY, _B_OF_PARITY = 1.0, 0.81  # docs/references.md 4.1 and 4.2
_AGREES_AT_5_PERCENT = 1.96  # greatest |z| at which two exponents agree, at the 5% level


def explanations(laws: LawsResult, widths: Locality) -> tuple[ExplanationRow, ...]:
    """Return the rows of the table.

    Args:
        laws: laws of a run; its own table is not read.
        widths: the test of locality of the run's transitions.
    """
    return (
        _locality(widths),
        _tail(laws),
        *_one_third(laws.one_third),
        *_quanta(laws.quanta),
        _cagnetta(laws.cagnetta),
        _deceleration(laws.deceleration),
        *_several(laws.several),
    )


def _locality(widths: Locality) -> ExplanationRow:
    return ExplanationRow(
        SPECTRUM,
        "transitions are narrower than the mean curve's",
        "median width over the null model's below 1",
        format_estimate(widths.test.estimate),
        _VERDICTS[widths.test.verdict],
    )


def _tail(laws: LawsResult) -> ExplanationRow:
    claim = "the spectrum's tail has the exponent of the loss"
    tail, law, difference = laws.tail, laws.overall, laws.tail_minus_law
    if isinstance(difference, Undefined):
        return _undecided(SPECTRUM, claim, "-", difference)
    exponent = Undefined("") if isinstance(tail, Undefined) else tail.exponent
    of_loss = Undefined("") if isinstance(law, Undefined) else law.exponent_documents
    return ExplanationRow(
        SPECTRUM,
        claim,
        f"alpha = {format_estimate(exponent)}",
        f"alpha = {format_estimate(of_loss)}",
        ClaimVerdict.from_test(difference.agree),
    )


def _one_third(theory: OneThirdResult | Undefined) -> list[ExplanationRow]:
    name, claim = "one-third law (softmax)", "loss exponent in the summed learning rate"
    if isinstance(theory, Undefined):
        return [_undecided(name, claim, "1/3", theory)]
    law = theory.law
    holds = ClaimVerdict.from_test(law.holds_one_third)
    exponent = ExplanationRow(name, claim, "1/3", format_estimate(law.exponent), holds)
    return [exponent, _frequency_groups(name, theory.frequency_groups)]


def _frequency_groups(name: str, test: GroupTest | Undefined) -> ExplanationRow:
    claim = "groups by frequency share one slope, and do not drop each at its own time"
    if isinstance(test, Undefined):
        return _undecided(name, claim, "one slope", test)
    decided = {GroupVerdict.ONE_SLOPE: True, GroupVerdict.OWN_TIMES: False}
    holds = ClaimVerdict.from_test(decided.get(test.verdict))
    return ExplanationRow(name, claim, "one slope", test.verdict.value, holds)


def _quanta(theory: QuantaResult) -> list[ExplanationRow]:
    name, claim = "quantization model", "learning time ~ frequency^-b"
    predicted, frequency = "b = 1 (0.81 in parity)", theory.frequency
    if isinstance(frequency, Undefined):
        by_frequency = _undecided(name, claim, predicted, frequency)
    else:
        b = frequency.b
        holds = any(b.low <= value <= b.high for value in (_B_OF_THEORY, _B_OF_PARITY))
        verdict = ClaimVerdict.from_test(holds)
        by_frequency = ExplanationRow(name, claim, predicted, f"b = {format_estimate(b)}", verdict)
    single = theory.monogenic
    measured = (
        single.undefined
        if isinstance(single, Undefined)
        else f"{100 * single.share:.2f}% of tokens; null model {100 * single.null_share:.2f}%"
    )
    claim = "tokens fall from plateau to plateau"
    steps = ExplanationRow(name, claim, "some tokens do", measured, ClaimVerdict.UNDECIDED)
    return [by_frequency, steps]


def _cagnetta(theory: CagnettaResult) -> ExplanationRow:
    name, claim = "statistics of the language", "data exponent gamma / (2 beta)"
    gamma, beta, comparison = theory.gamma, theory.beta, theory.comparison
    if isinstance(theory.predicted, Undefined):
        found = {
            "gamma": gamma.undefined
            if isinstance(gamma, Undefined)
            else format_estimate(gamma.gamma),
            "beta": beta.undefined if isinstance(beta, Undefined) else format_estimate(beta.beta),
        }
        measured = "; ".join(f"{each}: {words}" for each, words in found.items())
        return ExplanationRow(name, claim, "-", measured, ClaimVerdict.UNDECIDED)
    predicted = f"alpha_D = {format_estimate(theory.predicted.exponent)}"
    if isinstance(comparison, Undefined):
        return _undecided(name, claim, predicted, comparison)
    holds = ClaimVerdict.from_test(abs(comparison.z) <= _AGREES_AT_5_PERCENT)
    return ExplanationRow(name, claim, predicted, f"z = {comparison.z:.2f}", holds)


def _deceleration(theory: Deceleration | Undefined) -> ExplanationRow:
    name, claim = "loss deceleration", "the power law breaks to a slower one"
    if isinstance(theory, Undefined):
        return _undecided(name, claim, "-", theory)
    measured = (
        f"at step {theory.break_step.value:,.0f}, rate {theory.early_rate:.3f} to "
        f"{theory.late_rate.value:.3f}; delta BIC {theory.delta_bic:.1f}"
    )
    verdict = ClaimVerdict.from_test(theory.decelerates)
    return ExplanationRow(name, claim, "a break inside the run", measured, verdict)


def _several(theory: SeveralRuns | None) -> list[ExplanationRow]:
    if theory is None:
        return []
    law, forecast = theory.chinchilla, theory.multi_power
    measured = (
        law.undefined
        if isinstance(law, Undefined)
        else f"alpha {format_estimate(law.alpha)}, beta {format_estimate(law.beta)}, "
        f"R^2 {law.r2:.3f}"
    )
    claim = "L = E + A N^-alpha + B D^-beta"
    rows = [ExplanationRow("Chinchilla", claim, "-", measured, ClaimVerdict.UNDECIDED)]
    name, claim = "multi-power law", "the loss under a schedule that was not fitted"
    if isinstance(forecast, Undefined):
        return [*rows, _undecided(name, claim, "-", forecast)]
    measured = (
        f"{forecast.held_out}: R^2 {forecast.score.r2:.3f}, mean error {forecast.score.mae:.4f} "
        f"nats, last loss {forecast.last_loss_predicted:.3f} for {forecast.last_loss:.3f}"
    )
    return [*rows, ExplanationRow(name, claim, "R^2 near 1", measured, ClaimVerdict.UNDECIDED)]


def _undecided(name: str, claim: str, predicted: str, reason: Undefined) -> ExplanationRow:
    return ExplanationRow(name, claim, predicted, reason.undefined, ClaimVerdict.UNDECIDED)
