"""The sections on the axes D and M: what tokens gain from more data, or a larger model.

Shapes: G grid points, R resamples (the first is the data as they are), K runs.
"""

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
from matplotlib.figure import Figure

from megatron_tokscale.report.charts import TimeScale, band, draw, short, time_axis
from megatron_tokscale.report.html import (
    MEASURED,
    escape,
    figure,
    json_estimate,
    number,
    paragraph,
    table,
)
from megatron_tokscale.report.inputs import ReportInputs
from megatron_tokscale.report.sections import Section
from megatron_tokscale.report.sections.transfer import (
    LEAST,
    PASSES,
    PERMUTED,
    SKILL,
    groupings_table,
    least_p,
    passed,
    weakest,
)
from megatron_tokscale.report.verdicts import Verdict, outcome
from megatron_tokscale.results import AxisResult

_SIZES: Final = {
    "tokens": "training tokens",
    "parameters": "parameters",
    "non-embedding": "parameters without embeddings",
    "flops": "FLOPs per token",
}


def axis_sections(inputs: ReportInputs) -> list[Section]:
    """Return a section for every axis."""
    return [_section(f"axis-{n}", axis) for n, axis in enumerate(inputs.axes, 1)]


def _section(anchor: str, axis: AxisResult) -> Section:
    result = axis.result
    size = _SIZES[result["size"]]
    falls = ["–", *(json_estimate(each, "fall") for each in result["falls"])]
    parts = [
        paragraph(
            f"On this axis, the last losses of {number(len(result['runs']), ',')} runs of growing "
            f"size take the place of losses over time: x = ln of {size}. There is one run of each "
            "size: the intervals are over documents, and do not cover other seeds."
        ),
        table(
            "The runs by size. From the smallest to the largest, the mean loss falls by "
            f"{json_estimate(result, 'fall')} nats.",
            ["run", size, "mean loss (nats)", "fall from the run before (nats)"],
            [
                [escape(each["name"]), number(each["size"], ",.0f"), number(each["loss"]), fall]
                for each, fall in zip(result["runs"], falls, strict=True)
            ],
        ),
        figure(
            _derivative_figure(anchor, axis),
            "Line and band: the smoothed slope of the mean loss, with its 95% interval over "
            "documents. Dotted lines: the runs; nothing was measured between them.",
        ),
        *_across_axes(result),
    ]
    entry = f"Axis {result['axis']}"
    return Section(anchor, entry, f"{entry}: {size}", parts, _verdicts(anchor, result))


def _across_axes(result: Mapping[str, Any]) -> list[str]:
    """Return the parts on the learning times of the axis T, held against this axis."""
    across = result["across"]
    if across is None:
        return [
            paragraph(
                f"Learning times of a run were not tested on this axis: {outcome(None)} "
                "(<code>spectrum --source RUN</code> tests them)."
            )
        ]
    source = escape(across["source"])
    title = f"<h3>Learning times along T of {source} on the axis {escape(result['axis'])}</h3>"
    if "undefined" in across:
        return [title, paragraph(f"{outcome(None)}: {escape(across['undefined'])}.")]
    return [
        title,
        paragraph(
            "The runs are compared where their mean losses are the same. "
            f"{SKILL} {PERMUTED} {PASSES}{least_p(result['settings'])}"
        ),
        groupings_table(
            f"Skill of the learning times of {source} for the falls from run to run; the intervals "
            f"are over {number(result['documents'], ',')} documents.",
            across["groups"],
        ),
    ]


def _verdicts(anchor: str, result: Mapping[str, Any]) -> list[Verdict]:
    """Return the verdict, if it was tested: do learning times along T tell who gains here?"""
    across = result["across"]
    if across is None:
        return []
    question = (
        f"Learning times along T of {escape(across['source'])} predict which groups of tokens gain "
        f"along {escape(result['axis'])}"
    )
    if "undefined" in across:
        return [Verdict(anchor, question, None, "–", escape(across["undefined"]))]
    groups = across["groups"]
    return [Verdict(anchor, question, passed(groups), weakest(groups), LEAST)]


def _derivative_figure(anchor: str, axis: AxisResult) -> str:
    """Draw the measured -dL/dx over the size, with the sizes of the runs."""
    arrays, size = axis.arrays, _SIZES[axis.result["size"]]
    size_G, size_K = np.exp(arrays["x_G"]), np.exp(arrays["x_K"])
    measured_RG = arrays["measured_RG"]

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
