"""The figures of a plan over the samples consumed under it.

Shapes: D datasets, Z strata of a dataset, R rows, W windows, T stages.
"""

import math
from collections.abc import Mapping
from itertools import groupby, pairwise
from typing import Final

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, PathPatch
from matplotlib.path import Path

from megatron_tokscale.core.arrays import Floats, Integers
from megatron_tokscale.report.charts import TimeScale, dataset_line, draw, short, time_axis
from megatron_tokscale.report.drawn_plan import DrawnPlan
from megatron_tokscale.report.html import dataset_colour
from megatron_tokscale.reweight.plan_text import shortened as short_name

MAX_ROWS: Final = 24  # rows of a panel: more labels would overlap
_AXIS: Final = "consumed training samples"
_ROW_HEIGHT: Final = 0.17  # inches
RATIOS: Final = (
    (0.0, "below ¼ of base", "#08519c"),
    (0.25, "¼ to ½", "#4a90c8"),
    (0.5, "½ to 0.8", "#a9cfe6"),
    (0.8, "0.8 to 1.25", "#e4e4e4"),
    (1.25, "1.25 to 2", "#fdd0a2"),
    (2.0, "2 to 4", "#f28e3c"),
    (4.0, "4 and more", "#a63603"),
)
"""Shades of weight over base share, blue over grey to orange: lowest ratio, name, colour."""


def shares_figure(name: str, drawn: DrawnPlan, shown: Mapping[int, str]) -> str:
    """Draw weights of datasets, and shares due and drawn in windows, over consumed samples."""
    scale, place_W1 = _scale(drawn)
    start_T, weight_TZ = _stages(drawn, scale)
    weight_TD = drawn.by_dataset(weight_TZ)
    length_W = np.diff(drawn.edge_W1)[:, None]
    target_WD = drawn.by_dataset(drawn.target_WZ) / length_W
    drawn_WD = drawn.by_dataset(drawn.count_WZ) / length_W

    def paint(figure: Figure) -> None:
        top, bottom = figure.subplots(2, 1, sharex=True)
        for d, label in shown.items():
            colour, line = (each(drawn.colour_D[d]) for each in (dataset_colour, dataset_line))
            top.stairs(100 * weight_TD[:, d], start_T, baseline=None, color=colour, ls=line)
            top.plot([], [], color=colour, ls=line, label=label)
            bottom.stairs(100 * target_WD[:, d], place_W1, baseline=None, color=colour, lw=1.1)
            middle_W = np.sqrt(place_W1[1:] * place_W1[:-1])
            bottom.plot(middle_W, 100 * drawn_WD[:, d], ".", ms=4, color=colour)
        _changes(top, drawn)
        time_axis(top, scale, "")
        time_axis(bottom, scale, _AXIS)
        for axes, label in ((top, "weight (%)"), (bottom, "share in window (%)")):
            axes.set_ylabel(label)
            axes.set_ylim(bottom=0)
        figure.legend(loc="outside upper left", ncols=4)

    alt = f"Weights, and shares due and drawn, of datasets over {short(drawn.stop)} samples"
    return draw(f"{name}-shares", alt, 4.2, paint)


def heat_figure(name: str, drawn: DrawnPlan, shown: Mapping[int, str]) -> str:
    """Draw the weight of each stratum over its base share as shades, one panel per dataset."""
    scale, _ = _scale(drawn)
    start_T, weight_TZ = _stages(drawn, scale)
    columns = min(len(shown), 2)
    lines = math.ceil(len(shown) / columns)
    most_rows = min(max(len(drawn.plan.strata_of(d)) for d in shown), MAX_ROWS)

    def paint(figure: Figure) -> None:
        panels = figure.subplots(lines, columns, squeeze=False).ravel()
        for panel, (d, label) in zip(panels, shown.items(), strict=False):
            strata = drawn.plan.strata_of(d)
            rows = row_of(len(strata))
            names = [short_name(drawn.name_Z[z]) for z in strata]
            ratio_TR = ratios(weight_TZ[:, strata], drawn.base_Z[strata], rows)
            _tiles(panel, start_T, levels(ratio_TR))
            n_rows = ratio_TR.shape[1]
            bounds = np.searchsorted(rows, np.arange(n_rows + 1)).tolist()
            labels = [
                names[a] if a + 1 == b else f"{names[a]} – {names[b - 1]}"
                for a, b in pairwise(bounds)
            ]
            panel.set_yticks(range(n_rows), labels, fontsize=7.5)
            panel.set_ylim(n_rows - 0.5, -0.5)
            panel.set_title(label)
            panel.grid(visible=False)
            time_axis(panel, scale, _AXIS)
        for panel in panels[len(shown) :]:
            panel.set_axis_off()
        figure.legend(handles=_legend(), loc="outside upper left", ncols=len(RATIOS))

    alt = "Weight relative to base share of the strata of " + ", ".join(shown.values())
    return draw(f"{name}-strata", alt, 0.5 + lines * (0.8 + _ROW_HEIGHT * most_rows), paint)


