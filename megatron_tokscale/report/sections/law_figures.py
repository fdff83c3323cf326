"""The figures of the laws: the loss above its floor, and how far tokens' changes cancel.

Shapes: K probe steps, P pairs of probes.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from megatron_tokscale.core.arrays import Floats
from megatron_tokscale.report.analysis import Analysis
from megatron_tokscale.report.largest import largest_datasets
from megatron_tokscale.report.scale import LABELS, TimeScale, time_of
from megatron_tokscale.report.style import MEASURED, NULL, dataset_colour, dataset_line
from megatron_tokscale.report.svg import draw, time_axis


def above_floor(analysis: Analysis, laws: Mapping[str, Any]) -> str:
    """L - E of every law against time, log-log; nothing if no law is defined."""
    arrays = analysis.arrays
    law_D = laws["datasets"]
    curves = [
        (name, law_D[d], arrays["mean_loss_DK"][d], dataset_colour(d), dataset_line(d))
        for d, name in largest_datasets(analysis.run.probe_set).items()
        if "undefined" not in law_D[d]
    ]
    if "undefined" not in laws["overall"]:
        overall = laws["overall"], arrays["mean_loss_K"], MEASURED, "-"
        curves.append(("all probe tokens", *overall))
    if not curves:
        return ""
    time_K = time_of(arrays["x_K"])
    later = time_K > 0

    def paint(figure: Any) -> None:
        axes = figure.add_subplot()
        axes.set_yscale("log")
        for name, law, loss_K, colour, line in curves:
            _law(axes, law, time_K[later], loss_K[later], colour)
            ends = np.geomspace(law["from_time"], law["to_time"], 2)
            height = law["scale"] * ends ** -law["exponent"]
            axes.plot(ends, height, color=colour, ls=line, label=name)
        time_axis(axes, TimeScale.from_times(time_K[later]), LABELS[analysis.time])
        axes.set_ylabel("mean loss − E (nats)")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(_two_or_five)
        axes.legend()

    return draw(
        "law", "Mean loss less its fitted floor against time, with its power law", 3.4, paint
    )


def _two_or_five(value: float, _: int) -> str:
    """A label for the minor ticks at 2 and 5 times a power of ten."""
    digit = round(value / 10 ** np.floor(np.log10(value)))
    return f"{value:g}" if digit in (2, 5) else ""


def _law(axes: Any, law: Mapping[str, Any], time_K: Floats, loss_K: Floats, colour: str) -> None:
    """The probes, filled where they were fitted."""
    above_K = np.where(loss_K > law["floor"], loss_K - law["floor"], np.nan)
    fitted = (time_K >= law["from_time"] * 0.999) & (time_K <= law["to_time"] * 1.001)
    style = {"ls": "", "marker": "o", "ms": 3, "mec": colour, "mew": 0.7}
    axes.plot(time_K[~fitted], above_K[~fitted], mfc="white", **style)
    axes.plot(time_K[fitted], above_K[fitted], mfc=colour, **style)


def cancelling(from_step_P: Floats, values: Mapping[str, Floats]) -> str:
    """Movement and fall of the mean, and the share that cancels, from each step to its double."""
    scale = TimeScale.from_times(from_step_P)

    def paint(figure: Any) -> None:
        left, right = figure.subplots(1, 2)
        left.plot(from_step_P, values["movement"], color=MEASURED, label="movement M")
        left.plot(
            from_step_P, -values["change"], color=NULL, ls="--", label="fall of the mean loss"
        )
        left.axhline(0, color="#999999", lw=0.7)
        left.set_ylabel("nats per token")
        left.legend()
        right.plot(from_step_P, 100 * values["interference"], color=MEASURED)
        right.set_ylim(0, 100)
        right.set_ylabel("cancelled D (%)")
        for axes in (left, right):
            time_axis(axes, scale, "from step t to 2t: t")

    alt = "How far tokens' losses move while the step doubles, and what share of that cancels"
    return draw("zero-sum", alt, 2.6, paint)
