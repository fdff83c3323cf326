"""The section on the forecast: fitted on the first part of the run, held against the rest of it."""

import math
from collections.abc import Mapping
from typing import Any

from megatron_tokscale.report.analysis import Analysis
from megatron_tokscale.report.markup import escape, estimate, number, paragraph, section, table
from megatron_tokscale.report.scale import UNITS, short
from megatron_tokscale.report.skills import (
    LEAST,
    PASSES,
    PERMUTED,
    SKILL,
    groupings_table,
    passed,
    weakest,
)
from megatron_tokscale.report.verdicts import Verdict, outcome

_PREDICTIONS = {
    "tokens": "the tokens' fits to the part before",
    "power-law": "rival: the power law of the mean loss before",
    "uniform": "rival: a uniform spectrum, the loss falls on as before",
}
_QUESTION = "The tokens' fits predict the last factor of two in time"


def forward(analysis: Analysis) -> str:
    """The forecast of the last factor of two: the mean loss, and which groups fall."""
    result = analysis.reconstruction["forward"]
    return section("forward", "Forward in time", *_parts(result, UNITS[analysis.time]))


def forward_verdicts(analysis: Analysis) -> list[Verdict]:
    """Whether the mean loss is forecast, and whether it is which groups fall."""
    result = analysis.reconstruction["forward"]
    if "undefined" in result:
        return [Verdict("forward", _QUESTION, None, "–", escape(result["undefined"]))]
    return [
        Verdict(
            "forward",
            f"{_QUESTION}: the mean loss",
            result["passes"],
            estimate(result, "gain_over_best_rival", "+,.3f"),
            "nats of mean error less than the best rival's; its whole interval above zero",
        ),
        Verdict(
            "forward",
            f"{_QUESTION}: which groups fall",
            passed(result["groups"]),
            weakest(result["groups"]),
            LEAST,
        ),
    ]


def _parts(result: Mapping[str, Any], unit: str) -> list[str]:
    if "undefined" in result:
        return [paragraph(f"{outcome(None)}: {escape(result['undefined'])}.", "verdict")]
    first, last = (short(math.exp(result[end])) for end in ("from_x", "to_x"))
    return [
        paragraph(
            f"A sample of the tokens is fitted again on the losses up to {first} {unit} alone. "
            f"What the fits say of the {number(result['probes'], ',')} probes after it, up to "
            f"{last}, is held against what was measured."
        ),
        paragraph(_verdict(result), "verdict"),
        table(
            f"Mean loss from {first} to {last} {unit}, in nats per token: mean absolute error of "
            "the forecast over the probes, and the fall; 95% intervals over documents.",
            ["forecast by", "mean error", "fall"],
            [
                *(
                    [meaning, estimate(result[name], "error"), estimate(result[name], "fall")]
                    for name, meaning in _PREDICTIONS.items()
                ),
                ["measured", "–", estimate(result, "fall")],
            ],
        ),
        paragraph(f"Do the fits know which groups of tokens will fall? {SKILL} {PERMUTED}"),
        groupings_table(f"Skill for the falls since {first} {unit}. {PASSES}", result["groups"]),
    ]


def _verdict(result: Mapping[str, Any]) -> str:
    gain = estimate(result, "gain_over_best_rival", "+,.3f")
    return (
        f"Better than the best rival: {outcome(result['passes'])}. {_reason(result)} "
        f"Error of the best rival minus that of the tokens: {gain} nats."
    )


def _reason(result: Mapping[str, Any]) -> str:
    interval = result["gain_over_best_rival_interval"]
    if interval is None:
        return "The difference of their errors has no interval."
    if interval[1] < 0:
        return "The best rival predicts the mean loss better than the fits of the tokens."
    if interval[0] > 0:
        return "The fits of the tokens predict the mean loss better than both rivals."
    return "The data do not tell the fits of the tokens from the best rival."
