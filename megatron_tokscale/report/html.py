"""Pieces of HTML, the page's style sheet, and its colours: one thing has one colour everywhere.

Text from outside goes through `escape`; the parameters named `html`, and cells of tables, are HTML
already. The datasets' colours are those of Okabe and Ito (2008), which most colour-blind people
tell apart.
"""

import math
from collections.abc import Sequence
from html import escape

from megatron_tokscale import __version__
from megatron_tokscale.results.estimate import Estimate, Undefined
from megatron_tokscale.store.token_state import TokenState

__all__ = [
    "CSS",
    "DATASET_COLOURS",
    "MEASURED",
    "NULL",
    "STATE_COLOURS",
    "STATE_WORDS",
    "TITLE",
    "bar",
    "dataset",
    "dataset_colour",
    "details",
    "escape",
    "estimate",
    "facts",
    "figure",
    "interval",
    "number",
    "paragraph",
    "passage",
    "plural",
    "section",
    "swatch",
    "table",
    "whole_page",
]

TITLE = "When tokens were learned"  # of every report page; `report --out` knows one by it
COMPARISON_TITLE = "Two runs, token by token"  # the same for `compare --page`
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"
MEASURED = "#111111"
NULL = "#8a8a8a"
DATASET_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")


STATE_COLOURS = {
    TokenState.KNOWN: "#b9cfe0",
    TokenState.LEARNED: "#3b6e96",
    TokenState.UNDER_WAY: "#e8a33d",
    TokenState.TO_COME: "#e4e2da",
    TokenState.UNMOVED: "#c3c1b8",
    TokenState.FORGOTTEN: "#a6473c",
}
STATE_WORDS = {
    TokenState.KNOWN: "known before",
    TokenState.LEARNED: "learned",
    TokenState.UNDER_WAY: "under way",
    TokenState.TO_COME: "to come",
    TokenState.UNMOVED: "never moved",
    TokenState.FORGOTTEN: "forgotten",
}
"""Colours and words of the states."""


def dataset_colour(index: int) -> str:
    """Return the colour of the probe set's dataset `index`; colours repeat after six datasets."""
    return DATASET_COLOURS[index % len(DATASET_COLOURS)]


def number(value: float | None, pattern: str = ",.3f") -> str:
    """Return a rounded number, with all digits in its `value` attribute; a dash for NaN or None."""
    if value is None or not math.isfinite(value):
        return "–"
    exact = int(value) if isinstance(value, int) else float(value)
    text = f"{exact:{pattern}}".replace("-", "−")
    if not text.strip("−0.%"):
        text = text.replace("−", "")
    return f'<data value="{exact!r}">{text}</data>'


def estimate(value: Estimate | Undefined, pattern: str = ",.3f") -> str:
    """Return a number and its 95% interval, if it has one; a dash where it is undefined."""
    if isinstance(value, Undefined):
        return "-"
    return number(value.value, pattern) + interval(value, pattern)


def interval(value: Estimate, pattern: str = ",.3f") -> str:
    """Return the 95% interval of a number; nothing if it has none."""
    if not value.has_interval:
        return ""
    low, high = (number(bound, pattern) for bound in (value.low, value.high))
    return f' <span class="interval">[{low}, {high}]</span>'


def bar(share: float) -> str:
    """Return a share in percent with a bar behind it; a negative share has no bar."""
    length = 100 * min(max(share, 0.0), 1.0) if math.isfinite(share) else 0.0
    return f'<span class="bar" style="--share:{length:.1f}%">{number(share, ".1%")}</span>'


def plural(count: int, one: str, many: str = "") -> str:
    """Return a count and its noun."""
    return f"{number(count, ',')} {one if count == 1 else many or one + 's'}"


def swatch(colour: str, text: str) -> str:
    """Return a text behind a patch of its colour."""
    return f'<span class="key" style="background:{colour}"></span>{escape(text)}'


def dataset(index: int, name: str) -> str:
    """Return a dataset's name behind a patch of its colour."""
    return swatch(dataset_colour(index), name)


