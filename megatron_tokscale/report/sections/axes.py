"""The sections on the axes D and M: gains of tokens from more data or a larger model.

Shapes: G grid points, R resamples (the first is the data as they are), K runs.
"""

from typing import Final

import numpy as np
from matplotlib.figure import Figure

from megatron_tokscale.report.charts import TimeScale, band, draw, short, time_axis
from megatron_tokscale.report.html import (
    MEASURED,
    escape,
    estimate,
    figure,
    number,
    paragraph,
    table,
)
from megatron_tokscale.report.inputs import ReportInputs
from megatron_tokscale.report.sections import Section
from megatron_tokscale.report.sections.transfer import (
    PASSES,
    PERMUTED,
    SKILL,
    groupings_table,
    least_p,
)
from megatron_tokscale.report.verdicts import VerdictRow, outcome
from megatron_tokscale.results.axis import AxisArrays, AxisResult, AxisSummary
from megatron_tokscale.results.estimate import Undefined
from megatron_tokscale.results.verdict import Verdict

_SIZES: Final = {
    "tokens": "training tokens",
    "parameters": "parameters",
    "non-embedding": "parameters without embeddings",
    "flops": "FLOPs per token",
}


def axis_sections(inputs: ReportInputs) -> list[Section]:
    """Return a section for every axis."""
    return [_section(f"axis-{n}", axis) for n, axis in enumerate(inputs.axes, 1)]


def _section(anchor: str, found: AxisResult) -> Section:
    axis = found.summary
    size = _SIZES[axis.size]
    falls = ["–", *(estimate(fall) for fall in axis.falls)]
    parts = [
        paragraph(
            f"On this axis, the last losses of {number(len(axis.runs), ',')} runs of growing "
            f"size take the place of losses over time: x = ln of {size}. There is one run of each "
            "size: the intervals are over documents, and do not cover other seeds."
        ),
        table(
            "The runs by size. From the smallest to the largest, the mean loss falls by "
            f"{estimate(axis.fall)} nats.",
            ["run", size, "mean loss (nats)", "fall from the run before (nats)"],
            [
                [escape(each.name), number(each.size, ",.0f"), number(each.loss), fall]
                for each, fall in zip(axis.runs, falls, strict=True)
            ],
        ),
        figure(
            _derivative_figure(anchor, found.arrays, size),
            "Line and band: the smoothed slope of the mean loss, with its 95% interval over "
            "documents. Dotted lines: the runs; nothing was measured between them.",
        ),
        *_across_axes(axis),
    ]
    entry = f"Axis {axis.axis}"
    return Section(anchor, entry, f"{entry}: {size}", parts, _verdicts(anchor, axis))


def _across_axes(axis: AxisSummary) -> list[str]:
    """Return the parts on the learning times of the axis T, tested on this axis."""
    across = axis.across
    if across is None:
        return [
            paragraph(
                f"Learning times of a run were not tested on this axis: {outcome(None)} "
                "(<code>spectrum --source RUN</code> tests them)."
            )
        ]
    source = escape(across.source)
    title = f"<h3>Learning times along T of {source} on the axis {axis.axis}</h3>"
    if isinstance(across.groups, Undefined):
        return [title, paragraph(f"{outcome(None)}: {escape(across.groups.undefined)}.")]
    return [
        title,
        paragraph(
            "The runs are compared where their mean losses are the same. "
            f"{SKILL} {PERMUTED} {PASSES}{least_p(axis.settings)}"
        ),
        groupings_table(
            f"Skill of the learning times of {source} for the falls from run to run; the intervals "
            f"are over {number(axis.documents, ',')} documents.",
            across.groups,
        ),
    ]


def _verdicts(anchor: str, axis: AxisSummary) -> list[VerdictRow]:
    """Return the verdicts, if tested: do learning times along T predict the gains on this axis?"""
    if axis.across is None:
        return []
    claim = (
        f"Learning times along T of {escape(axis.across.source)} predict gains along {axis.axis}"
    )
    if isinstance(axis.across.groups, Undefined):
        reason = escape(axis.across.groups.undefined)
        return [VerdictRow(anchor, claim, Verdict.UNDECIDED, reason, "–")]
    return [
        VerdictRow.of(anchor, each.test, "gain over permuted times", claim=f"{claim}: {name}")
        for name, each in axis.across.groups.items()
        if each.test is not None
    ]


def _derivative_figure(anchor: str, arrays: AxisArrays, size: str) -> str:
    """Draw the measured -dL/dx over the size, with the sizes of the runs."""
    size_G, size_K = np.exp(arrays.x_G), np.exp(arrays.x_K)
    measured_RG = arrays.measured_RG

    def paint(figure: Figure) -> None:
        axes = figure.add_subplot()
        if len(measured_RG) > 2:
            band(axes, size_G, np.quantile(measured_RG[1:], [0.025, 0.975], axis=0), MEASURED)
        axes.plot(size_G, measured_RG[0], color=MEASURED, lw=2.4)
        for each in size_K:
            axes.axvline(each, color="#999999", lw=0.8, ls=(0, (1, 2)))
        time_axis(axes, TimeScale(float(size_K[0]), float(size_K[-1]), has_zero=False), size)
        axes.set_xticks(size_K, [short(each) for each in size_K])
        axes.set_xticks([], minor=True)
        axes.set_ylabel("−dL/dx (nats per unit of x)")

    alt = f"Measured slope of the mean loss over {size}"
    return draw(anchor, alt, 3.4, paint)
