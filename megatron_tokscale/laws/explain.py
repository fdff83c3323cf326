"""One table: which explanation predicts what of a run, and how well."""

from collections.abc import Mapping
from typing import Any

from megatron_tokscale.results.estimate import format_estimate
from megatron_tokscale.results.evidence import Evidence, Locality

Row = dict[str, Any]


def explanations(laws: Mapping[str, Any], evidence: Evidence) -> list[Row]:
    """Rows of the table, from the content of laws.json and of reconstruction.json.

    Returns:
        per row: explanation, claim, predicted, measured (words), and holds: true, false, or null
        where the run does not decide.
    """
    return [
        _locality(evidence.widths),
        _tail(laws),
        *_one_third(laws["one_third"]),
        *_quanta(laws["quanta"]),
        *_cagnetta(laws["cagnetta"]),
        _deceleration(laws["deceleration"]),
        *_several(laws.get("several")),
    ]


def row(explanation: str, claim: str, predicted: str, measured: str, holds: bool | None) -> Row:
    """A row of the table."""
    return {
        "explanation": explanation,
        "claim": claim,
        "predicted": predicted,
        "measured": measured,
        "holds": holds,
    }


def _locality(widths: Locality) -> Row:
    return row(
        "learning-time spectrum",
        "transitions are narrower than the mean curve's",
        "median width over that of the null below 1",
        format_estimate(widths.median_over_null),
        widths.local,
    )


def _tail(laws: Mapping[str, Any]) -> Row:
    claim = "the spectrum's tail has the exponent of the loss"
    both = laws["tail_minus_law"]
    if "undefined" in both:
        return row("learning-time spectrum", claim, "-", both["undefined"], None)
    return row(
        "learning-time spectrum",
        claim,
        f"alpha = {spread(laws['tail'], 'exponent')}",
        f"alpha = {spread(laws['overall'], 'exponent_documents')}",
        both["agree"],
    )


def _one_third(theory: Mapping[str, Any]) -> list[Row]:
    name = "one-third law (softmax)"
    if "undefined" in theory:
        return [row(name, "loss exponent in the summed rate", "1/3", theory["undefined"], None)]
    rows = [
        row(
            name,
            "loss exponent in the summed learning rate",
            "1/3",
            spread(theory, "exponent"),
            theory["holds_one_third"],
        )
    ]
    groups = theory["frequency_groups"]
    claim = "tokens by frequency share one slope; quanta: each has its own time"
    if "undefined" in groups:
        return [*rows, row(name, claim, "one slope", groups["undefined"], None)]
    verdict = groups["verdict"]
    decided = {"all groups share one slope": True, "each group drops at its own time": False}
    return [*rows, row(name, claim, "one slope", verdict, decided.get(verdict))]


def _quanta(theory: Mapping[str, Any]) -> list[Row]:
    name = "quantization model"
    rows = []
    frequency = theory["frequency"]
    claim = "learning time ~ frequency^-b"
    if "undefined" in frequency:
        rows.append(row(name, claim, "b = 1 (0.81 in parity)", frequency["undefined"], None))
    else:
        low, high = frequency["interval"]
        rows.append(
            row(
                name,
                claim,
                "b = 1 (0.81 in parity)",
                f"b = {spread(frequency, 'b', 'interval')}",
                low <= 1 <= high or low <= 0.81 <= high,
            )
        )
    single = theory["monogenic"]
    measured = single.get("undefined") or (
        f"{100 * single['share']:.2f}% of tokens; null {100 * single['null_share']:.2f}%"
    )
    rows.append(row(name, "tokens fall from plateau to plateau", "some do", measured, None))
    return rows


def _cagnetta(theory: Mapping[str, Any]) -> list[Row]:
    name, claim = "statistics of the language", "data exponent gamma / (2 beta)"
    predicted, measured = theory["predicted"], theory["measured"]
    if "undefined" in predicted:
        known = [
            f"{each}: {theory[each].get('undefined') or spread(theory[each], each, 'interval')}"
            for each in ("gamma", "beta")
        ]
        return [row(name, claim, "-", "; ".join(known), None)]
    words = f"alpha_D = {spread(predicted, 'exponent', 'interval')}"
    if "undefined" in measured:
        return [row(name, claim, words, measured["undefined"], None)]
    return [row(name, claim, words, f"z = {measured['z']:.2f}", abs(measured["z"]) <= 1.96)]


def _deceleration(theory: Mapping[str, Any]) -> Row:
    name, claim = "loss deceleration", "the power law breaks to a slower one"
    if "undefined" in theory:
        return row(name, claim, "-", theory["undefined"], None)
    measured = (
        f"at step {theory['break_step']:,.0f}, rate {theory['early_rate']:.3f} to "
        f"{theory['late_rate']:.3f}; delta BIC {theory['delta_bic']:.1f}"
    )
    return row(name, claim, "a break inside the run", measured, theory["decelerates"])


def _several(theory: Mapping[str, Any] | None) -> list[Row]:
    if theory is None:
        return []
    law, schedule = theory["chinchilla"], theory["multi_power"]
    claim = "L = E + A N^-alpha + B D^-beta"
    measured = law.get("undefined") or (
        f"alpha {spread(law, 'alpha')}, beta {spread(law, 'beta')}, R^2 {law['r2']:.3f}"
    )
    rows = [row("Chinchilla", claim, "-", measured, None)]
    claim = "the loss under a schedule it has not seen"
    if "undefined" in schedule:
        return [*rows, row("multi-power law", claim, "-", schedule["undefined"], None)]
    score = schedule["score"]
    measured = (
        f"{schedule['held_out']}: R^2 {score['r2']:.3f}, mean error {score['mae']:.4f} nats, "
        f"last loss {schedule['last_loss_predicted']:.3f} for {schedule['last_loss']:.3f}"
    )
    return [*rows, row("multi-power law", claim, "R^2 near 1", measured, None)]


def spread(values: Mapping[str, Any], name: str, interval_name: str | None = None) -> str:
    """A number with its interval in words."""
    value, interval = values[name], values.get(interval_name or f"{name}_interval")
    if value is None:
        return "-"
    if interval is None or None in interval:
        return f"{value:.3f}"
    return f"{value:.3f} [{interval[0]:.3f}, {interval[1]:.3f}]"
