"""A plan for a terminal, at most 100 characters wide: table of weights, picture over training.

Shapes: Z strata, R lines, C columns of the picture.
"""

from dataclasses import dataclass
from typing import Final, Self

import numpy as np
from numpy.typing import NDArray

from megatron_tokscale.core.arrays import Floats
from megatron_tokscale.core.words import aligned
from megatron_tokscale.data import Plan, dataset_names
from megatron_tokscale.reweight.gain import base_weights
from megatron_tokscale.reweight.gain_text import describe_gain

WIDTH: Final = 100  # characters of a line
MAX_LINES: Final = 40  # most lines for strata; with more, a line is a dataset

_TABLE_STAGES: Final = 7  # stages in the table of weights: more do not fit the width
_MAX_NAME: Final = 24  # characters of a name
_POINTS: Final = 48  # characters of the picture, where the numbers beside it leave room
_SHADES: Final = ((0.0, " "), (0.4, "░"), (0.8, "▒"), (1.25, "▓"), (2.5, "█"))
"""The least weight, as a fraction of the base share, of each shade: about a factor of 2 apart, and
1 amid the middle shade."""
_LEGEND: Final = (
    "weight over base share: '░' from 0.4, '▒' from 0.8, '▓' from 1.25, '█' from 2.5; log. time"
)


def describe_plan(plan: Plan, train_samples: int | None = None) -> str:
    """Return weights in percent at up to seven stages, a picture of all stages, and the gain.

    Args:
        plan: the plan.
        train_samples: length of the training; by default that of the plan. Without
            either the text has no numbers of samples and epochs.
    """
    end = train_samples or plan.replanning.train_samples
    rows = _PlanLines.from_plan(plan)
    lines = _title(plan, end)
    if rows.is_by_dataset:
        lines.append("more strata than fit: a line is a dataset")
    lines += ["", *_table(plan, rows), "", *_picture(plan, rows, end)]
    if gain := describe_gain(plan):
        lines += ["", *gain]
    return "\n".join(lines) + "\n"


@dataclass(frozen=True, eq=False)
class _PlanLines:
    """The lines of table and picture: strata, or, where these are more than 40, datasets.

    Attributes:
        names: names of the lines.
        line_Z: line of each stratum.
        base_R: share without the plan.
        size_R: samples in an epoch; None if the plan does not hold them.
        is_by_dataset: whether the lines are datasets that have strata.
    """

    names: list[str]
    line_Z: NDArray[np.integer]
    base_R: Floats
    size_R: Floats | None
    is_by_dataset: bool

    @classmethod
    def from_plan(cls, plan: Plan) -> Self:
        """Return the lines of a plan."""
        is_by_dataset = plan.n_strata > max(MAX_LINES, len(plan.datasets))
        if is_by_dataset:
            names = dataset_names(plan.datasets)
            line_Z: NDArray[np.integer] = plan.dataset_Z
        else:
            names, line_Z = [stratum.name for stratum in plan.strata], np.arange(plan.n_strata)
        sizes_D = plan.replanning.epoch_samples
        known = plan.replanning.stratum_samples or (plan.sizes_Z(sizes_D) if sizes_D else None)
        size_Z = None if known is None else np.array(known)
        return cls(
            names,
            line_Z,
            np.bincount(line_Z, base_weights(plan)),
            None if size_Z is None else np.bincount(line_Z, size_Z),
            is_by_dataset,
        )

    def sums(self, value_Z: Floats) -> Floats:
        """Return the sums over the strata of each line."""
        return np.bincount(self.line_Z, value_Z, len(self.names))


def _title(plan: Plan, end: int | None) -> list[str]:
    made = plan.provenance
    policy = f"policy {made.policy}"
    policy += f", control {made.control}" if made.control else ""
    length = f"samples of {plan.seq_length:,} tokens"
    length = length if end is None else f"{end:,} {length}"
    count = len(plan.segments)
    stages = f"{count} stage{'s' if count > 1 else ''}"
    lines = [
        f"plan {plan.fingerprint}: {policy}; {length}",
        f"{plan.n_strata} strata of {len(plan.datasets)} datasets, {stages}",
    ]
    if live := _live_starts(plan):
        lines[-1] += f", {len(live)} decided while the job trained (*)"
    if plan.accepted:
        at = ", ".join(f"{acceptance.at:,}" for acceptance in plan.accepted)
        lines.append(f"accepted by a job in place of another plan at sample {at}")
    for start in sorted({skip.start for skip in plan.skips}):
        skips = [skip for skip in plan.skips if skip.start == start]
        count = sum(len(skip.samples) for skip in skips)
        lines.append(f"samples left out from sample {start:,} on: {count:,}")
    return lines