def paragraph(html: str, kind: str = "") -> str:
    """Return a paragraph of the CSS class `kind`."""
    return f'<p class="{kind}">{html}</p>' if kind else f"<p>{html}</p>"


def whole_page(title: str, *parts: str, refresh: float | None = None) -> str:
    """Return a page with its title as its heading; no resource of another file, and no script.

    A browser loads the page again after `refresh` seconds, if it is given.
    """
    again = f'\n<meta http-equiv="refresh" content="{refresh:g}">' if refresh else ""
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">{again}',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(title)}</title>\n<style>{CSS}</style>\n</head>\n<body>\n<main>",
            f"<h1>{escape(title)}</h1>",
            paragraph(f"Written by megatron-tokscale {__version__}. Losses are in nats.", "soft"),
            *parts,
            "</main>\n</body>\n</html>\n",
        ]
    )


def section(anchor: str, title: str, *parts: str) -> str:
    """Return a section with a heading that links can lead to."""
    heading = f'<h2 id="{anchor}">{escape(title)}</h2>'
    return "\n".join([f'<section aria-labelledby="{anchor}">', heading, *parts, "</section>"])


def table(
    caption: str, header: Sequence[str], rows: Sequence[Sequence[str]], kind: str = ""
) -> str:
    """Return a table, whose rows begin with their names.

    `kind` is a CSS class: "words" aligns the cells as text, not as numbers; "dense" makes the
    columns narrow.
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
    """Return a table without a header, of pairs of a name and a text."""
    body = "\n".join(f'<tr><th scope="row">{name}</th><td>{what}</td></tr>' for name, what in rows)
    return f'<div class="wide"><table class="facts-of"><tbody>\n{body}\n</tbody></table></div>'


def passage(before: str, target: str, after: str) -> str:
    """Return a token's text, marked, between the texts around it; all three are plain text."""
    return (
        f'<p class="text" dir="auto"><span>{escape(before)}</span><mark>{escape(target)}</mark>'
        f"<span>{escape(after)}</span></p>"
    )


def details(summary: str, *parts: str) -> str:
    """Return parts that are folded under the line `summary` until the reader opens them."""
    return "\n".join(["<details>", f"<summary>{summary}</summary>", *parts, "</details>"])


def figure(svg: str, caption: str) -> str:
    """Return an inline SVG above its caption."""
    return f"<figure>\n{svg}\n<figcaption>{caption}</figcaption>\n</figure>"


