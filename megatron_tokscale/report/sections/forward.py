"""The section on the forecast: fitted on the first part of the run, held against the rest of it."""

import math
from collections.abc import Mapping
from typing import Any, Final

from megatron_tokscale.report.charts import UNITS, short
from megatron_tokscale.report.html import escape, estimate, number, paragraph, table
from megatron_tokscale.report.inputs import ReportInputs
from megatron_tokscale.report.sections import Section
from megatron_tokscale.report.sections.transfer import PERMUTED, SKILL, groupings_table
from megatron_tokscale.report.verdicts import outcome

_PREDICTIONS: Final = {
    "tokens": "the tokens' fits to the part before",
    "power-law": "rival: the power law of the mean loss before",
    "uniform": "rival: a uniform spectrum, the loss falls on as before",
}
_NO_VERDICT: Final = (
    "These numbers have no verdict: a token whose fall has not begun is extrapolated flat, so the "
    "fits miss every fall that begins after the cut."
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
            f"A sample of the tokens is fitted again on the losses up to {first} {unit} alone. "
            f"What the fits say of the {number(result['probes'], ',')} probes after it, up to "
            f"{last}, is held against what was measured. {_NO_VERDICT}"
        ),
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
        paragraph(
            "Mean error of the best rival minus that of the tokens: "
            f"{estimate(result, 'gain_over_best_rival', '+,.3f')} nats."
        ),
        paragraph(f"Do the fits know which groups of tokens will fall? {SKILL} {PERMUTED}"),
        groupings_table(
            f"Skill for the falls since {first} {unit}; p is the share of permutations in a sample "
            "of the tokens that do as well.",
            result["groups"],
        ),
    ]