def _table(plan: Plan, rows: _PlanLines) -> list[str]:
    """Return the table of weights, with as many stages as fit the width."""
    live = _live_starts(plan)
    names = [shortened(name) for name in rows.names]
    for n_columns in range(min(len(plan.segments), _TABLE_STAGES), 0, -1):
        chosen = np.linspace(0, len(plan.segments) - 1, n_columns).round().astype(int)
        stages = [plan.segments[i] for i in sorted({*chosen.tolist()})]
        starts = [f"{stage.start:,}{'*' if stage.start in live else ''}" for stage in stages]
        weights = [rows.sums(plan.weight_Z(stage)) for stage in stages]
        table = [["from sample", *starts]]
        for row, name in enumerate(names):
            table.append([name, *(f"{100 * weight[row]:.2f}%" for weight in weights)])
        lines = aligned(table)
        if len(lines[0]) <= WIDTH:
            return lines
    return lines


def _picture(plan: Plan, rows: _PlanLines, end: int | None) -> list[str]:
    """Return one line per row: base share, shades over training, samples and epochs by the end.

    Stages decided while a job trained are marked below with stars.

    Args:
        plan: the plan.
        rows: its lines.
        end: samples of the training; if None, the picture ends behind the last stage.
    """
    # The numbers on either side of the picture.
    bases = zip(rows.names, rows.base_R, strict=True)
    left = aligned([["", "base"], *([shortened(name), f"{100 * b:.2f}%"] for name, b in bases)])
    right = aligned(_totals(plan, rows, end))

    # The picture between them.
    n_points = min(_POINTS, WIDTH - len(left[0]) - len(right[0]) - len("  ||  "))
    first, last = _range(plan, end)
    edges = np.geomspace(first, last, n_points + 1)
    shade_CR = _shades(plan, rows, np.sqrt(edges[1:] * edges[:-1]))
    pictures = [" weight".ljust(n_points + 2)]
    pictures += [f"|{''.join(shade_R)}|" for shade_R in zip(*shade_CR, strict=True)]
    lines = ["  ".join(cells).rstrip() for cells in zip(left, pictures, right, strict=True)]

    # The marks and the axis below it.
    indent = " " * (len(left[0]) + 3)
    if live := _live_starts(plan):
        at = np.searchsorted(edges, [start for start in live if first <= start < last], "right") - 1
        lines.append(indent + "".join("*" if c in at else " " for c in range(n_points)).rstrip())
    start = f"{first:,}"
    lines.append(indent + start + f"{last:,} samples".rjust(n_points - len(start)))
    return [*lines, _LEGEND]


def _live_starts(plan: Plan) -> set[int]:
    """Return the starts of the stages that were decided while a job trained."""
    return {decision.start for decision in plan.decisions}


def _totals(plan: Plan, rows: _PlanLines, end: int | None) -> list[list[str]]:
    """Return header and rows of the samples and epochs drawn by the end."""
    if end is None:
        return [[""] for _ in range(len(rows.names) + 1)]
    draws_R = rows.sums(plan.target_Z(end))
    if rows.size_R is None:
        return [["", "samples"], *(["", f"{draws:,.0f}"] for draws in draws_R)]
    epochs_R = draws_R / np.maximum(rows.size_R, 1)
    totals = zip(draws_R, epochs_R, strict=True)
    return [["", "samples", "epochs"], *(["", f"{n:,.0f}", f"{e:.2f}"] for n, e in totals)]


def _range(plan: Plan, end: int | None) -> tuple[int, int]:
    """Return first and last sample of the picture: from a little before the first change."""
    starts = [segment.start for segment in plan.segments[1:]]
    last = end if end is not None else 2 * max([*starts, 50])
    first = min([*starts, last / 25]) / 2
    return max(int(first), 1), max(last, 2)


def _shades(plan: Plan, rows: _PlanLines, samples_C: Floats) -> list[list[str]]:
    """Return the shade of each line, for each column's number of consumed samples."""
    starts = [segment.start for segment in plan.segments]
    segment_C = np.searchsorted(starts, samples_C, side="right") - 1
    shades = []
    for segment in segment_C:
        weight_R = rows.sums(plan.weight_Z(plan.segments[segment]))
        ratio_R = weight_R / np.maximum(rows.base_R, np.finfo(np.float64).tiny)
        shades.append([_shade(ratio) for ratio in ratio_R])
    return shades


def _shade(ratio: float) -> str:
    return [shade for least, shade in _SHADES if ratio >= least][-1]


def shortened(name: str) -> str:
    """Return a long name cut at its start, since its end distinguishes strata."""
    return name if len(name) <= _MAX_NAME else "…" + name[1 - _MAX_NAME :]
