"""A matplotlib figure as an inline SVG: no date, no addresses, no global state, ids of its own."""

import io
import re
from collections.abc import Callable
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from megatron_tokscale.report.markup import escape
from megatron_tokscale.report.scale import TimeScale

_SETTINGS = {
    "svg.hashsalt": "megatron-tokscale",
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.family": "sans-serif",
    "font.size": 8.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#777777",
    "axes.labelcolor": "#333333",
    "axes.titlesize": 8.5,
    "axes.titlelocation": "left",
    "xtick.color": "#777777",
    "ytick.color": "#777777",
    "xtick.labelcolor": "#333333",
    "ytick.labelcolor": "#333333",
    "axes.grid": True,
    "grid.color": "#ececec",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "lines.linewidth": 1.4,
}
_WIDTH = 8.6
_NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))


def draw(name: str, alt: str, height: float, paint: Callable[[Any], None]) -> str:
    """Let `paint` draw on a figure of the page's width and `height` inches; return its SVG.

    `name` prefixes the ids, which must be unique in the page; `alt` says what is seen.
    """
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(_SETTINGS)
        figure = Figure(figsize=(_WIDTH, height), layout="constrained")
        paint(figure)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata=_NO_METADATA, transparent=True)
    return _inline(buffer.getvalue(), name, alt)


def time_axis(axes: Any, scale: TimeScale, label: str) -> None:
    """Make the x axis logarithmic, with its own place for time 0."""
    axes.set_xscale("log")
    axes.set_xlim(scale.left / 1.15, scale.high * 1.1)
    ticks = scale.ticks()
    axes.set_xticks(list(ticks), list(ticks.values()))
    axes.set_xticks(scale.minor_ticks(), [], minor=True)
    axes.set_xlabel(label)
    if scale.has_zero:
        axes.axvline((scale.zero * scale.low) ** 0.5, color="#999999", lw=0.7, ls=(0, (1, 2)))


def _inline(text: str, name: str, alt: str) -> str:
    """Only the <svg> element, without namespaces, styles and ids that nothing refers to."""
    text = text[text.index("<svg") :]
    text = re.sub(r"<(metadata|style)\b.*?</\1>", "", text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    view_box = re.search(r'viewBox="[^"]*"', text)
    assert view_box is not None
    body = text[text.index(">") + 1 :].replace("xlink:href", "href")
    used = set(re.findall(r'(?:href="|url\()#([^")]+)', body))
    body = re.sub(r' id="([^"]+)"', lambda m: f' id="{name}-{m[1]}"' if m[1] in used else "", body)
    body = re.sub(r'(href="|url\()#', rf"\g<1>#{name}-", body)
    body = re.sub(r"\n\s*", "\n", body).replace("\n\n", "\n")
    return f'<svg role="img" aria-label="{escape(alt)}" {view_box[0]}>{body.strip()}'
