"""The figure of a transfer: the skill gained over the null, by grouping and alignment."""

from collections.abc import Mapping
from typing import Any

from megatron_tokscale.report.style import ALIGNMENTS
from megatron_tokscale.report.svg import draw

ALIGNED = {"absolute": "at the same time", "by loss": "at the same mean loss"}
_OFFSET = 0.16


def gains(anchor: str, entry: Mapping[str, Any]) -> str:
    """Dots with intervals, a row per grouping; nothing if no gain is defined."""
    defined = {
        alignment: entry[alignment]
        for alignment in ALIGNMENTS
        if "undefined" not in entry[alignment]
    }
    groupings = list(dict.fromkeys(grouping for result in defined.values() for grouping in result))
    if not groupings:
        return ""

    def paint(figure: Any) -> None:
        axes = figure.add_subplot()
        axes.axvline(0, color="#999999", lw=0.8)
        for n, (alignment, result) in enumerate(defined.items()):
            for grouping, each in result.items():
                place = groupings.index(grouping) + (2 * n - 1) * _OFFSET
                _gain(axes, place, each, *ALIGNMENTS[alignment])
            colour, marker = ALIGNMENTS[alignment]
            axes.plot([], [], marker, ls="-", lw=1.4, ms=5, color=colour, label=ALIGNED[alignment])
        axes.set_yticks(range(len(groupings)), groupings)
        axes.set_ylim(len(groupings) - 0.5, -0.5)
        axes.grid(visible=False, axis="y")
        axes.set_xlabel("skill gained over permuted learning times")
        figure.legend(loc="outside upper left", ncols=2)

    alt = f"Gain over permuted learning times of {entry['source']} for each grouping of the tokens"
    return draw(anchor, alt, 0.9 + 0.36 * len(groupings), paint)


def _gain(axes: Any, place: float, each: Mapping[str, Any], colour: str, marker: str) -> None:
    gain, interval = each["gain_over_permuted"], each["gain_over_permuted_interval"]
    if gain is None:
        return
    if interval is not None:
        axes.plot(interval, [place, place], color=colour, lw=1.4)
    face = colour if each["passes"] else "white"
    axes.plot([gain], [place], marker, ms=5, mec=colour, mfc=face)
