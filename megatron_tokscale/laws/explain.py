"""The table of explanations: each theory's claims on a run, with predictions and measurements.

A function per theory returns its rows; `explanations` joins them, and corrects their verdicts as
one family.
"""

from megatron_tokscale.laws.claims import (
    ONE_THIRD,
    ClaimRow,
    chinchilla_row,
    corrected,
    deceleration_row,
    multi_power_rows,
    one_third_row,
    undecided,
)
from megatron_tokscale.results.estimate import Undefined, format_estimate
from megatron_tokscale.results.laws import (
    CagnettaResult,
    ExplanationRow,
    GroupTest,
    LawsResult,
    OneThirdResult,
    QuantaResult,
    SeveralRuns,
    language,
    one_third,
    power_law,
    quanta,
)

SPECTRUM = "learning-time spectrum"


def explanations(laws: LawsResult) -> tuple[ExplanationRow, ...]:
    """Return the rows of the table; all its claims are one family (Holm).

    Args:
        laws: laws of a run; its own table is not read.
    """
    return corrected(
        [
            _tail(laws),
            *_one_third(laws.one_third),
            _quanta(laws.quanta),
            _cagnetta(laws.cagnetta),
            deceleration_row(laws.deceleration),
            *_several(laws.several),
        ]
    )


def _tail(laws: LawsResult) -> ClaimRow:
    difference = laws.tail_minus_law
    if isinstance(difference, Undefined):
        return undecided(SPECTRUM, power_law.CLAIM, difference)
    tail = Undefined("") if isinstance(laws.tail, Undefined) else laws.tail.exponent
    measured = (
        f"alpha = {format_estimate(tail)} for {format_estimate(difference.law.exponent_documents)}"
    )
    predicted = f"a difference {difference.test.claim.rule}"
    return ClaimRow(SPECTRUM, difference.test, predicted, measured)


def _one_third(theory: OneThirdResult | Undefined) -> list[ClaimRow]:
    if isinstance(theory, Undefined):
        return [one_third_row(theory)]
    return [one_third_row(theory.law), _frequency_groups(theory.frequency_groups)]


def _frequency_groups(groups: GroupTest | Undefined) -> ClaimRow:
    if isinstance(groups, Undefined):
        return undecided(ONE_THIRD, one_third.GROUP_CLAIM, groups)
    slope, times = (groups.models[model].held_out_error for model in ("one slope", "own times"))
    measured = f"held-out error {slope:.3g} with one slope, {times:.3g} with own times"
    return ClaimRow(ONE_THIRD, groups.test, "one slope errs less", measured)


def _quanta(theory: QuantaResult) -> ClaimRow:
    name, frequency = "quantization model", theory.frequency
    if isinstance(frequency, Undefined):
        return undecided(name, quanta.CLAIM, frequency)
    measured = (
        f"frequency^-b with b = {format_estimate(frequency.b)}, onset {frequency.onset:,.4g}; "
        f"without an onset {format_estimate(frequency.b_without_onset)}"
    )
    return ClaimRow(name, frequency.test, f"b = 1: {frequency.test.claim.rule}", measured)


def _cagnetta(theory: CagnettaResult) -> ClaimRow:
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
        return undecided(name, language.CLAIM, Undefined(measured))
    predicted = f"alpha_D = {format_estimate(theory.predicted.exponent)}"
    if isinstance(comparison, Undefined):
        return undecided(name, language.CLAIM, comparison, predicted)
    measured = f"predicted minus measured {format_estimate(comparison.difference)}"
    rule = comparison.test.claim.rule
    return ClaimRow(name, comparison.test, f"{predicted}; difference {rule}", measured)


def _several(theory: SeveralRuns | None) -> list[ClaimRow]:
    if theory is None:
        return []
    return [chinchilla_row(theory.chinchilla_forecast), *multi_power_rows(theory.multi_power)]
