"""Pieces of HTML. What comes from outside goes through `escape`; cells are HTML already."""

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from megatron_tokscale.report.style import dataset_colour

__all__ = [
    "bar",
    "dataset",
    "details",
    "escape",
    "estimate",
    "facts",
    "figure",
    "interval",
    "number",
    "paragraph",
    "plural",
    "section",
    "swatch",
    "table",
]


def number(value: float | None, pattern: str = ",.3f") -> str:
    """A number as it is read, with all its digits in the `value` attribute; a dash for none."""
    if value is None or not math.isfinite(value):
        return "–"
    exact = int(value) if isinstance(value, int) else float(value)
    text = f"{exact:{pattern}}".replace("-", "−")
    if not text.strip("−0.%"):
        text = text.replace("−", "")
    return f'<data value="{exact!r}">{text}</data>'


def estimate(result: Mapping[str, Any], name: str, pattern: str = ",.3f") -> str:
    """NAME of a JSON result, and its 95% interval if it has one."""
    return number(result[name], pattern) + interval(result, name, pattern)


def interval(result: Mapping[str, Any], name: str, pattern: str = ",.3f") -> str:
    """The 95% interval of NAME; nothing where it is not defined."""
    bounds = result[f"{name}_interval"]
    if bounds is None or None in bounds:
        return ""
    low, high = (number(bound, pattern) for bound in bounds)
    return f' <span class="interval">[{low}, {high}]</span>'


def bar(share: float | None) -> str:
    """A share in percent with a bar behind it; a negative share has none."""
    length = 100 * min(max(share or 0.0, 0.0), 1.0)
    return f'<span class="bar" style="--share:{length:.1f}%">{number(share, ".1%")}</span>'


def plural(count: int, one: str, many: str = "") -> str:
    """A count and its noun."""
    return f"{number(count, ',')} {one if count == 1 else many or one + 's'}"


def swatch(colour: str, text: str) -> str:
    """A text behind a patch of the colour that stands for it."""
    return f'<span class="key" style="background:{colour}"></span>{escape(text)}'


def dataset(index: int, name: str) -> str:
    """A dataset's name behind its colour."""
    return swatch(dataset_colour(index), name)


def paragraph(html: str, kind: str = "") -> str:
    """A paragraph of HTML, with a CSS class if given."""
    return f'<p class="{kind}">{html}</p>' if kind else f"<p>{html}</p>"


def section(anchor: str, title: str, *parts: str) -> str:
    """A section with a heading that can be linked to."""
    heading = f'<h2 id="{anchor}">{escape(title)}</h2>'
    return "\n".join([f'<section aria-labelledby="{anchor}">', heading, *parts, "</section>"])


def table(
    caption: str, header: Sequence[str], rows: Sequence[Sequence[str]], kind: str = ""
) -> str:
    """A table; the first cell of each row names it, the others are aligned as numbers.

    `kind` is a CSS class: "words" aligns them as text.
    """
    head = "".join(f'<th scope="col">{cell}</th>' for cell in header)
    body = "\n".join(
        f'<tr><th scope="row">{row[0]}</th>{"".join(f"<td>{cell}</td>" for cell in row[1:])}</tr>'
        for row in rows
    )
    start = f'<table class="{kind}">' if kind else "<table>"
    return (
        f'<div class="wide">{start}<caption>{caption}</caption><thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{body}\n</tbody></table></div>"
    )


def facts(rows: Sequence[Sequence[str]]) -> str:
    """A table of names and what belongs to them."""
    body = "\n".join(f'<tr><th scope="row">{name}</th><td>{what}</td></tr>' for name, what in rows)
    return f'<div class="wide"><table class="facts-of"><tbody>\n{body}\n</tbody></table></div>'


def details(summary: str, *parts: str) -> str:
    """Parts that are folded away behind one line of HTML."""
    return "\n".join(["<details>", f"<summary>{summary}</summary>", *parts, "</details>"])


def figure(svg: str, caption: str) -> str:
    """An inline SVG and what it shows."""
    return f"<figure>\n{svg}\n<figcaption>{caption}</figcaption>\n</figure>"
