"""The section on the nats still to come: the forecast by each method, its back-tests, its groups.

The first screen has the answer in short; this section has the evidence for it.
"""

import math
from collections.abc import Sequence

from megatron_tokscale.core.words import time_text
from megatron_tokscale.report.charts import time_unit
from megatron_tokscale.report.html import (
    escape,
    estimate,
    number,
    paragraph,
    table,
)
from megatron_tokscale.report.inputs import ReportInputs
from megatron_tokscale.report.sections import Section
from megatron_tokscale.results.estimate import Estimate, Undefined
from megatron_tokscale.results.forecast import (
    GROUPINGS,
    ORIGINS,
    Forecast,
    GroupFall,
    Horizon,
    Judgement,
    Method,
    Origin,
    Standing,
)


def forecast_section(inputs: ReportInputs) -> list[Section]:
    """Return the section on the forecast; none if there is no forecast."""
    found = inputs.forecast
    if found is None:
        return []
    unit = time_unit(inputs.time)
    parts = [
        paragraph(
            f"The forecast is made at {time_text(found.now.time)} {unit}, at a mean loss of "
            f"{estimate(found.now.loss)} nats, from {number(found.settings.tokens, ',')} tokens."
        ),
        *(paragraph(f"Assumed: {escape(each)}.", "soft") for each in found.assumed),
        *(paragraph(f"Missing: {escape(each)}.", "soft") for each in found.missing),
        _falls(
            f"Forecast fall of the mean loss from now on, in nats per token, with 95% intervals "
            f"over {inputs.units}, probes and the error of the forecast.{uncorrected(found.now)}",
            found,
            found.now.horizons,
            unit,
        ),
        _judgements(found.judgements),
        *(
            _back_test(share, each, found, unit)
            for share, each in zip(ORIGINS, found.back_tests, strict=True)
        ),
        *_groups(found.now, unit),
    ]
    return [Section("forecast", "Forecast", "What is still to come", parts)]


def shown_judgements(judgements: Sequence[Judgement]) -> list[Judgement]:
    """Return the judgements of the methods that forecast a fall, the best first."""
    return [each for each in judgements if each.method is not Method.NOTHING]


def _falls(caption: str, found: Forecast, horizons: Sequence[Horizon], unit: str) -> str:
    """Return the table of the falls by method and horizon, and the falls that came."""
    rows = [
        [escape(each.method), *(fall(h.falls.get(each.method)) for h in horizons)]
        for each in shown_judgements(found.judgements)
    ]
    if any(each.measured is not None for each in horizons):
        rows.append(["what came", *(fall(each.measured) for each in horizons)])
    return table(caption, ["method", *horizon_names(horizons, unit)], rows)


def horizon_names(horizons: Sequence[Horizon], unit: str) -> list[str]:
    """Return the titles of the columns of the horizons."""
    return [f"by {time_text(each.time)} {unit}" for each in horizons]


def fall(found: Estimate | Undefined | None) -> str:
    """Return a fall with its interval; a dash where it is not known."""
    return "–" if found is None or isinstance(found, Undefined) else estimate(found)


def uncorrected(origin: Origin) -> str:
    """Return a sentence, after a space, if the hazard is not corrected."""
    if not origin.groups or math.isfinite(origin.correction):
        return ""
    return (
        f" The {Method.HAZARD} is not corrected, as half of this time lies too early for a "
        "forecast: its falls may be wrong by a factor of two or more, which its intervals include."
    )


def _judgements(judgements: Sequence[Judgement]) -> str:
    return table(
        "What the back-tests say of each method: mean absolute error over their horizons, as a "
        "share of the fall that came.",
        ["method", "error", "outcome", "because"],
        [
            [
                escape(each.method),
                number(each.error, ".0%"),
                escape(each.standing),
                escape(each.reason),
            ]
            for each in judgements
            if each.standing is not Standing.UNTESTED or each.method is not Method.NOTHING
        ],
        "words",
    )


def _back_test(share: float, test: Origin | Undefined, found: Forecast, unit: str) -> str:
    if isinstance(test, Undefined):
        return paragraph(f"No back-test from T/{1 / share:g}: {escape(test.undefined)}.", "soft")
    caption = (
        f"Back-test: the forecast from the losses up to {time_text(test.time)} {unit}."
        f"{uncorrected(test)}"
    )
    return _falls(caption, found, test.horizons, unit)


def _groups(now: Origin, unit: str) -> list[str]:
    """Return a table of each grouping: the falls of its groups by the hazard."""
    tables = [
        table(
            f"By <b>{escape(GROUPINGS.get(name, name))}</b>",
            [
                "tokens of",
                "tokens",
                "loss now",
                *horizon_names(now.horizons, unit),
                "share of the fall",
            ],
            [_group(each) for each in groups],
            "dense",
        )
        for name, groups in now.groups.items()
        if len(groups) > 1
    ]
    if not tables:
        return []
    return [
        "<h3>In which tokens it is</h3>",
        paragraph(
            f"Loss and its falls by the {escape(Method.HAZARD)}, in nats per token of the group, "
            "and the group's share of the last of these falls, of all tokens.",
            "soft",
        ),
        *tables,
    ]


def _group(found: GroupFall) -> list[str]:
    falls = (estimate(each) for each in found.falls)
    share = estimate(found.shares[-1], ".0%")
    return [escape(found.name), number(found.tokens, ","), number(found.loss), *falls, share]
