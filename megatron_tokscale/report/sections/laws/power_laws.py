"""The power laws of the mean losses, and the tail of the spectrum beside them.

Shapes: K probe steps, D datasets.
"""

import math
from typing import Final

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from megatron_tokscale.core.arrays import Floats
from megatron_tokscale.laws.explain import SPECTRUM
from megatron_tokscale.report.charts import (
    TimeScale,
    dataset_line,
    draw,
    largest_datasets,
    short,
    time_axis,
    time_label,
    time_of,
    time_unit,
)
from megatron_tokscale.report.html import (
    MEASURED,
    dataset,
    dataset_colour,
    escape,
    estimate,
    number,
    paragraph,
    table,
)
from megatron_tokscale.report.inputs import ReportInputs
from megatron_tokscale.report.verdicts import VerdictRow, outcome
from megatron_tokscale.results.estimate import Undefined
from megatron_tokscale.results.laws import LawsResult, LossPowerLaw, PowerLaw
from megatron_tokscale.results.verdict import Verdict

_HEADER: Final = [
    "mean loss of",
    "E (nats)",
    "E, over {}",
    "α",
    "α, over {}",
    "R²",
    "probes",
    "doubts",
]
_TAIL_CLAIM: Final = "The tail of the learning-time spectrum has the exponent of the loss"


def law_table(laws: LawsResult) -> str:
    """Return the table of the fitted laws: all tokens, each dataset, other starts of the fit."""
    unit, units = time_unit(laws.time), laws.fit.unit_kind
    rows = [
        _law_row("all probe tokens", laws.overall),
        *(_law_row(dataset(d, each.name), each.power_law) for d, each in enumerate(laws.datasets)),
        *(
            _law_row(f"all, from {short(each.start)} {unit}", each.power_law)
            for each in laws.other_starts
        ),
    ]
    return table(
        f"L = E + B t<sup>−α</sup> with t in {unit}, fitted from {short(laws.settings.start)} "
        f"{unit} on. The 95% intervals of E and α are over the scatter of the probes about the "
        f"law, with its serial correlation. In the columns “over {units}”, value and 95% interval "
        "are from a bootstrap, corrected for its bias.",
        [title.format(units) for title in _HEADER],
        rows,
        "dense",
    )


def _law_row(name: str, found: LossPowerLaw | Undefined) -> list[str]:
    if isinstance(found, Undefined):
        return [name, *["–"] * (len(_HEADER) - 2), escape(found.undefined)]
    law = found.law
    return [
        name,
        estimate(law.floor),
        estimate(found.floor_documents),
        estimate(law.exponent),
        estimate(found.exponent_documents),
        number(law.r2),
        number(law.n_points, ","),
        doubt(law),
    ]


def doubt(law: PowerLaw) -> str:
    """Return the reasons to doubt a fitted law; an empty text if there are none."""
    doubts = [] if law.converged else ["not converged"]
    if law.drifts:
        doubts.append(f"residuals drift (ρ {number(law.autocorrelation, '.2f')}): no power law")
    return "; ".join(doubts)


def loss_figure(inputs: ReportInputs, laws: LawsResult) -> str:
    """Draw L - E of every law against time, log-log; nothing if no law is defined."""
    arrays = inputs.spectrum.arrays
    shown = [
        (name, laws.datasets[d].power_law, arrays.mean_loss_DK[d], dataset_colour(d), d)
        for d, name in largest_datasets(inputs.run.tokens).items()
    ]
    shown.append(("all probe tokens", laws.overall, arrays.mean_loss_K, MEASURED, 0))
    curves = [
        (name, found.law, loss_K, colour, dataset_line(d))
        for name, found, loss_K, colour, d in shown
        if not isinstance(found, Undefined)
    ]
    if not curves:
        return ""
    time_K = time_of(arrays.x_K)
    later = time_K > 0

    def paint(figure: Figure) -> None:
        axes = figure.add_subplot()
        axes.set_yscale("log")
        for name, law, loss_K, colour, line in curves:
            _law_probes(axes, law, time_K[later], loss_K[later], colour)
            ends = np.geomspace(law.from_time, law.to_time, 2)
            height = law.scale.value * ends**-law.exponent.value
            axes.plot(ends, height, color=colour, ls=line, label=name)
        time_axis(axes, TimeScale.from_times(time_K[later]), time_label(inputs.time))
        axes.set_ylabel("mean loss − E (nats)")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(_two_or_five)
        axes.legend()

    alt = "Mean loss minus its fitted floor against time, with its power law"
    return draw("law", alt, 3.4, paint)


