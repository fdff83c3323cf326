"""The section on the spectrum: the measured derivative, its reconstructions, and their misses."""

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import numpy as np

from megatron_tokscale.report import figures
from megatron_tokscale.report.analysis import Analysis
from megatron_tokscale.report.largest import largest_datasets, left_out
from megatron_tokscale.report.markup import (
    escape,
    estimate,
    figure,
    number,
    paragraph,
    section,
    swatch,
    table,
)
from megatron_tokscale.report.scale import LABELS, UNITS, short, time_of
from megatron_tokscale.report.style import MEASURED, RECONSTRUCTIONS

_INGREDIENTS = {
    "full": "every token's own model",
    "kernel": "drops and learning times, one common width",
    "spectrum": "learning times alone: equal drops, one width",
}


def spectrum(analysis: Analysis) -> str:
    """The measured derivative beside its reconstructions, and how well they agree."""
    tokens, result = analysis.run.probe_set, analysis.reconstruction
    return section(
        "spectrum",
        "The learning-time spectrum against −dL/dx",
        paragraph(_what_is_shown(analysis)),
        figure(
            figures.derivative(analysis),
            "Black: measured. Grey area: the drop-weighted spectrum, smoothed by a Gaussian of "
            f"{number(analysis.spectrum['bandwidth_x'])} in x. Dark band and thin lines: their "
            "95% intervals over documents; noise that all tokens of a probe share is not in them. "
            "The reconstructions are smoothed as the measured curve is.",
        ),
        agreement(result),
        paragraph(
            "On the tokens that were fitted, agreement is nearly algebra: the sum of good fits is "
            "a good fit of the sum. " + escape(result["other_documents"]["note"]),
            "soft",
        ),
        figure(
            figures.misses(analysis),
            "Where the reconstructions miss: their fall minus the measured one within each part of "
            "the probed range. Above zero they put learning where there was none.",
        ),
        _falls(result["falls"], UNITS[analysis.time]),
        figure(
            figures.derivative_by_dataset(analysis),
            "Each dataset by itself: measured −dL/dx (line; band: 95%, over documents) and "
            "drop-weighted spectrum (filled)." + left_out(largest_datasets(tokens), tokens),
        ),
    )


def _what_is_shown(analysis: Analysis) -> str:
    about, before = analysis.spectrum, analysis.reconstruction["fall_before_first_finite_probe"]
    share = ""
    if before is not None:
        share = (
            f" Of the fall, {estimate(before, 'nats')} nats per token lie between step 0 and the "
            "first probe after it, which is on no logarithmic axis."
        )
    return (
        "How fast the mean loss falls, in nats per unit of x "
        f"(x = ln of {LABELS[analysis.time]}), beside what the tokens' learning times say it "
        f"should be. The {number(about['n_tokens'], ',')} fitted tokens have "
        f"{number(about['n_events'], ',')} falling transitions, together a drop of "
        f"{estimate(about, 'drop_of_events_nats_per_token')} nats per token; rises are not in "
        f"it. The mean loss fell by {estimate(about, 'fall_nats_per_token')}.{share}"
    )


def agreement(result: Mapping[str, Any]) -> str:
    """Return the table of R² of the reconstructions, on the same tokens and other documents."""
    rows = []
    for name, (colour, _) in RECONSTRUCTIONS.items():
        cells = [
            estimate(result[documents][name], "r2")
            for documents in ("same_tokens", "other_documents")
        ]
        rows.append([f"{swatch(colour, name)}: {_INGREDIENTS[name]}", *cells])
    header = ["reconstruction", "R², same tokens", "R², other documents"]
    return table(
        "Agreement with the measured derivative over the probed range, and 95% intervals over "
        "documents.",
        header,
        rows,
    )


def _falls(falls: dict[str, list[float]], unit: str) -> str:
    """Nats per part of the range, measured and by reconstruction."""
    times = [short(time) for time in time_of(np.array(falls["edges"]))]
    names = ["measured", *RECONSTRUCTIONS]
    parts = [
        [f"{left} to {right}", *(number(falls[name][part]) for name in names)]
        for part, (left, right) in enumerate(pairwise(times))
    ]
    parts.append(["all of it", *(number(sum(falls[name])) for name in names)])
    colours = {"measured": MEASURED} | {
        name: colour for name, (colour, _) in RECONSTRUCTIONS.items()
    }
    return table(
        "Fall within each eighth of the probed range of x, in nats per token; the ends are those "
        "of the smoothed derivative.",
        [f"from, to ({unit})", *(swatch(colours[name], name) for name in names)],
        parts,
    )
