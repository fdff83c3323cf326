"""The section on the spectrum: the measured slope, its reconstructions, and their misses.

Shapes: K probe steps, G grid points, D datasets.
"""

import math
from itertools import pairwise
from typing import Final

import numpy as np
from matplotlib.figure import Figure

from megatron_tokscale.report.charts import (
    LABELS,
    UNITS,
    TimeScale,
    band,
    draw,
    largest_datasets,
    left_out,
    short,
    time_axis,
    time_of,
)
from megatron_tokscale.report.html import (
    MEASURED,
    NULL,
    dataset_colour,
    escape,
    estimate,
    figure,
    number,
    paragraph,
    swatch,
    table,
)
from megatron_tokscale.report.inputs import ReportInputs
from megatron_tokscale.report.sections import Section
from megatron_tokscale.results.evidence import Evidence, FallsByPart

_FILL: Final = "#dcdcdc"
_RECONSTRUCTIONS: Final = {
    "full": ("#7b3294", "-"),
    "kernel": ("#b8730a", "--"),
    "spectrum": ("#2a8c8c", ":"),
}
_INGREDIENTS: Final = {
    "full": "every token's own model",
    "kernel": "drops and learning times, one common width",
    "spectrum": "learning times alone: equal drops, one width",
}


def spectrum_section(inputs: ReportInputs) -> list[Section]:
    """Return the section with the measured slope, its reconstructions and their agreement."""
    tokens, evidence = inputs.run.tokens, inputs.spectrum.evidence
    parts = [
        paragraph(_what_is_shown(inputs)),
        figure(
            _derivative_figure(inputs),
            "Black line: the measured slope. Grey area: the drop-weighted spectrum, smoothed by a "
            "Gaussian with a standard deviation of "
            f"{number(inputs.spectrum.summary.bandwidth_x)} in x. "
            "Dark band and thin lines: their 95% intervals over documents, without the noise that "
            "all tokens of a probe share. Coloured lines: the reconstructions, smoothed as the "
            "measured slope is.",
        ),
        _agreement(evidence),
        paragraph(
            "On the tokens that were fitted, agreement is nearly algebra: a sum of good fits is "
            "a good fit of the sum. " + escape(evidence.other_documents_note),
            "soft",
        ),
        figure(
            _misses_figure(inputs),
            "Fall of each reconstruction minus the measured fall, in each part of the probed "
            "range. Above zero, a reconstruction has more learning than was measured.",
        ),
        _falls(evidence.falls, UNITS[inputs.time]),
        figure(
            _datasets_figure(inputs),
            "One panel per dataset. Line and band: measured −dL/dx, with its 95% interval over "
            "documents. Filled area: drop-weighted spectrum."
            + left_out(largest_datasets(tokens), tokens),
        ),
    ]
    title = "The learning-time spectrum against −dL/dx"
    return [Section("spectrum", "Spectrum", title, parts)]


def _what_is_shown(inputs: ReportInputs) -> str:
    summary = inputs.spectrum.summary
    before = inputs.spectrum.evidence.fall_before_first_finite_probe
    share = ""
    if before is not None:
        share = (
            f" Of this fall, {estimate(before)} nats lie between step 0 and the first "
            "probe after it; no logarithmic axis can show this part."
        )
    return (
        "The figure shows how fast the mean loss falls, in nats per unit of x "
        f"(x = ln of {LABELS[inputs.time]}), and how fast it falls according to the tokens' "
        f"learning times. The {number(summary.n_tokens, ',')} fitted tokens have "
        f"{number(summary.n_events, ',')} falling transitions, with a total drop of "
        f"{estimate(summary.drop_of_events)} nats per token; rising "
        "transitions are not counted. The mean loss fell by "
        f"{estimate(summary.fall)} nats.{share}"
    )


def _agreement(evidence: Evidence) -> str:
    """Return the table of R² of the reconstructions, on the same tokens and other documents."""
    rows = []
    for name, (colour, _) in _RECONSTRUCTIONS.items():
        same, other = evidence.same_tokens[name], evidence.other_documents[name]
        title = f"{swatch(colour, name)}: {_INGREDIENTS[name]}"
        cells = (same.r2, other.r2, same.ceiling, same.loss_error)
        rows.append([title, *(estimate(cell) for cell in cells)])
    header = [
        "reconstruction",
        "R², same tokens",
        "R², other documents",
        "R² of a perfect model",
        "error of the loss, nats",
    ]
    return table(
        "Agreement of the reconstructions with the measured slope over the probed range, with 95% "
        "intervals over documents.",
        header,
        rows,
    )