def _two_or_five(value: float, _: float) -> str:
    """Label the minor ticks at 2 and 5 times a power of ten."""
    digit = round(value / 10 ** np.floor(np.log10(value)))
    return f"{value:g}" if digit in (2, 5) else ""


def _law_probes(axes: Axes, law: PowerLaw, time_K: Floats, loss_K: Floats, colour: str) -> None:
    """Draw the probes, filled where the law was fitted to them."""
    floor = law.floor.value
    above_K = np.where(loss_K > floor, loss_K - floor, np.nan)
    fitted = (time_K >= law.from_time * 0.999) & (time_K <= law.to_time * 1.001)
    for chosen, face in ((~fitted, "white"), (fitted, colour)):
        axes.plot(time_K[chosen], above_K[chosen], "o", ms=3, mec=colour, mew=0.7, mfc=face)


def tail(laws: LawsResult) -> str:
    """Return a sentence on the exponent of the spectrum's tail, beside the exponent of the loss."""
    tail, difference = laws.tail, laws.tail_minus_law
    if isinstance(tail, Undefined):
        return undecided("Tail of the spectrum", tail, "verdict")
    first, last = (short(math.exp(x)) for x in (tail.from_x, tail.to_x))
    measured = (
        f"The drop-weighted spectrum falls with exponent {estimate(tail.exponent)} from {first}"
        f" to {last} {time_unit(laws.time)}; {number(tail.share, '.1%')} of its drop lies in "
        "this range."
    )
    if isinstance(difference, Undefined):
        reason = escape(difference.undefined)
        return paragraph(
            f"{_TAIL_CLAIM}: {outcome(Verdict.UNDECIDED)}: {reason}. {measured}", "verdict"
        )
    against = doubt(difference.law.law)
    warning = f" The law of the loss is in doubt: {against}." if against else ""
    return paragraph(
        f"{_TAIL_CLAIM}: {outcome(tail_outcome(laws))}. {measured} The exponent "
        "of the tail minus the exponent of the loss from there on is "
        f"{estimate(difference.difference, '+,.3f')}.{warning}",
        "verdict",
    )


def tail_outcome(laws: LawsResult) -> Verdict:
    """Return the verdict on the tail, as corrected in the table of explanations."""
    for row in laws.explanations:
        if row.explanation == SPECTRUM:
            return row.verdict
    return Verdict.UNDECIDED


def tail_verdict(laws: LawsResult) -> VerdictRow:
    """Return the verdict: does the tail have the exponent of the loss?"""
    difference = laws.tail_minus_law
    if isinstance(difference, Undefined):
        return VerdictRow("laws", _TAIL_CLAIM, Verdict.UNDECIDED, "–", escape(difference.undefined))
    return VerdictRow(
        "laws",
        _TAIL_CLAIM,
        tail_outcome(laws),
        estimate(difference.difference, "+,.3f"),
        f"exponent of the tail minus exponent of the loss; holds {difference.test.claim.rule}, "
        f"with the whole interval, which is over {laws.fit.unit_kind} and the scatter of the "
        "probes",
    )


def undecided(claim: str, reason: Undefined, kind: str = "", more: str = "") -> str:
    """Return a paragraph of the class `kind`: a claim is undecided, the reason, and `more`."""
    text = f"{claim}: {outcome(Verdict.UNDECIDED)}: {escape(reason.undefined)}.{more}"
    return paragraph(text, kind)
