"""The sections on the axes D and M: what tokens gain from more data, or a larger model."""

from collections.abc import Mapping
from typing import Any

from megatron_tokscale.report.analysis import Analysis
from megatron_tokscale.report.markup import (
    escape,
    estimate,
    figure,
    number,
    paragraph,
    section,
    table,
)
from megatron_tokscale.report.sections.axis_figure import SIZES, axis_derivative
from megatron_tokscale.report.sections.skills import (
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


def axis_sections(analysis: Analysis) -> list[tuple[str, str, str]]:
    """For every axis its anchor, its entry in the navigation, and its HTML."""
    return [
        (_anchor(n), f"Axis {escape(axis.result['axis'])}", _section(_anchor(n), axis))
        for n, axis in enumerate(analysis.axes)
    ]


def axis_verdicts(analysis: Analysis) -> list[Verdict]:
    """Return per axis that was tested: do learning times along T tell who gains along it?"""
    return [
        verdict
        for n, axis in enumerate(analysis.axes)
        for verdict in _across(_anchor(n), axis.result)
    ]


def _anchor(n: int) -> str:
    return f"axis-{n + 1}"


def _section(anchor: str, axis: AxisResult) -> str:
    result = axis.result
    name, size = escape(result["axis"]), SIZES[result["size"]]
    falls = ["–", *(estimate(each, "fall") for each in result["falls"])]
    return section(
        anchor,
        f"Axis {result['axis']}: {size}",
        paragraph(
            f"The last losses of {number(len(result['runs']), ',')} runs of growing size take the "
            f"place of losses over time: x = ln of {size}. One run of each size: the intervals "
            "are over documents and know nothing of other seeds."
        ),
        table(
            f"The runs, by size. The mean loss falls by {estimate(result, 'fall')} nats.",
            ["run", size, "mean loss (nats)", "fall from the run before (nats)"],
            [
                [escape(each["name"]), number(each["size"], ",.0f"), number(each["loss"]), fall]
                for each, fall in zip(result["runs"], falls, strict=True)
            ],
        ),
        figure(
            axis_derivative(anchor, axis),
            "The slope of the mean loss, smoothed, and its 95% band over documents. Dotted lines: "
            "the runs; between them nothing was measured.",
        ),
        *_across_part(name, result),
    )


def _across_part(name: str, result: Mapping[str, Any]) -> list[str]:
    across = result["across"]
    if across is None:
        return [
            paragraph(
                f"Learning times along time were not tested on this axis: {outcome(None)} "
                "(`--source RUN` tests them)."
            )
        ]
    source = escape(across["source"])
    title = f"<h3>Learning times along T of {source} on the axis {name}</h3>"
    if "undefined" in across:
        return [title, paragraph(f"{outcome(None)}: {escape(across['undefined'])}.")]
    return [
        title,
        paragraph(
            "Both are compared where the mean losses are the same. "
            f"{SKILL} {PERMUTED} {PASSES}{least_p(result['settings'])}"
        ),
        groupings_table(
            f"Skill of {source}'s learning times for the falls from run to run; "
            f"{number(result['documents'], ',')} documents.",
            across["groups"],
        ),
    ]


def _across(anchor: str, result: Mapping[str, Any]) -> list[Verdict]:
    across = result["across"]
    if across is None:
        return []
    question = (
        f"Learning times along T of {escape(across['source'])} tell which groups of tokens gain "
        f"along {escape(result['axis'])}"
    )
    if "undefined" in across:
        return [Verdict(anchor, question, None, "–", escape(across["undefined"]))]
    groups = across["groups"]
    return [Verdict(anchor, question, passed(groups), weakest(groups), LEAST)]
