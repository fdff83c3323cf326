"""The section on the forecast: fitted on the first part of the run, held against the rest of it."""

import math
from collections.abc import Mapping
from typing import Any

from megatron_tokscale.report.analysis import Analysis
from megatron_tokscale.report.markup import escape, estimate, number, paragraph, section, table
from megatron_tokscale.report.scale import UNITS, short
from megatron_tokscale.report.sections.skills import PERMUTED, SKILL, groupings_table
from megatron_tokscale.report.verdicts import outcome

_PREDICTIONS = {
    "tokens": "the tokens' fits to the part before",
    "power-law": "rival: the power law of the mean loss before",
    "uniform": "rival: a uniform spectrum, the loss falls on as before",
}
_NO_VERDICT = (
    "These numbers have no verdict: a token whose fall has not begun is extrapolated flat, so the "
    "fits miss every fall that begins after the cut."
)


def forward(analysis: Analysis) -> str:
    """The forecast of the last factor of two: the mean loss, and which groups fall."""
    result = analysis.reconstruction["forward"]
    return section("forward", "Forward in time", *_parts(result, UNITS[analysis.time]))


def _parts(result: Mapping[str, Any], unit: str) -> list[str]:
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
