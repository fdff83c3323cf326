"""A plan over training as shades of grey: one line per stratum.

Shapes: Z strata, R lines, C columns.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from megatron_tokscale.core.arrays import Floats
from megatron_tokscale.data import Plan, dataset_names
from megatron_tokscale.reweight.table import aligned

WIDTH: Final = 100
MAX_LINES: Final = 40

_MAX_NAME: Final = 24
_POINTS: Final = 48
# The least weight, as a part of the base share, that each shade is for.
_SHADES: Final = ((0.0, " "), (0.4, "░"), (0.8, "▒"), (1.25, "▓"), (2.5, "█"))
_LEGEND: Final = (
    "weight over base share: '░' from 0.4, '▒' from 0.8, '▓' from 1.25, '█' from 2.5; log. time"
)


@dataclass(frozen=True, eq=False)
class PlanRows:
    """The lines of a picture: strata, or, where these are more than 40, datasets.

    Attributes:
        names: of the lines.
        row_Z: line of each stratum.
        base_R: share without the plan.
        size_R: samples in an epoch; None if the plan does not tell.
        is_by_dataset: whether the lines are datasets that have strata.
    """

    names: list[str]
    row_Z: NDArray[np.integer]
    base_R: Floats
    size_R: Floats | None
    is_by_dataset: bool

    @staticmethod
    def from_plan(plan: Plan) -> "PlanRows":
        """The lines of a plan."""
        is_by_dataset = plan.n_strata > max(MAX_LINES, len(plan.datasets))
        if is_by_dataset:
            names = dataset_names(plan.datasets)
            row_Z: NDArray[np.integer] = plan.dataset_Z
        else:
            names, row_Z = [stratum.name for stratum in plan.strata], np.arange(plan.n_strata)
        base_D = np.array(plan.replanning.base_weights or plan.segments[0].weights)
        base_Z = (base_D / base_D.sum())[plan.dataset_Z] * plan.share_Z
        sizes_D = plan.replanning.epoch_samples
        size_Z = plan.sizes_Z(sizes_D) if sizes_D else None
        return PlanRows(
            names,
            row_Z,
            np.bincount(row_Z, base_Z),
            None if size_Z is None else np.bincount(row_Z, size_Z),
            is_by_dataset,
        )

    def sums(self, value_Z: Floats) -> Floats:
        """Sums over the strata of each line."""
        return np.bincount(self.row_Z, value_Z, len(self.names))


def draw(plan: Plan, rows: PlanRows, end: int | None) -> list[str]:
    """One line per row: base share, shades over training, samples and epochs by the end.

    Stages decided while a job trained are marked below with stars.

    Args:
        end: samples of the training; None if unknown, then the picture ends behind the last stage.
    """
    bases = zip(rows.names, rows.base_R, strict=True)
    left = aligned([["", "base"], *([short(name), f"{100 * base:.2f}%"] for name, base in bases)])
    right = aligned(_totals(plan, rows, end))
    n_points = min(_POINTS, WIDTH - len(left[0]) - len(right[0]) - len("  ||  "))
    first, last = _range(plan, end)
    edges = np.geomspace(first, last, n_points + 1)
    shade_CR = _shades(plan, rows, np.sqrt(edges[1:] * edges[:-1]))
    pictures = [" weight".ljust(n_points + 2)]
    pictures += [f"|{''.join(shade_R)}|" for shade_R in zip(*shade_CR, strict=True)]
    lines = ["  ".join(cells).rstrip() for cells in zip(left, pictures, right, strict=True)]
    indent = " " * (len(left[0]) + 3)
    if live := live_starts(plan):
        at = np.searchsorted(edges, [start for start in live if first <= start < last], "right") - 1
        lines.append(indent + "".join("*" if c in at else " " for c in range(n_points)).rstrip())
    start = f"{first:,}"
    lines.append(indent + start + f"{last:,} samples".rjust(n_points - len(start)))
    return [*lines, _LEGEND]


def live_starts(plan: Plan) -> set[int]:
    """Where the stages begin that were decided while a job trained."""
    return {decision.start for decision in plan.decisions}


def short(name: str) -> str:
    """A name that is too long without its beginning, which tells strata least apart."""
    return name if len(name) <= _MAX_NAME else "…" + name[1 - _MAX_NAME :]


def _totals(plan: Plan, rows: PlanRows, end: int | None) -> list[list[str]]:
    """Header and rows of what is drawn by the end."""
    if end is None:
        return [[""] for _ in range(len(rows.names) + 1)]
    draws_R = rows.sums(plan.target_Z(end))
    if rows.size_R is None:
        return [["", "samples"], *(["", f"{draws:,.0f}"] for draws in draws_R)]
    epochs_R = draws_R / np.maximum(rows.size_R, 1)
    totals = zip(draws_R, epochs_R, strict=True)
    return [["", "samples", "epochs"], *(["", f"{n:,.0f}", f"{e:.2f}"] for n, e in totals)]


def _range(plan: Plan, end: int | None) -> tuple[int, int]:
    """From a little before the first change to the end."""
    starts = [segment.start for segment in plan.segments[1:]]
    last = end if end is not None else 2 * max([*starts, 50])
    first = min([*starts, last / 25]) / 2
    return max(int(first), 1), max(last, 2)


def _shades(plan: Plan, rows: PlanRows, samples_C: Floats) -> list[list[str]]:
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
