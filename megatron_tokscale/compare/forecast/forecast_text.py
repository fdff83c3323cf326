"""A forecast as lines for a terminal."""

import math
from collections.abc import Iterable
from typing import Final

from megatron_tokscale.results import non_finite_line
from megatron_tokscale.results.estimate import Estimate, Undefined, format_estimate
from megatron_tokscale.results.forecast import (
    GROUPINGS,
    ORIGINS,
    Forecast,
    Horizon,
    Method,
    Origin,
    Standing,
)

_NAME: Final = 34  # width of the first column
_CELL: Final = 24  # width of a number with its interval


def describe_forecast(found: Forecast) -> str:
    """Return the forecast, its back-tests and what they say of it, as lines."""
    now, fit = found.now, found.fit
    lines = [
        f"  forecast from {found.time} {_time(now.time)}, "
        f"mean loss {format_estimate(now.loss)} nats",
        f"  {found.settings.tokens:,} tokens, {now.probes} probes; 95% intervals over "
        f"{found.n_units:,} {fit.unit_kind}, probes, and the error of the forecast",
        f"  scored range: {found.scored.describe(found.time)}",
        *(f"  assumed: {each}" for each in found.assumed),
        *(f"  missing: {each}" for each in found.missing),
        *non_finite_line(found.non_finite),
        "",
        *_table("nats per token still to come", found, now.horizons),
        *_silent(now),
        *_hazard(now),
        "",
        *(
            line
            for share, test in zip(ORIGINS, found.back_tests, strict=True)
            for line in _back_test(share, test, found)
        ),
        "",
        "  by the back-tests",
        *(
            f"    {each.method!s:<{_NAME - 4}}{each.standing}: {each.reason}"
            for each in found.judgements
            if each.method is not Method.NOTHING
        ),
        *_refutation(found),
        "",
        *_classes(found),
    ]
    return "\n".join(lines)


def _silent(now: Origin) -> list[str]:
    """Return a line for each method that has no forecast: why."""
    falls = now.horizons[0].falls
    return [
        f"    no {method}: {found.undefined}"
        for method, found in falls.items()
        if isinstance(found, Undefined)
    ]


def _hazard(now: Origin) -> list[str]:
    """Return the line on the hazard; none without a hazard."""
    if isinstance(now.horizons[0].falls[Method.HAZARD], Undefined):
        return []
    return [
        f"    by the {Method.HAZARD}: {now.learned:.0%} of the tokens have fallen, "
        f"{now.censored:.0%} wait; a factor of two in time brings "
        f"{format_estimate(now.hazard_per_octave, '.2f')} of what is left; {_correction(now)}"
    ]


def _correction(origin: Origin) -> str:
    """Return the correction of the hazard's falls in words."""
    if math.isfinite(origin.correction):
        return f"correction {origin.correction:.2f}"
    return (
        "not corrected, as half of this time lies too early for a forecast: its falls may be wrong "
        "by a factor of two or more, which its intervals include"
    )


def _refutation(found: Forecast) -> list[str]:
    """Return a line if the back-tests refute the hazard, or the method that is printed first."""
    standing = {each.method: each.standing for each in found.judgements}
    lines = []
    if standing[Method.HAZARD] is Standing.REFUTED:
        lines.append(
            f"  the forecast by the {Method.HAZARD} is refuted by its own back-test, and with it "
            "its classes below"
        )
    if found.best is Method.NOTHING:
        lines.append("  no method does better here than to say that nothing more falls")
    return lines


def _table(title: str, found: Forecast, horizons: Iterable[Horizon]) -> list[str]:
    """Return a table of the falls, the methods in the order of their judgements."""
    horizons = tuple(horizons)
    heads = [f"by {_time(each.time)} (x{each.factor:g})" for each in horizons]
    width = max(_NAME, len(title) + 2)
    rows = [f"  {title:<{width}}" + "".join(f"{head:<{_CELL}}" for head in heads)]
    for judgement in found.judgements:
        if judgement.method is Method.NOTHING:
            continue
        cells = [_cell(each.falls[judgement.method]) for each in horizons]
        rows.append(
            f"    {judgement.method!s:<{width - 2}}" + "".join(f"{cell:<{_CELL}}" for cell in cells)
        )
    if all(each.measured for each in horizons):
        cells = [_cell(each.measured) for each in horizons]
        rows.append(f"    {'came':<{width - 2}}" + "".join(f"{cell:<{_CELL}}" for cell in cells))
    return [row.rstrip() for row in rows]


def _back_test(share: float, test: Origin | Undefined, found: Forecast) -> list[str]:
    if isinstance(test, Undefined):
        return [f"  no back-test from T/{1 / share:g}: {test.undefined}"]
    title = f"back-test from {found.time} {_time(test.time)} (T/{1 / share:g})"
    lines = _table(title, found, test.horizons)
    if test.groups and not math.isfinite(test.correction):
        lines.append(f"    the {Method.HAZARD} is {_correction(test)}")
    errors = [
        f"{grouping} {each.hazard:.3f} / {each.slope:.3f} / {each.even:.3f}"
        for grouping, each in test.group_errors.items()
        if len(test.groups[grouping]) > 1
    ]
    if errors:
        lines.append(
            f"    mean error of the groups' falls in nats ({Method.HAZARD} / {Method.SLOPE} / the "
            f"fall that came, spread evenly): {'; '.join(errors)}"
        )
    return lines


def _classes(found: Forecast) -> list[str]:
    """Return the tables of the classes of context, at the middle horizon."""
    middle = len(found.now.horizons) // 2
    horizon = found.now.horizons[middle]
    if not found.now.groups:
        return []
    lines = [
        f"  in which tokens, by the {Method.HAZARD}, by {_time(horizon.time)}: share of the "
        "tokens; their loss now and its fall, in nats per token of theirs; share of the fall of all"
    ]
    for grouping, groups in found.now.groups.items():
        tokens = sum(each.tokens for each in groups)
        lines.append(f"    {GROUPINGS.get(grouping, grouping)}")
        lines += [
            f"      {each.name:<{_NAME - 4}}{each.tokens / tokens:>7.1%} {each.loss:>8.3f}  "
            f"{format_estimate(each.falls[middle]):<{_CELL}}{each.shares[middle].value:>6.1%}"
            for each in groups
        ]
    return lines


def _cell(estimate: Estimate | Undefined | None) -> str:
    if estimate is None or isinstance(estimate, Undefined):
        return "-"
    return format_estimate(estimate)


def _time(time: float) -> str:
    """Return a time in whole units up to a million, else in four digits."""
    return f"{time:,.0f}" if 100 <= time < 1e6 else f"{time:.4g}"
