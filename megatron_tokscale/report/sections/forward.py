"""The section on the forecast: fitted on the first part of the run, scored on the last octave."""

import math
from typing import Final

from megatron_tokscale.report.charts import short, time_unit
from megatron_tokscale.report.html import escape, estimate, number, paragraph, table
from megatron_tokscale.report.inputs import ReportInputs
from megatron_tokscale.report.sections import Section
from megatron_tokscale.report.sections.transfer import PERMUTED, SKILL, groupings_table
from megatron_tokscale.results.estimate import Undefined
from megatron_tokscale.results.evidence import ForwardPrediction

_NO_VERDICT: Final = (
    "These numbers have no verdict: the fit of a token that has not begun to fall stays flat, so "
    "the forecast misses every fall that begins later."
)


def forward_section(inputs: ReportInputs) -> list[Section]:
    """Return the section on the forecast of the last octave: mean loss, and which groups fall."""
    parts = _forecast(inputs.spectrum.evidence.forward, time_unit(inputs.time), inputs.units)
    return [Section("forward", "Forward in time", "Forward in time", parts)]


def _forecast(found: ForwardPrediction | Undefined, unit: str, units: str) -> list[str]:
    if isinstance(found, Undefined):
        return [paragraph(f"undefined: {escape(found.undefined)}.")]
    first, last = (short(math.exp(x)) for x in (found.from_x, found.to_x))
    forecasts = [
        ("the tokens' fits to the losses before", found.tokens),
        ("rival: the power law of the mean loss before", found.power_law),
        ("rival: a uniform spectrum: the loss falls on as before", found.uniform),
    ]
    return [
        paragraph(
            f"A sample of the tokens is fitted again, on the losses up to {first} {unit} alone. "
            f"These fits forecast the losses of the {number(found.probes, ',')} later probes, "
            f"up to {last} {unit}. {_NO_VERDICT}"
        ),
        table(
            f"Forecasts of the mean loss from {first} to {last} {unit}, in nats per token: mean "
            f"absolute error over the probes, and fall, with 95% intervals over {units}.",
            ["forecast by", "mean error", "fall"],
            [
                *([name, estimate(each.error), estimate(each.fall)] for name, each in forecasts),
                ["measured", "–", estimate(found.fall)],
            ],
        ),
        paragraph(
            "Mean error of the best rival minus mean error of the tokens' fits: "
            f"{estimate(found.gain_over_best_rival, '+,.3f')} nats."
        ),
        paragraph(f"Do the fits tell which groups of tokens will fall? {SKILL} {PERMUTED}"),
        groupings_table(
            f"Skill for the falls after {first} {unit}. p is the share of permutations, in a "
            "sample of the tokens, that have as high a skill.",
            found.groups,
        ),
    ]
