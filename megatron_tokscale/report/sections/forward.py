"""The section on the forecast: fitted on the first part of the run, held against the rest of it."""

import math
from collections.abc import Mapping
from typing import Any, Final

from megatron_tokscale.report.charts import UNITS, short
from megatron_tokscale.report.html import escape, json_estimate, number, paragraph, table
from megatron_tokscale.report.inputs import ReportInputs
from megatron_tokscale.report.sections import Section
from megatron_tokscale.report.sections.transfer import PERMUTED, SKILL, groupings_table
from megatron_tokscale.report.verdicts import outcome

_PREDICTIONS: Final = {
    "tokens": "the tokens' fits to the losses before",
    "power-law": "rival: the power law of the mean loss before",
    "uniform": "rival: a uniform spectrum: the loss falls on as before",
}
_NO_VERDICT: Final = (
    "These numbers have no verdict: the fit of a token that has not begun to fall stays flat, so "
    "the forecast misses every fall that begins later."
)


def forward_section(inputs: ReportInputs) -> list[Section]:
    """Return the section on the forecast of the last octave: mean loss, and which groups fall."""
    parts = _forecast(inputs.reconstruction["forward"], UNITS[inputs.time])
    return [Section("forward", "Forward in time", "Forward in time", parts)]


def _forecast(result: Mapping[str, Any], unit: str) -> list[str]:
    if "undefined" in result:
        return [paragraph(f"{outcome(None)}: {escape(result['undefined'])}.")]
    first, last = (short(math.exp(result[end])) for end in ("from_x", "to_x"))
    return [
        paragraph(
            f"A sample of the tokens is fitted again, on the losses up to {first} {unit} alone. "
            f"These fits forecast the losses of the {number(result['probes'], ',')} later probes, "
            f"up to {last} {unit}. {_NO_VERDICT}"
        ),
        table(
            f"Forecasts of the mean loss from {first} to {last} {unit}, in nats per token: mean "
            "absolute error over the probes, and fall, with 95% intervals over documents.",
            ["forecast by", "mean error", "fall"],
            [
                *(
                    [
                        meaning,
                        json_estimate(result[name], "error"),
                        json_estimate(result[name], "fall"),
                    ]
                    for name, meaning in _PREDICTIONS.items()
                ),
                ["measured", "–", json_estimate(result, "fall")],
            ],
        ),
        paragraph(
            "Mean error of the best rival minus mean error of the tokens' fits: "
            f"{json_estimate(result, 'gain_over_best_rival', '+,.3f')} nats."
        ),
        paragraph(f"Do the fits tell which groups of tokens will fall? {SKILL} {PERMUTED}"),
        groupings_table(
            f"Skill for the falls after {first} {unit}. p is the share of permutations, in a "
            "sample of the tokens, that have as high a skill.",
            result["groups"],
        ),
    ]