def row_of(n_strata: int) -> Integers:
    """Return the row of each stratum: its own, or one with its neighbours if they are many."""
    return np.arange(n_strata) * min(n_strata, MAX_ROWS) // n_strata


def ratios(weight_TZ: Floats, base_Z: Floats, row_Z: Integers) -> Floats:
    """Return weight over base share in each row; NaN where both are zero."""
    first_R = np.searchsorted(row_Z, np.arange(row_Z[-1] + 1))
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(
            np.add.reduceat(weight_TZ, first_R, axis=1) / np.add.reduceat(base_Z, first_R)
        )


def levels(ratio_TR: Floats) -> Integers:
    """Return the shade of each ratio, an index into `RATIOS`; -1 for NaN."""
    bounds = [above for above, _, _ in RATIOS[1:]]
    return np.where(np.isnan(ratio_TR), -1, np.digitize(ratio_TR, bounds))


def _scale(drawn: DrawnPlan) -> tuple[TimeScale, Floats]:
    edge_W1 = drawn.edge_W1.astype(np.float64)
    scale = TimeScale.from_times(edge_W1)
    return scale, scale.place(edge_W1)


def _stages(drawn: DrawnPlan, scale: TimeScale) -> tuple[Floats, Floats]:
    """Return the edges, on the axis, of the stages drawn from, and their weights per stratum."""
    intervals = [each for each in drawn.plan.intervals(drawn.stop) if each[1] > drawn.start]
    edges = [*(max(start, scale.left) for start, _, _ in intervals), drawn.stop]
    return np.array(edges, np.float64), np.array(
        [drawn.plan.weight_Z(segment) for _, _, segment in intervals]
    )


def _changes(axes: Axes, drawn: DrawnPlan) -> None:
    """Draw a line at the first sample of each decision and of each accepted plan."""
    for starts, line, label in (
        ([decision.start for decision in drawn.plan.decisions], ":", "decided while training"),
        ([each.at for each in drawn.plan.accepted], "--", "plan accepted"),
    ):
        inside = [start for start in starts if drawn.start < start < drawn.stop]
        for at, start in enumerate(inside):
            axes.axvline(start, label=label if at == 0 else None, color="#555555", lw=0.8, ls=line)


def _tiles(axes: Axes, start_T: Floats, level_TR: Integers) -> None:
    """Draw all tiles of a shade as one shape, neighbours in a row joined: the page stays small."""
    tiles: dict[int, list[Path]] = {}
    for row, level_T in enumerate(level_TR.T.tolist()):
        for level, group in groupby(range(len(level_T)), key=level_T.__getitem__):
            stages = list(group)
            left, right = start_T[stages[0]], start_T[stages[-1] + 1]
            low, high = row - 0.46, row + 0.46
            corners = [(left, low), (right, low), (right, high), (left, high), (left, low)]
            tiles.setdefault(level, []).append(Path(corners, closed=True))
    for level, paths in sorted(tiles.items()):
        if level >= 0:
            shape = Path.make_compound_path(*paths)
            axes.add_patch(PathPatch(shape, facecolor=RATIOS[level][2], lw=0))


def _legend() -> list[Patch]:
    return [Patch(facecolor=colour, label=label) for _, label, colour in RATIOS]
