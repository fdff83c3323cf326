"""The section on locality: the widths of transitions beside those of tokens that follow a group.

Shapes: W bins of widths, K probe steps.
"""

import math
from typing import Final

import numpy as np
from matplotlib.figure import Figure

from megatron_tokscale.report.charts import TimeScale, draw
from megatron_tokscale.report.html import (
    MEASURED,
    NULL,
    estimate,
    figure,
    number,
    paragraph,
    table,
)
from megatron_tokscale.report.inputs import ReportInputs
from megatron_tokscale.report.sections import Section
from megatron_tokscale.report.verdicts import VerdictRow, outcome
from megatron_tokscale.results.estimate import Undefined
from megatron_tokscale.results.evidence import Locality, WidthSample
from megatron_tokscale.results.verdict import Verdict

_REASONS: Final = {
    Verdict.HOLDS: "The transitions are narrower than if every token followed its group.",
    Verdict.FAILS: "The transitions are as wide as those of tokens that follow their group.",
    Verdict.UNDECIDED: "The interval of the ratio excludes neither narrow transitions nor "
    "transitions as wide as those of tokens that follow their group.",
}


def locality_section(inputs: ReportInputs) -> list[Section]:
    """Return the section that compares the widths with those of tokens that follow a group."""
    widths = inputs.spectrum.evidence.widths
    parts = [
        paragraph(
            "The width of a transition is the time from 10% to 90% of it, in decades of time. The "
            "null model shows the widths that would be found if no token had a learning time of "
            "its own: each of its tokens follows the mean curve of the tokens of its dataset and "
            "of about its frequency, with a level, an amplitude and noise of its own, and is "
            "fitted in the same way. Both are fitted on the probes after the unigram phase, in "
            "which all tokens fall together, and before the decay of the learning rate."
        ),
        paragraph(_verdict_sentence(widths), "verdict"),
        figure(
            _widths_figure(inputs),
            "Both histograms hold the falling tokens with a trusted midpoint, weighted by their "
            "drop; two-step and gradual tokens are left out. A width below the spacing of the "
            "probes is only known to be small.",
        ),
        table(
            "The window of a token is the time from 10% to 90% of its own transition; a perfect "
            f"sigmoid has 80% of its fall there. The 95% intervals are over {inputs.units}.",
            ["", "observed", "null: tokens that follow their group"],
            _rows(widths.observed, widths.group_null),
        ),
    ]
    return [Section("locality", "Locality", "How local learning is", parts, [_verdict(widths)])]


def _verdict(widths: Locality) -> VerdictRow:
    """Return the verdict: are the transitions narrower than under the null model?"""
    meaning = "median width divided by that of tokens that follow their group"
    return VerdictRow.of("locality", widths.test, meaning, primary=True)


def _verdict_sentence(widths: Locality) -> str:
    half = [
        number(sample.width_decades.p50.value, ".2f")
        for sample in (widths.observed, widths.group_null)
    ]
    ratio = widths.test.estimate
    if isinstance(ratio, Undefined) or not ratio.has_interval:
        reason = "There are too few falling tokens or units for a ratio with an interval."
    else:
        reason = _REASONS[widths.test.verdict]
    shown = "–" if isinstance(ratio, Undefined) else estimate(ratio)
    return (
        f"Local learning: {outcome(widths.test.verdict)}. Half of the falling tokens' drop is in "
        f"transitions narrower than {half[0]} decades; for tokens that follow their group this "
        f"median width is {half[1]} decades. The ratio of the two is {shown}. {reason}"
    )


def _rows(observed: WidthSample, null: WidthSample) -> list[list[str]]:
    both = (observed, null)
    decades = [each.width_decades for each in both]
    quartiles = (
        ("a quarter", [each.p25 for each in decades]),
        ("half", [each.p50 for each in decades]),
        ("three quarters", [each.p75 for each in decades]),
    )
    return [
        ["fitted tokens in the comparison", *(number(each.tokens, ",") for each in both)],
        [
            "of these, falling with a trusted midpoint",
            *(number(each.falling, ",") for each in both),
        ],
        *(
            [f"{name} of the drop is in transitions narrower than (decades)"]
            + [estimate(width) for width in pair]
            for name, pair in quartiles
        ),
        [
            "median width, as a share of the probed range",
            *(estimate(each.width_of_range.p50, ".1%") for each in both),
        ],
        [
            "share of the fall inside the tokens' own windows",
            *(estimate(each.fall_in_windows, ".1%") for each in both),
        ],
    ]


def _widths_figure(inputs: ReportInputs) -> str:
    """Draw histograms of the 10-90% widths, observed and of the null model, in decades."""
    arrays = inputs.spectrum.arrays
    edges_W = arrays.width_edges_W / math.log(10)
    widths = inputs.spectrum.evidence.widths
    x_K = arrays.x_K[(arrays.x_K >= widths.from_x) & (arrays.x_K <= widths.to_x)]
    spacing, span = np.median(np.diff(x_K)) / math.log(10), np.ptp(x_K) / math.log(10)

    def paint(figure: Figure) -> None:
        axes = figure.add_subplot()
        axes.stairs(
            100 * arrays.width_null_W,
            edges_W,
            fill=True,
            color=NULL,
            alpha=0.45,
            label="tokens that follow their group (null)",
        )
        axes.stairs(
            100 * arrays.width_observed_W, edges_W, color=MEASURED, lw=1.6, label="observed"
        )
        for place, name in ((spacing, "spacing of the probes"), (span, "probed range")):
            axes.axvline(place, color="#999999", lw=0.8, ls=(0, (2, 2)))
            axes.annotate(
                name,
                (place, 1),
                (3, -3),
                xycoords=("data", "axes fraction"),
                textcoords="offset points",
                rotation=90,
                va="top",
                fontsize=7.5,
                color="#555555",
            )
        axes.set_xscale("log")
        scale = TimeScale(float(edges_W[0]), float(edges_W[-1]), has_zero=False)
        ticks = scale.ticks()
        axes.set_xticks(list(ticks), list(ticks.values()))
        axes.set_xticks(scale.minor_ticks(), [], minor=True)
        axes.set_xlim(edges_W[0], edges_W[-1])
        axes.set_xlabel("10–90% width of the transition (decades of time)")
        axes.set_ylabel("share of the drop per bin (%)")
        axes.legend(loc="upper left")

    alt = "Histogram of transition widths, observed and of tokens that follow their group"
    return draw("widths", alt, 3.0, paint)