def _falls(falls: FallsByPart, unit: str) -> str:
    """Return the table of the nats per part of the range, measured and by reconstruction."""
    times = [short(time) for time in time_of(np.array(falls.edges))]
    fall_by_name = {"measured": falls.measured, **falls.by_name}
    names = ["measured", *_RECONSTRUCTIONS]
    parts = [
        [f"{left} to {right}", *(number(fall_by_name[name][part]) for name in names)]
        for part, (left, right) in enumerate(pairwise(times))
    ]
    parts.append(["all of it", *(number(sum(fall_by_name[name])) for name in names)])
    colours = {"measured": MEASURED} | {
        name: colour for name, (colour, _) in _RECONSTRUCTIONS.items()
    }
    return table(
        "Fall within each eighth of the probed range of x, in nats per token. The range ends where "
        "the smoothed slope ends.",
        [f"from, to ({unit})", *(swatch(colours[name], name) for name in names)],
        parts,
    )


def _derivative_figure(inputs: ReportInputs) -> str:
    """Draw -dL/dx as measured, its reconstructions, and the drop-weighted spectrum."""
    arrays = inputs.spectrum.arrays
    time_G = time_of(arrays.x_G)
    scale = TimeScale.from_times(time_G)

    def paint(figure: Figure) -> None:
        axes = figure.add_subplot()
        weighted_G = arrays.drop_weighted_G
        axes.fill_between(time_G, weighted_G, color=_FILL, lw=0, label="drop-weighted spectrum")
        for bound_G in arrays.drop_weighted_interval_2G:
            axes.plot(time_G, bound_G, color=NULL, lw=0.6)
        band(axes, time_G, arrays.measured_interval_2G, MEASURED)
        axes.plot(time_G, arrays.measured_G, color=MEASURED, lw=2.4, label="measured")
        for name, (colour, line) in _RECONSTRUCTIONS.items():
            rebuilt_G = arrays.reconstructions()[name]
            axes.plot(time_G, rebuilt_G, color=colour, ls=line, lw=1.5, label=name)
        axes.axhline(0, color="#999999", lw=0.7)
        time_axis(axes, scale, LABELS[inputs.time])
        axes.set_ylabel("−dL/dx (nats per unit of x)")
        figure.legend(loc="outside upper left", ncols=7)

    alt = "Measured slope of the mean loss beside its reconstructions and the spectrum"
    return draw("derivative", alt, 3.6, paint)


def _misses_figure(inputs: ReportInputs) -> str:
    """Draw the fall of each reconstruction minus the measured fall, by part of the range."""
    falls = inputs.spectrum.evidence.falls
    edges = time_of(np.array(falls.edges))

    def paint(figure: Figure) -> None:
        axes = figure.add_subplot()
        for name, (colour, line) in _RECONSTRUCTIONS.items():
            miss = np.subtract(falls.by_name[name], falls.measured)
            axes.stairs(miss, edges, baseline=None, color=colour, ls=line, lw=1.6, label=name)
        axes.axhline(0, color="#999999", lw=0.8)
        time_axis(axes, TimeScale.from_times(edges), LABELS[inputs.time])
        axes.set_ylabel("rebuilt − measured (nats)")
        figure.legend(loc="outside upper left", ncols=3)

    alt = "Fall of each reconstruction minus the measured fall in eight parts of the probed range"
    return draw("misses", alt, 2.3, paint)


def _datasets_figure(inputs: ReportInputs) -> str:
    """Draw the measured slope and the drop-weighted spectrum, one panel per dataset."""
    arrays = inputs.spectrum.arrays
    time_G = time_of(arrays.x_G)
    scale = TimeScale.from_times(time_G)
    shown = largest_datasets(inputs.run.tokens)

    def paint(figure: Figure) -> None:
        columns = min(len(shown), 3)
        rows = math.ceil(len(shown) / columns)
        panels = figure.subplots(rows, columns, sharey=True, squeeze=False).ravel()
        for panel, (d, name) in zip(panels, shown.items(), strict=False):
            colour = dataset_colour(d)
            panel.fill_between(time_G, arrays.drop_weighted_DG[d], color=colour, alpha=0.22, lw=0)
            band(panel, time_G, arrays.measured_interval_D2G[d], colour)
            panel.plot(time_G, arrays.measured_DG[d], color=colour, lw=2.4)
            panel.set_title(name)
            time_axis(panel, scale, LABELS[inputs.time])
        for panel in panels[len(shown) :]:
            panel.set_axis_off()
        figure.supylabel("nats per unit of x", fontsize=8.5)

    alt = "Measured slope and drop-weighted spectrum of each dataset"
    return draw("datasets", alt, 2.5 * math.ceil(len(shown) / 3), paint)
