"""The figures of two runs side by side.

Shapes: K probe steps, F groups of tokens.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_tokscale.report.scale import LABELS, TimeScale
from megatron_tokscale.report.sections.beside.speedup import Curves
from megatron_tokscale.report.style import MEASURED, NULL, dataset_colour
from megatron_tokscale.report.svg import draw, time_axis

_BASELINE = (0, (3, 1.5))


def losses(shown: dict[int, str], curves: tuple[Curves, Curves]) -> str:
    """Mean loss of both runs against steps and against consumed tokens."""

    def paint(figure: Any) -> None:
        left, right = figure.subplots(1, 2, sharey=True)
        for axes, time in ((left, "step"), (right, "tokens")):
            times = [_time(each, time) for each in curves]
            positive = np.concatenate([time_K[time_K > 0] for time_K in times])
            if not len(positive):
                axes.set_axis_off()  # neither run knows its consumed tokens
                continue
            scale = TimeScale.from_times(positive)
            for f, colour in _groups(shown):
                for each, time_K, line in zip(curves, times, (_BASELINE, "-"), strict=True):
                    later = time_K > 0
                    axes.plot(time_K[later], each.loss_FK[f, later], ls=line, color=colour, lw=1.2)
            time_axis(axes, scale, LABELS[time])
        left.set_ylabel("mean probe loss (nats per token)")
        for line, name in ((_BASELINE, "baseline"), ("-", "under the plan")):
            left.plot([], [], ls=line, color=NULL, label=name)
        for f, colour in _groups(shown):
            left.plot([], [], color=colour, label=shown.get(f - 1, "all probe tokens"))
        left.legend()

    return draw("both", "Mean probe loss of both runs against steps and tokens", 3.6, paint)


def differences(shown: dict[int, str], curves: tuple[Curves, Curves]) -> str | None:
    """Loss under the plan minus that of the baseline at the steps that both have."""
    baseline, planned = curves
    step_K, first, second = np.intersect1d(
        baseline.step_K, planned.step_K, assume_unique=True, return_indices=True
    )
    if not (step_K > 0).any():
        return None

    def paint(figure: Any) -> None:
        axes = figure.add_subplot()
        scale = TimeScale.from_times(step_K.astype(np.float64))
        for f, colour in _groups(shown):
            gap_K = planned.loss_FK[f, second] - baseline.loss_FK[f, first]
            axes.plot(scale.place(step_K.astype(np.float64)), gap_K, color=colour, marker=".", ms=3)
        axes.axhline(0, color="#999999", lw=0.8)
        time_axis(axes, scale, LABELS["step"])
        axes.set_ylabel("planned − baseline (nats)")

    return draw("gap", "Loss under the plan minus loss of the baseline", 2.4, paint)


def _time(curves: Curves, time: str) -> NDArray[np.float64]:
    return (curves.step_K if time == "step" else curves.tokens_K).astype(np.float64)


def _groups(shown: dict[int, str]) -> list[tuple[int, str]]:
    """Index and colour of every group of tokens: the datasets, and last all of them."""
    return [*((d + 1, dataset_colour(d)) for d in shown), (0, MEASURED)]
