"""Zero-sum learning: how far the tokens' losses move, and how much of that cancels in the mean.

Shapes: P pairs of probes, from a step to about its double.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from megatron_tokscale.report.markup import escape, figure, number, paragraph, table
from megatron_tokscale.report.sections.law_figures import cancelling
from megatron_tokscale.report.verdicts import CLAIMED, outcome

_METRICS = ("movement", "change", "interference")


def zero_sum(result: Mapping[str, Any]) -> list[str]:
    """A figure over time, and a table of one pair of probes per doubling; why, if undefined."""
    if "undefined" in result:
        reason = escape(result["undefined"])
        return [paragraph(f"Zero-sum learning: {outcome(None, CLAIMED)}: {reason}.")]
    values = {name: np.array(result[name], dtype=np.float64) for name in _METRICS}
    return [
        paragraph(
            "While the step doubles, a token's loss moves by M nats either way on average; the "
            "share D of it cancels over the tokens, and the mean loss falls by (1 − D) M "
            "(Mircea et al. 2025). Noise moves tokens too, and all of that cancels."
        ),
        figure(
            cancelling(np.array(result["from_step"], dtype=np.float64), values),
            "Left: movement, and what the mean loss shows of it. Right: the share that cancels.",
        ),
        table(
            "From a probe to the one nearest to twice its step.",
            ["steps", "M (nats)", "change of the mean loss (nats)", "D"],
            _rows(result),
        ),
    ]


def _rows(result: Mapping[str, Any]) -> list[list[str]]:
    rows, shown_to = [], 0.0
    for first, last, movement, change, interference in zip(
        *(result[name] for name in ("from_step", "to_step", *_METRICS)), strict=True
    ):
        if first >= shown_to:
            shown_to = 2 * first
            rows.append(
                [
                    f"{number(first, ',.0f')} to {number(last, ',.0f')}",
                    number(movement),
                    number(change, "+,.3f"),
                    number(interference, ".1%"),
                ]
            )
    return rows
