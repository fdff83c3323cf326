"""The section on the spectrum: the measured slope, its reconstructions, and their misses.

Shapes: K probe steps, G grid points, D datasets.
"""

import math
from itertools import pairwise
from typing import Final

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from megatron_tokscale.laws.estimates import Z_95
from megatron_tokscale.report.charts import (
    TimeScale,
    band,
    draw,
    largest_datasets,
    left_out,
    short,
    time_axis,
    time_label,
    time_of,
    time_unit,
)
from megatron_tokscale.report.html import (
    MEASURED,
    NULL,
    dataset,
    dataset_colour,
    escape,
    estimate,
    figure,
    number,
    paragraph,
    plural,
    swatch,
    table,
)
from megatron_tokscale.report.inputs import ReportInputs
from megatron_tokscale.report.sections import Section
from megatron_tokscale.results.estimate import Estimate, Undefined
from megatron_tokscale.results.evidence import RECONSTRUCTIONS, Evidence, FallsByPart
from megatron_tokscale.results.spectrum import DatasetCounts

_FILL: Final = "#dcdcdc"
_RECONSTRUCTIONS: Final = {
    "full": ("#7b3294", "-"),
    "kernel": ("#b8730a", "--"),
    "spectrum": ("#2a8c8c", ":"),
}
_INGREDIENTS: Final = {
    "full": "the model of each token's class",
    "kernel": "drops and learning times, with mean kernels",
    "spectrum": "learning times: equal drops, with mean kernels",
}
_UNSCORED: Final = "#f1efe6"