CSS = """
:root { color-scheme: light; --ink: #1c1c1c; --soft: #5a5a5a; --line: #dedede; --tint: #f6f6f4;
  --mark: #ffe08a; }
* { box-sizing: border-box; }
html { background: #fff; color: var(--ink); font: 16px/1.55 system-ui, -apple-system, "Segoe UI",
  Roboto, "Helvetica Neue", Arial, sans-serif; }
body { max-width: 58rem; margin: 0 auto; padding: 2rem 1.25rem 5rem; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 .3rem; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin: 3rem 0 .4rem; padding-top: .8rem;
  border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.8rem 0 .4rem; }
p { margin: .5rem 0; max-width: 46rem; }
.soft, figcaption, caption, .facts { color: var(--soft); }
.warning { border-left: 4px solid #d55e00; padding: .3rem .8rem; background: #fdf3ec; }
.verdict { font-size: 1.1rem; border-left: 4px solid #111; padding: .3rem .8rem;
  background: var(--tint); }
.top h2 { margin-top: 1.5rem; }
.lead { font-size: 1.15rem; max-width: none; }
.states th, .states td { padding-left: .4rem; padding-right: .4rem; }
.states thead th { white-space: nowrap; }
.states td:nth-child(n+5) { color: var(--soft); }
.halves { display: grid; grid-template-columns: 1fr 1fr; gap: 0 2.2rem; }
.halves > section { min-width: 0; }
.halves table { min-width: 0; }
.cards { display: grid; grid-template-columns: repeat(3, minmax(0, 1fr)); gap: 1.1rem 1.4rem; }
code { font: .85em ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace;
  background: var(--tint); padding: .05rem .25rem; overflow-wrap: anywhere; }
.stack { width: 100%; height: 1.1rem; display: block; }
nav { border-top: 1px solid var(--line); margin-top: 3rem; padding-top: .4rem; }
nav ol { display: flex; flex-wrap: wrap; gap: .2rem 1.4rem; padding: 0; margin: 1rem 0;
  list-style: none; font-size: .9rem; }
a { color: #00558c; }
a:focus-visible { outline: 2px solid #00558c; outline-offset: 2px; }
figure { margin: 1.2rem 0; }
figure svg { width: 100%; height: auto; display: block; }
svg * { stroke-linejoin: round; }
figcaption, caption { font-size: .875rem; text-align: left; }
caption { padding: 0 0 .35rem; }
.wide { overflow-x: auto; margin: 1.2rem 0; }
table { min-width: 26rem; border-collapse: collapse; font-size: .9rem;
  font-variant-numeric: tabular-nums; }
th, td { padding: .28rem .8rem; border-bottom: 1px solid var(--line); text-align: right;
  vertical-align: top; }
th:first-child { text-align: left; padding-left: 0; }
thead th { font-weight: 600; border-bottom: 1px solid #999; vertical-align: bottom; }
tbody th { font-weight: 400; min-width: 9rem; }
.facts-of td, .words td, .words thead th { text-align: left; }
.dense th, .dense td { padding-left: .45rem; padding-right: .45rem; }
.dense tbody th { min-width: 7rem; }
td .interval { display: block; color: var(--soft); font-size: .8rem; white-space: nowrap; }
.outcome { font-weight: 600; white-space: nowrap; }
.outcome.holds { color: #00634a; }
.outcome.fails { color: #a03c00; }
.outcome.undefined, .outcome.undecided { color: var(--soft); }
.part { padding-left: 1.3rem; }
details { margin: .6rem 0; }
summary { cursor: pointer; font-size: .9rem; color: var(--soft); }
.facts-of tbody th { color: var(--soft); white-space: nowrap; }
.key { display: inline-block; width: .7rem; height: .7rem; border-radius: 2px; margin-right: .4rem;
  vertical-align: -.05rem; }
.bar { display: inline-block; min-width: 6.5rem; padding: 0 .25rem;
  background: linear-gradient(#d3e4f0, #d3e4f0) left / var(--share) 100% no-repeat; }
.token { display: grid; grid-template-columns: minmax(0, 1fr) 19rem; gap: .4rem 1.4rem;
  padding: .9rem 0; border-top: 1px solid var(--line); align-items: start; }
.token .text, .card .text { font: .82rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas,
  "DejaVu Sans Mono", monospace; white-space: pre-wrap; overflow-wrap: anywhere; margin: 0;
  padding: .5rem .7rem;
  background: var(--tint); border-radius: 4px; unicode-bidi: isolate; max-width: none; }
.text span { unicode-bidi: isolate; color: #444; }
.text mark { unicode-bidi: isolate; background: var(--mark); color: #000; font-weight: 600;
  padding: .05rem 0; border-radius: 2px; }
.facts { font-size: .85rem; margin: .45rem 0 0; font-variant-numeric: tabular-nums; }
.facts b { color: var(--ink); font-weight: 600; }
svg.drawn { width: 100%; height: auto; display: block; }
.drawn text { font: 9px system-ui, sans-serif; fill: #5a5a5a; }
.drawn .a { stroke: #bbb; fill: none; }
.drawn .p { stroke: #111; stroke-width: 2.6; stroke-linecap: round; fill: none; }
.drawn .m { stroke: #c0392b; stroke-width: 1.4; fill: none; }
.drawn .c { stroke: #c0392b; stroke-width: .8; stroke-dasharray: 2 2; fill: none; }
@media (max-width: 44rem) { .token, .halves, .cards { grid-template-columns: 1fr; } }
@media print { .token, .card, .halves, figure, table { break-inside: avoid; }
  .key, .bar, mark { print-color-adjust: exact; } }
"""
