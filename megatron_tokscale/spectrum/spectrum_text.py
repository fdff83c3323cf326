"""How well spectra reconstruct and predict the loss, as tables for a terminal."""

from collections.abc import Mapping
from typing import Any

from megatron_tokscale.results import non_finite_line

_SOURCES = {
    "full": "every token's own transition",
    "kernel": "drop-weighted spectrum, one kernel",
    "spectrum": "learning times alone",
}


def describe_spectrum(result: Mapping[str, Any]) -> str:
    """Reconstructions, widths beside their null, and the forward prediction."""
    lines = non_finite_line(result["non_finite"]) + _reconstructions(result)
    widths = result["widths"]
    observed, null = (
        with_interval(widths[name]["width_decades"], "p50")
        for name in ("observed", "mean_curve_null")
    )
    lines += [
        f"  10-90% width, median, in decades of time: {observed}",
        f"  if every token followed the mean curve:   {null}",
        "  learning is local: " + _verdict(widths["local"]),
        *_forward(result["forward"]),
    ]
    return "\n".join(lines)


def _reconstructions(result: Mapping[str, Any]) -> list[str]:
    lines = [f"  {'-dL/dx rebuilt from':<46}{'R^2 (95%)':<26}{'other documents'}"]
    for name, meaning in _SOURCES.items():
        same, other = (
            with_interval(result[part][name], "r2") for part in ("same_tokens", "other_documents")
        )
        lines.append(f"  {name + ': ' + meaning:<46}{same:<26}{other}")
    return lines


def _forward(forward: Mapping[str, Any]) -> list[str]:
    if "undefined" in forward:
        return [f"  forward in time: {forward['undefined']}"]
    errors = {name: with_interval(forward[name], "error") for name in ("tokens", *_RIVALS)}
    return [
        f"  the last factor of two, where the loss fell by {with_interval(forward, 'fall')} nats; "
        "mean error predicted from before:",
        *(f"    {meaning:<42}{errors[name]}" for name, meaning in _FORWARD.items()),
        "  error of the best rival less that of the tokens: "
        + with_interval(forward, "gain_over_best_rival"),
        *(
            f"    which {name} falls, skill gained over permuted times: "
            f"{with_interval(each, 'gain_over_permuted')}"
            for name, each in forward["groups"].items()
        ),
    ]


_RIVALS = ("power-law", "uniform")
_FORWARD = {
    "tokens": "tokens fitted on the part before",
    "power-law": "the power law of the part before",
    "uniform": "a uniform spectrum: it goes on as before",
}


def describe_transfer(entry: Mapping[str, Any]) -> str:
    """Skills by group of tokens and the learning order, from an entry of transfer.json."""
    lines = [f"  learning times of {entry['source']}, {entry['documents']} documents"]
    for alignment in ("absolute", "by loss"):
        lines += _alignment(alignment, entry[alignment])
    order = entry["order"]
    if order["spearman"] is None:
        return "\n".join([*lines, f"  learning order: only {order['tokens']} tokens in both runs"])
    lines.append(f"  rank in the learning order of {order['tokens']:,} tokens, Spearman's rho with")
    lines += [
        f"    {name:<40}{with_interval(value, 'value')}"
        for name, value in order["spearman"].items()
    ]
    lines.append(
        f"  beyond the plain predictors: {with_interval(order, 'partial')}: "
        f"{_verdict(order['passes'])}"
    )
    lines.append(
        f"  variance of the ranks explained by the plain predictors "
        f"{with_interval(order, 'explained_by_plain')}, with the learning time "
        f"{with_interval(order, 'explained_with_time')}"
    )
    return "\n".join(lines)


def describe_axis(result: Mapping[str, Any]) -> str:
    """Return the losses along D or M and the test across the axes as lines, from axis.json."""
    falls = ["", *(f", a fall of {with_interval(each, 'fall')}" for each in result["falls"])]
    lines = [
        f"  axis {result['axis']} ({result['size']}), {len(result['runs'])} runs; the mean loss "
        f"falls by {with_interval(result, 'fall')} nats",
        *(
            f"    {run['name']:<24}{run['size']:>16,.0f}{run['loss']:>9.3f} nats{fall}"
            for run, fall in zip(result["runs"], falls, strict=True)
        ),
    ]
    across = result["across"]
    if across is None:
        return "\n".join(lines)
    lines.append(f"  learning times along T of {across['source']} against this axis")
    skills = across if "undefined" in across else across["groups"]
    return "\n".join([*lines, *_alignment("by loss", skills)])


def _alignment(name: str, result: Mapping[str, Any]) -> list[str]:
    if "undefined" in result:
        return [f"  aligned {name}: {result['undefined']}"]
    columns = [
        column
        for column in ("events", "permuted", "full", "source", "own")
        if any(column in each for each in result.values())
    ]
    head = "".join(f"{column:>10}" for column in columns)
    lines = [f"  {'aligned ' + name:<24}{head}   gain of events over permuted"]
    for grouping, each in result.items():
        skills = "".join(
            f"{number(each[column]['skill']) if column in each else '':>10}" for column in columns
        )
        gain = with_interval(each, "gain_over_permuted")
        lines.append(f"    {grouping:<22}{skills}   {gain}: {_verdict(each['passes'])}")
    return lines


def with_interval(result: Mapping[str, Any], name: str) -> str:
    """A number with its interval."""
    interval = result.get(f"{name}_interval")
    bounds = "" if interval is None else f" [{number(interval[0])}, {number(interval[1])}]"
    return number(result[name]) + bounds


def number(value: float | None) -> str:
    """Three decimals."""
    return "-" if value is None else f"{value:.3f}"


def _verdict(passed: bool | None) -> str:
    return {True: "yes", False: "not shown", None: "undefined"}[passed]
