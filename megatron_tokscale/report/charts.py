"""Figures as inline SVG, with their time axis and their choice of datasets.

Shapes: K probe steps, G grid points.
"""

import io
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Self

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from megatron_tokscale.core.arrays import Floats
from megatron_tokscale.report.html import DATASET_COLOURS, escape
from megatron_tokscale.store import WatchedTokens

_LABELS: Final = {
    "step": "training step",
    "tokens": "training tokens",
    "lr-sum": "sum of learning rates over their peak",
}
_UNITS: Final = {
    "step": "steps",
    "tokens": "tokens",
    "lr-sum": "peak-rate steps",
}
MAX_SHOWN: Final = 6  # datasets in one figure: one for each colour

_ZERO_GAP: Final = 2.0  # first positive time over the place of time 0: an octave is visible
_WIDE: Final = 100.0  # last over first time above which only powers of ten are labelled
_SUFFIXES: Final = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))
_DASHES: Final = ("-", (0, (5, 1.5)), (0, (1.5, 1)), (0, (5, 1, 1, 1)))
_WIDTH: Final = 8.6  # inches; the page shows every figure as wide as its text
_NO_METADATA: Final = dict.fromkeys(("Creator", "Date", "Format", "Type"))
_SETTINGS: Final = {
    "svg.hashsalt": "megatron-tokscale",  # the same ids in every run
    "svg.fonttype": "none",  # text stays text, in the fonts of the page
    "text.parse_math": False,  # a dollar sign in a dataset's name is no formula
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


def time_label(name: str) -> str:
    """Return the label of a time axis by the name of the time: an imported axis has its own."""
    return _LABELS.get(name, name)


def time_unit(name: str) -> str:
    """Return the unit of a time by its name, as HTML."""
    return escape(_UNITS.get(name, name))


@dataclass(frozen=True)
class TimeScale:
    """A logarithmic time axis with a place for time 0 at its left.

    Attributes:
        low: first positive time.
        high: last time.
        has_zero: whether there is a probe at time 0.
    """

    low: float
    high: float
    has_zero: bool

    @classmethod
    def from_times(cls, time_K: Floats) -> Self:
        """Return the scale that holds these times."""
        positive = time_K[time_K > 0]
        return cls(float(positive.min()), float(positive.max()), bool((time_K == 0).any()))

    @property
    def zero(self) -> float:
        """The place of time 0: a factor of two left of the first positive time."""
        return self.low / _ZERO_GAP

    @property
    def left(self) -> float:
        """The left end of the axis."""
        return self.zero if self.has_zero else self.low

    def place(self, time_K: Floats) -> Floats:
        """Return the times, with 0 moved to its place."""
        return np.where(time_K > 0, time_K, self.zero)

    def ticks(self) -> dict[float, str]:
        """Return labels by position: time 0 and powers of ten; 1, 2 and 5 within two decades."""
        wide = self.high / self.low > _WIDE
        steps = [m * 10.0**e for e in self._exponents() for m in ((1,) if wide else (1, 2, 5))]
        inside = {t: short(t) for t in steps if self.low * 0.999 <= t <= self.high * 1.001}
        return ({self.zero: "0"} if self.has_zero else {}) | inside

    def minor_ticks(self) -> list[float]:
        """Return the multiples of the powers of ten between the ends."""
        steps = (m * 10.0**e for e in self._exponents() for m in range(2, 10))
        return [t for t in steps if self.low <= t <= self.high]

    def _exponents(self) -> range:
        return range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)


def draw(name: str, alt: str, height: float, paint: Callable[[Figure], None]) -> str:
    """Let `paint` draw on a figure of the page's width; return its SVG without date or address.

    The user's matplotlib settings are neither used nor changed.

    Args:
        name: prefix of the SVG's ids, which must be unique in the page.
        alt: a description for readers who do not see the figure.
        height: in inches.
        paint: draws on the empty figure.
    """
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(_SETTINGS)
        figure = Figure(figsize=(_WIDTH, height), layout="constrained")
        paint(figure)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata=_NO_METADATA, transparent=True)
    return _inline(buffer.getvalue(), name, alt)


def _inline(text: str, name: str, alt: str) -> str:
    """Return the <svg> element alone, without namespaces, styles, and ids that nothing uses."""
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


def time_axis(axes: Axes, scale: TimeScale, label: str) -> None:
    """Make the x axis logarithmic, with time 0 left of a dotted line."""
    axes.set_xscale("log")
    axes.set_xlim(scale.left / 1.15, scale.high * 1.1)
    ticks = scale.ticks()
    axes.set_xticks(list(ticks), list(ticks.values()))
    axes.set_xticks(scale.minor_ticks(), [], minor=True)
    axes.set_xlabel(label)
    if scale.has_zero:
        axes.axvline((scale.zero * scale.low) ** 0.5, color="#999999", lw=0.7, ls=(0, (1, 2)))


def band(axes: Axes, time_G: Floats, interval_2G: Floats, colour: str) -> None:
    """Fill the area between the ends of an interval."""
    axes.fill_between(time_G, *interval_2G, color=colour, alpha=0.25, lw=0)


def dataset_line(index: int) -> str | tuple[int, tuple[float, ...]]:
    """Return the dashes of dataset `index`: they change where the colours repeat."""
    return _DASHES[index // len(DATASET_COLOURS) % len(_DASHES)]


def largest_datasets(tokens: WatchedTokens) -> dict[int, str]:
    """Return index and name of the six datasets with the most watched tokens, by index."""
    count_D = np.bincount(tokens.dataset_N, minlength=len(tokens.datasets))
    chosen = np.argsort(-count_D, kind="stable")[:MAX_SHOWN].tolist()
    return {d: tokens.datasets[d] for d in sorted(chosen)}


def left_out(shown: dict[int, str], tokens: WatchedTokens) -> str:
    """Return a sentence for the caption of a figure that does not show every dataset."""
    count = len(tokens.datasets)
    return f" Shown: the {len(shown)} largest of {count} datasets." if len(shown) < count else ""


def short(value: float) -> str:
    """Return a positive number in about four characters: 300, 2.5k, 10M."""
    for size, suffix in _SUFFIXES:
        if value >= size * 0.9999:  # 999.9 is 1k, not 1e+03
            return f"{value / size:.3g}{suffix}"
    return f"{value:.3g}"


def time_of(x_K: Floats) -> Floats:
    """Return the times of which x is the natural logarithm; 0 for -inf."""
    return np.asarray(np.exp(x_K))
