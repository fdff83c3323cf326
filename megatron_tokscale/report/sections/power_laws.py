"""The power laws of the mean losses as a table, and the tail of the spectrum beside them."""

import math
from collections.abc import Mapping
from typing import Any

from megatron_tokscale.laws.laws_text import DRIFT
from megatron_tokscale.report.markup import (
    dataset,
    escape,
    estimate,
    number,
    paragraph,
    table,
)
from megatron_tokscale.report.scale import UNITS, short
from megatron_tokscale.report.verdicts import CLAIMED, Verdict, outcome

_HEADER = [
    "mean loss of",
    "E (nats)",
    "E, over documents",
    "α",
    "α, over documents",
    "R²",
    "probes",
    "but",
]
_QUESTION = "The tail of the learning-time spectrum has the exponent of the loss"


def law_table(laws: Mapping[str, Any]) -> str:
    """Every fitted law: all tokens, each dataset, and other starts of the fit."""
    unit = UNITS[laws["time"]]
    rows = [
        ("all probe tokens", laws["overall"]),
        *((dataset(d, each["name"]), each) for d, each in enumerate(laws["datasets"])),
        *((f"all, from {short(each['from'])} {unit}", each) for each in laws["other_starts"]),
    ]
    return table(
        f"L = E + B t<sup>−α</sup> with t in {unit}, from {short(laws['settings']['from'])} on. "
        "95% intervals, below a number: over the scatter of the probes about the law, with its "
        "serial correlation; in a column of their own, with the value corrected for its bias: over "
        "documents.",
        _HEADER,
        [_row(name, law) for name, law in rows],
        "dense",
    )


def _row(name: str, law: Mapping[str, Any]) -> list[str]:
    if "undefined" in law:
        return [name, *["–"] * (len(_HEADER) - 2), escape(law["undefined"])]
    return [
        name,
        estimate(law, "floor"),
        estimate(law, "floor_documents"),
        estimate(law, "exponent"),
        estimate(law, "exponent_documents"),
        number(law["r2"]),
        number(law["n_points"], ","),
        doubt(law),
    ]


def doubt(law: Mapping[str, Any]) -> str:
    """What speaks against the fit, if anything."""
    doubts = [] if law["converged"] else ["not converged"]
    if law["autocorrelation"] > DRIFT:
        doubts.append(f"residuals drift (ρ {number(law['autocorrelation'], '.2f')}): no power law")
    return "; ".join(doubts)


def tail(laws: Mapping[str, Any]) -> str:
    """The exponent of the spectrum's tail, that of the loss, and whether they agree."""
    found, difference = laws["tail"], laws["tail_minus_law"]
    if "undefined" in found:
        reason = escape(found["undefined"])
        return paragraph(f"Tail of the spectrum: {outcome(None, CLAIMED)}: {reason}.", "verdict")
    first, last = (short(math.exp(found[end])) for end in ("from_x", "to_x"))
    measured = (
        f"The drop-weighted spectrum falls with exponent {estimate(found, 'exponent')} from {first}"
        f" to {last} {UNITS[laws['time']]}, where {number(found['share'], '.1%')} of its drop lie."
    )
    if "undefined" in difference:
        reason = escape(difference["undefined"])
        return paragraph(f"{_QUESTION}: {outcome(None, CLAIMED)}: {reason}. {measured}", "verdict")
    return paragraph(
        f"{_QUESTION}: {outcome(difference['agree'], CLAIMED)}. {measured} Less the exponent of "
        f"the loss that is {estimate(difference, 'difference', '+,.3f')}."
        f"{_warning(laws['overall'])}",
        "verdict",
    )


def _warning(law: Mapping[str, Any]) -> str:
    against = doubt(law)
    return f" But of the law of the loss: {against}." if against else ""


def tail_verdict(laws: Mapping[str, Any]) -> Verdict:
    """Whether the exponents agree."""
    difference = laws["tail_minus_law"]
    if "undefined" in difference:
        return Verdict("laws", _QUESTION, None, "–", escape(difference["undefined"]), CLAIMED)
    return Verdict(
        "laws",
        _QUESTION,
        difference["agree"],
        estimate(difference, "difference", "+,.3f"),
        "the tail's exponent less that of the loss; not refuted if zero is in its interval, over "
        "documents and the scatter of the probes",
        CLAIMED,
    )