def spectrum_section(inputs: ReportInputs) -> list[Section]:
    """Return the section with the measured slope, its reconstructions and their agreement."""
    tokens, evidence, units = inputs.run.tokens, inputs.spectrum.evidence, inputs.units
    parts = [
        paragraph(_what_is_shown(inputs)),
        figure(
            _derivative_figure(inputs),
            "Black line: the measured slope. Grey area: the drop-weighted spectrum, smoothed by a "
            "Gaussian with a standard deviation of "
            f"{number(inputs.spectrum.summary.bandwidth_x)} in x. "
            f"Dark band and thin lines: their 95% intervals over {units}, without the noise that "
            "all tokens of a probe share. Light band: the 95% interval of the measured slope with "
            "that noise. Coloured lines: the reconstructions, smoothed as the measured slope is. "
            "Shaded: probes that are not scored, before and behind the scored "
            "range. Dotted line: behind it, drops and times of events are uncertain.",
        ),
        _tokens_table(inputs),
        figure(
            _unlearned_figure(inputs),
            f"Share of the drops that is not learned yet, with its 95% interval over {units} "
            "(Kaplan-Meier). A token that has not fallen by the end of the scored range counts "
            "with the mean drop of its group: its dataset and frequency decile.",
        ),
        _agreement(evidence),
        _twins(evidence),
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
        _falls(evidence.falls, time_unit(inputs.time)),
        figure(
            _datasets_figure(inputs),
            "One panel per dataset. Line and band: measured −dL/dx, with its 95% interval over "
            f"{units}. Filled area: drop-weighted spectrum."
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
        f"(x = ln of {escape(time_label(inputs.time))}), and how fast it falls according to the "
        f"tokens' learning times. Of the {number(summary.overall.n_tokens, ',')} fitted tokens, "
        f"{number(summary.overall.n_events, ',')} are learned by the end of the scored range, with "
        f"a total drop of {estimate(summary.overall.learned_nats)} nats per token. The mean loss "
        f"fell by {estimate(summary.fall)} nats.{share} The tokens count over "
        f"{escape(summary.scored.describe(inputs.time))}. R² counts over "
        f"{escape(inputs.spectrum.evidence.scored.describe(inputs.time))}."
    )


def _tokens_table(inputs: ReportInputs) -> str:
    """Return the table of what became of the tokens of each dataset."""
    summary = inputs.spectrum.summary
    rows = [_outcomes(escape(summary.overall.name), summary.overall)]
    if len(summary.datasets) > 1:
        rows += [_outcomes(dataset(d, each.name), each) for d, each in enumerate(summary.datasets)]
    header = ["tokens of", "tokens", "learned", "censored", "known", "forgotten"]
    header += [f"median ({time_unit(inputs.time)})", "nats learned", "nats expected"]
    return table(
        "Tokens by the end of the scored range: learned, not fallen half-way (censored), known "
        "before the first probe, or forgotten. Median: the time by which half of the learned and "
        "censored tokens are learned. Nats per token: drops of the learned tokens, and drops "
        "expected of the censored ones if they fall as their groups did.",
        header,
        rows,
    )


def _outcomes(title: str, each: DatasetCounts) -> list[str]:
    counts = (each.n_events, each.censored, each.known, each.forgotten)
    shares = [f"{number(100 * count / max(each.n_tokens, 1), '.1f')}%" for count in counts]
    median = "after the end"
    if isinstance(each.median_x, Estimate):
        ends = np.exp([each.median_x.value, each.median_x.low, each.median_x.high]).tolist()
        median = estimate(Estimate(*ends), ",.4g")
    nats = (estimate(each.learned_nats), estimate(each.expected_nats))
    return [title, number(each.n_tokens, ","), *shares, median, *nats]


def _agreement(evidence: Evidence) -> str:
    """Return the table of R² of the reconstructions, on the same tokens and other documents."""
    rows, units = [], evidence.fit.unit_kind
    for name, (colour, _) in _RECONSTRUCTIONS.items():
        same, other = evidence.same_tokens[name], evidence.other_documents[name]
        title = f"{swatch(colour, RECONSTRUCTIONS[name])}: {_INGREDIENTS[name]}"
        # An R² below 0 of a perfect model says that there is no signal; its size says nothing.
        ceiling = estimate(same.ceiling) if same.ceiling.value >= 0 else "below 0"
        r2 = (estimate(same.r2), estimate(other.r2))
        rows.append([title, *r2, ceiling, estimate(same.loss_error)])
    header = [
        "reconstruction",
        "R², same tokens",
        f"R², other {units}",
        "R² of a perfect model",
        "error of the loss, nats",
    ]
    return table(
        "Agreement of the reconstructions with the measured slope in the scored range, with 95% "
        f"intervals over {units}.",
        header,
        rows,
    )


def _twins(evidence: Evidence) -> str:
    """Return the table of each R² beside those of the planted twins."""
    twins = evidence.twins
    if all(isinstance(each.r2, Undefined) for each in evidence.same_tokens.values()):
        return ""  # no R² to compare: the slope cannot be measured
    if isinstance(twins, Undefined):
        return paragraph(f"Planted twins are undefined: {escape(twins.undefined)}.", "soft")
    rows = [
        [
            swatch(colour, RECONSTRUCTIONS[name]),
            estimate(twins.without_steps[name]),
            estimate(evidence.same_tokens[name].r2),
            estimate(twins.with_steps[name]),
        ]
        for name, (colour, _) in _RECONSTRUCTIONS.items()
    ]
    return table(
        f"R² of the run beside those of two planted twins of {plural(twins.tokens, 'token')}, "
        "which go through the same fit and the same estimators. Without steps, each token follows "
        "the mean curve of its group; with steps, it follows the model of its class. Where both "
        "twins have about the same R², R² does not tell them apart.",
        ["reconstruction", "twin without steps", "the run", "twin with steps"],
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
    words = {"measured": "measured"} | RECONSTRUCTIONS
    colours = {"measured": MEASURED} | {
        name: colour for name, (colour, _) in _RECONSTRUCTIONS.items()
    }
    return table(
        "Fall within each eighth of the probed range of x, in nats per token. The range ends where "
        "the smoothed slope ends.",
        [f"from, to ({unit})", *(swatch(colours[name], words[name]) for name in names)],
        parts,
    )


def _derivative_figure(inputs: ReportInputs) -> str:
    """Draw -dL/dx as measured, its reconstructions, and the drop-weighted spectrum."""
    arrays = inputs.spectrum.arrays
    time_G = time_of(arrays.x_G)
    scale = TimeScale.from_times(time_G)

    def paint(figure: Figure) -> None:
        axes = figure.add_subplot()
        _shade(axes, inputs)
        weighted_G = arrays.drop_weighted_G
        axes.fill_between(time_G, weighted_G, color=_FILL, lw=0, label="drop-weighted spectrum")
        for bound_G in arrays.drop_weighted_interval_2G:
            axes.plot(time_G, bound_G, color=NULL, lw=0.6)
        low_G, high_G = (arrays.measured_G + side * arrays.measured_se_G for side in (-Z_95, Z_95))
        axes.fill_between(time_G, low_G, high_G, color=MEASURED, alpha=0.1, lw=0)
        band(axes, time_G, arrays.measured_interval_2G, MEASURED)
        axes.plot(time_G, arrays.measured_G, color=MEASURED, lw=2.4, label="measured")
        for name, (colour, line) in _RECONSTRUCTIONS.items():
            rebuilt_G = arrays.reconstructions()[name]
            axes.plot(time_G, rebuilt_G, color=colour, ls=line, lw=1.5, label=RECONSTRUCTIONS[name])
        axes.axhline(0, color="#999999", lw=0.7)
        time_axis(axes, scale, time_label(inputs.time))
        axes.set_ylabel("−dL/dx (nats per unit of x)")
        figure.legend(loc="outside upper left", ncols=7)

    alt = "Measured slope of the mean loss beside its reconstructions and the spectrum"
    return draw("derivative", alt, 3.6, paint)


def _shade(axes: Axes, inputs: ReportInputs) -> None:
    """Shade the probes outside of the scored range, and mark the start of uncertain events."""
    summary, arrays = inputs.spectrum.summary, inputs.spectrum.arrays
    first, last = time_of(arrays.x_G[[0, -1]]).tolist()
    start, end, certain = time_of(
        np.array([summary.scored.from_x, summary.scored.to_x, summary.certain_to_x])
    ).tolist()
    for left, right in ((first, start), (end, last)):
        if right > left:
            axes.axvspan(left, right, color=_UNSCORED, lw=0, zorder=0)
    if certain < end:
        axes.axvline(certain, color="#999999", ls=":", lw=1.0)


def _unlearned_figure(inputs: ReportInputs) -> str:
    """Draw the share of the drops that is not learned yet."""
    arrays = inputs.spectrum.arrays
    time_G = time_of(arrays.x_G)

    def paint(figure: Figure) -> None:
        axes = figure.add_subplot()
        _shade(axes, inputs)
        band(axes, time_G, arrays.unlearned_interval_2G, MEASURED)
        axes.plot(time_G, arrays.unlearned_G, color=MEASURED, lw=1.8)
        axes.set_ylim(0, 1)
        time_axis(axes, TimeScale.from_times(time_G), time_label(inputs.time))
        axes.set_ylabel("share not learned")

    alt = "Share of the drops that is not learned yet, against time"
    return draw("unlearned", alt, 2.3, paint)


def _misses_figure(inputs: ReportInputs) -> str:
    """Draw the fall of each reconstruction minus the measured fall, by part of the range."""
    falls = inputs.spectrum.evidence.falls
    edges = time_of(np.array(falls.edges))

    def paint(figure: Figure) -> None:
        axes = figure.add_subplot()
        for name, (colour, line) in _RECONSTRUCTIONS.items():
            miss = np.subtract(falls.by_name[name], falls.measured)
            label = RECONSTRUCTIONS[name]
            axes.stairs(miss, edges, baseline=None, color=colour, ls=line, lw=1.6, label=label)
        axes.axhline(0, color="#999999", lw=0.8)
        time_axis(axes, TimeScale.from_times(edges), time_label(inputs.time))
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
            time_axis(panel, scale, time_label(inputs.time))
        for panel in panels[len(shown) :]:
            panel.set_axis_off()
        figure.supylabel("nats per unit of x", fontsize=8.5)

    alt = "Measured slope and drop-weighted spectrum of each dataset"
    return draw("datasets", alt, 2.5 * math.ceil(len(shown) / 3), paint)
