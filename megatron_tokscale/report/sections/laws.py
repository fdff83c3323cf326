"""The section on laws: power laws of the loss, and what rival explanations predict of this run."""

from collections.abc import Mapping
from typing import Any

from megatron_tokscale.report.analysis import Analysis
from megatron_tokscale.report.largest import largest_datasets, left_out
from megatron_tokscale.report.markup import escape, figure, section, table
from megatron_tokscale.report.sections.law_figures import above_floor
from megatron_tokscale.report.sections.power_laws import law_table, tail, tail_verdict
from megatron_tokscale.report.sections.several import several
from megatron_tokscale.report.sections.zero_sum import zero_sum
from megatron_tokscale.report.verdicts import CLAIMED, Verdict, outcome

_OWN = "learning-time spectrum"


def laws(analysis: Analysis) -> str:
    """Explanations, power laws, the tail, zero-sum learning, and laws over runs."""
    result = analysis.laws
    if result is None:
        return ""
    tokens = analysis.run.probe_set
    picture = above_floor(analysis, result)
    return section(
        "laws",
        "Laws and rival explanations",
        _explanations(result),
        "<h3>Power laws of the loss</h3>",
        law_table(result),
        figure(
            picture,
            "Mean loss less its own fitted E, on two logarithmic axes. Dots: probes, hollow before "
            "the fit begins; lines: the laws. A fitted E straightens any curve: whether there is a "
            "power law is told by the drift of the residuals and by what other starts give, in the "
            "table." + left_out(largest_datasets(tokens), tokens),
        )
        if picture
        else "",
        tail(result),
        "<h3>Zero-sum learning</h3>",
        *zero_sum(result["zero_sum"]),
        *several(result.get("several")),
    )


def _explanations(result: Mapping[str, Any]) -> str:
    rows = [
        [
            *(_text(each[name]) for name in ("explanation", "claim", "predicted", "measured")),
            outcome(each["holds"], CLAIMED),
        ]
        for each in result["explanations"]
    ]
    return table(
        "What each explanation predicts of this run. A claim holds if it was tested and not "
        "refuted; it is undecided where the run cannot refute it, or was not measured.",
        ["explanation", "claim", "predicted", "measured [95%]", "verdict"],
        rows,
        "words",
    )


def _text(words: str) -> str:
    return "–" if words == "-" else escape(words)


def laws_verdicts(analysis: Analysis) -> list[Verdict]:
    """Whether the tail agrees with the loss, and the rivals' claims that were decided."""
    if analysis.laws is None:
        return []
    return [
        tail_verdict(analysis.laws),
        *(
            Verdict(
                "laws",
                f"{escape(each['explanation'])}: {escape(each['claim'])}",
                each["holds"],
                _text(each["measured"]),
                f"predicted: {_text(each['predicted'])}",
                CLAIMED,
            )
            for each in analysis.laws["explanations"]
            if each["explanation"] != _OWN and each["holds"] is not None
        ),
    ]
