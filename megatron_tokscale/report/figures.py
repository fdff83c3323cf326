"""The figures of one run.

Shapes: K probe steps, G grid points, D datasets, C bins.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_tokscale.report.analysis import Analysis
from megatron_tokscale.report.largest import largest_datasets
from megatron_tokscale.report.scale import LABELS, TimeScale, time_of
from megatron_tokscale.report.style import (
    MEASURED,
    NULL,
    RECONSTRUCTIONS,
    SPECTRUM_FILL,
    dataset_colour,
    dataset_line,
)
from megatron_tokscale.report.svg import draw, time_axis


def loss_curve(analysis: Analysis) -> str:
    """Mean probe loss against time, overall and per dataset, and the training loss."""
    run, arrays = analysis.run, analysis.arrays
    time_K = time_of(arrays["x_K"])
    scale = TimeScale.from_times(time_K)
    training_K = np.array([record.training_loss for record in run.records])

    def paint(figure: Any) -> None:
        axes = figure.add_subplot()
        place_K = scale.place(time_K)
        axes.plot(place_K, training_K, ".", ms=3, color=NULL, label="training loss of the step")
        for d, name in largest_datasets(run.probe_set).items():
            _curve(axes, scale, time_K, arrays["mean_loss_DK"][d], dataset_colour(d), name, d)
        _curve(axes, scale, time_K, arrays["mean_loss_K"], MEASURED, "all probe tokens")
        time_axis(axes, scale, LABELS[analysis.time])
        axes.set_ylabel("mean loss (nats per token)")
        axes.legend()

    return draw("loss", "Mean probe loss against training time", 3.4, paint)


def _curve(
    axes: Any,
    scale: TimeScale,
    time_K: NDArray[np.float64],
    loss_K: NDArray[np.float64],
    colour: str,
    name: str,
    dataset: int = 0,
) -> None:
    """A line through the probes after step 0, and step 0 as a point at its own place."""
    later = time_K > 0
    line = dataset_line(dataset)
    axes.plot(time_K[later], loss_K[later], ls=line, marker=".", ms=3, color=colour, label=name)
    axes.plot(scale.place(time_K)[~later], loss_K[~later], "o", ms=4, color=colour)


def derivative(analysis: Analysis) -> str:
    """-dL/dx measured, its reconstructions, and the drop-weighted spectrum."""
    arrays = analysis.arrays
    time_G = time_of(arrays["x_G"])
    scale = TimeScale.from_times(time_G)

    def paint(figure: Any) -> None:
        axes = figure.add_subplot()
        weighted_G = arrays["drop_weighted_G"]
        axes.fill_between(
            time_G, weighted_G, color=SPECTRUM_FILL, lw=0, label="drop-weighted spectrum"
        )
        for bound_G in arrays["drop_weighted_interval_2G"]:
            axes.plot(time_G, bound_G, color=NULL, lw=0.6)
        band(axes, time_G, arrays["measured_interval_2G"], MEASURED)
        axes.plot(time_G, arrays["measured_G"], color=MEASURED, lw=2.4, label="measured")
        rebuilt(axes, time_G, arrays)
        time_axis(axes, scale, LABELS[analysis.time])
        axes.set_ylabel("−dL/dx (nats per unit of x)")
        figure.legend(loc="outside upper left", ncols=7)

    alt = "Measured derivative of the mean loss beside its reconstructions and the spectrum"
    return draw("derivative", alt, 3.6, paint)


def rebuilt(axes: Any, time_G: NDArray[np.float64], arrays: Mapping[str, NDArray[Any]]) -> None:
    """Draw the reconstructions of -dL/dx, NAME_G each, and the line at zero."""
    for name, (colour, line) in RECONSTRUCTIONS.items():
        axes.plot(time_G, arrays[f"{name}_G"], color=colour, ls=line, lw=1.5, label=name)
    axes.axhline(0, color="#999999", lw=0.7)


def misses(analysis: Analysis) -> str:
    """Fall of each reconstruction minus the measured one, by part of the probed range."""
    falls = analysis.reconstruction["falls"]
    edges = time_of(np.array(falls["edges"]))

    def paint(figure: Any) -> None:
        axes = figure.add_subplot()
        for name, (colour, line) in RECONSTRUCTIONS.items():
            miss = np.subtract(falls[name], falls["measured"])
            axes.stairs(miss, edges, baseline=None, color=colour, ls=line, lw=1.6, label=name)
        axes.axhline(0, color="#999999", lw=0.8)
        time_axis(axes, TimeScale.from_times(edges), LABELS[analysis.time])
        axes.set_ylabel("rebuilt − measured (nats)")
        figure.legend(loc="outside upper left", ncols=3)

    alt = "Fall of each reconstruction minus the measured fall in eight parts of the probed range"
    return draw("misses", alt, 2.3, paint)


def derivative_by_dataset(analysis: Analysis) -> str:
    """The measured derivative and the drop-weighted spectrum, one panel per dataset."""
    arrays = analysis.arrays
    time_G = time_of(arrays["x_G"])
    scale = TimeScale.from_times(time_G)
    shown = largest_datasets(analysis.run.probe_set)

    def paint(figure: Any) -> None:
        columns = min(len(shown), 3)
        rows = math.ceil(len(shown) / columns)
        panels = figure.subplots(rows, columns, sharey=True, squeeze=False).ravel()
        for panel, (d, name) in zip(panels, shown.items(), strict=False):
            colour = dataset_colour(d)
            panel.fill_between(
                time_G, arrays["drop_weighted_DG"][d], color=colour, alpha=0.22, lw=0
            )
            band(panel, time_G, arrays["measured_interval_D2G"][d], colour)
            panel.plot(time_G, arrays["measured_DG"][d], color=colour, lw=2.4)
            panel.set_title(name)
            time_axis(panel, scale, LABELS[analysis.time])
        for panel in panels[len(shown) :]:
            panel.set_axis_off()
        figure.supylabel("nats per unit of x", fontsize=8.5)

    alt = "Measured derivative and drop-weighted spectrum of each dataset"
    return draw("datasets", alt, 2.5 * math.ceil(len(shown) / 3), paint)


def band(
    axes: Any, time_G: NDArray[np.float64], interval_2G: NDArray[np.float64], colour: str
) -> None:
    """The area between the ends of an interval."""
    axes.fill_between(time_G, *interval_2G, color=colour, alpha=0.25, lw=0)


def widths(analysis: Analysis) -> str:
    """Histograms of the 10-90% widths, observed and of mean-curve tokens, in decades of time."""
    arrays = analysis.arrays
    edges_C = arrays["width_edges_C"] / math.log(10)
    x_K = arrays["x_K"][np.isfinite(arrays["x_K"])]
    spacing, span = np.median(np.diff(x_K)) / math.log(10), np.ptp(x_K) / math.log(10)

    def paint(figure: Any) -> None:
        axes = figure.add_subplot()
        axes.stairs(
            100 * arrays["width_null_C"],
            edges_C,
            fill=True,
            color=NULL,
            alpha=0.45,
            label="mean-curve tokens (null)",
        )
        axes.stairs(
            100 * arrays["width_observed_C"], edges_C, color=MEASURED, lw=1.6, label="observed"
        )
        for place, name in ((spacing, "spacing of the probes"), (span, "probed range")):
            axes.axvline(place, color="#999999", lw=0.8, ls=(0, (2, 2)))
            axes.annotate(
                name,
                (place, 1),
                (3, -3),
                xycoords=("data", "axes fraction"),
                textcoords="offset points",
                rotation=90,
                va="top",
                fontsize=7.5,
                color="#555555",
            )
        axes.set_xscale("log")
        scale = TimeScale(float(edges_C[0]), float(edges_C[-1]), has_zero=False)
        ticks = scale.ticks()
        axes.set_xticks(list(ticks), list(ticks.values()))
        axes.set_xticks(scale.minor_ticks(), [], minor=True)
        axes.set_xlim(edges_C[0], edges_C[-1])
        axes.set_xlabel("10–90% width of the transition (decades of time)")
        axes.set_ylabel("share of the drop per bin (%)")
        axes.legend(loc="upper left")

    alt = "Histogram of transition widths, observed and of tokens that follow the mean curve"
    return draw("widths", alt, 3.0, paint)
