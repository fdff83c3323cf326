"""The section on laws: power laws of the loss, and what rival explanations predict of this run.

Shapes: K probe steps, D datasets, P pairs of probes, from a step to about its double.
"""

import math
from collections.abc import Mapping
from typing import Any, Final

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from megatron_tokscale.core.arrays import Floats
from megatron_tokscale.laws.laws_text import DRIFT
from megatron_tokscale.report.charts import (
    LABELS,
    UNITS,
    TimeScale,
    dataset_line,
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
    dataset,
    dataset_colour,
    escape,
    estimate,
    facts,
    figure,
    number,
    paragraph,
    table,
)
from megatron_tokscale.report.inputs import ReportInputs
from megatron_tokscale.report.sections import Section
from megatron_tokscale.report.verdicts import CLAIMED, Verdict, outcome

_HEADER: Final = [
    "mean loss of",
    "E (nats)",
    "E, over documents",
    "α",
    "α, over documents",
    "R²",
    "probes",
    "doubts",
]
_TAIL_CLAIM: Final = "The tail of the learning-time spectrum has the exponent of the loss"
_OWN: Final = "learning-time spectrum"  # its claims have verdicts in other sections
_METRICS: Final = ("movement", "change", "interference")
_PARAMETERS: Final = {
    "floor": "E (nats)",
    "A": "A",
    "alpha": "α, of the parameters",
    "B": "B",
    "beta": "β, of the tokens",
    "a": "a = β / (α + β): the best size grows as FLOPs<sup>a</sup>",
}


def laws_section(inputs: ReportInputs) -> list[Section]:
    """Return the section with explanations, power laws, zero-sum learning, and laws over runs."""
    result = inputs.laws
    if result is None:
        return []
    tokens = inputs.run.probe_set
    picture = _loss_above_floor(inputs, result)
    parts = [
        _explanations(result),
        "<h3>Power laws of the loss</h3>",
        _law_table(result),
        figure(
            picture,
            "Mean loss minus its own fitted E, on two logarithmic axes. Dots: the probes, hollow "
            "before the fit begins. Lines: the laws. A fitted E makes any curve straighter, so the "
            "figure does not show a power law; the table tells more, with the drift of the "
            "residuals and the laws from other starts of the fit."
            + left_out(largest_datasets(tokens), tokens),
        )
        if picture
        else "",
        _tail(result),
        "<h3>Zero-sum learning</h3>",
        *_zero_sum(result["zero_sum"]),
        *_laws_over_runs(result.get("several")),
    ]
    return [Section("laws", "Laws", "Laws and rival explanations", parts, _verdicts(result))]


def _verdicts(laws: Mapping[str, Any]) -> list[Verdict]:
    """Return the verdict on the tail, and those on the claims of rivals that were decided."""
    return [
        _tail_verdict(laws),
        *(
            Verdict(
                "laws",
                f"{escape(each['explanation'])}: {escape(each['claim'])}",
                each["holds"],
                _words(each["measured"]),
                f"predicted: {_words(each['predicted'])}",
                CLAIMED,
            )
            for each in laws["explanations"]
            if each["explanation"] != _OWN and each["holds"] is not None
        ),
    ]


def _explanations(result: Mapping[str, Any]) -> str:
    """Return the table of what each explanation predicts, and what was measured."""
    rows = [
        [
            *(_words(each[name]) for name in ("explanation", "claim", "predicted", "measured")),
            outcome(each["holds"], CLAIMED),
        ]
        for each in result["explanations"]
    ]
    return table(
        "Predictions of each explanation for this run. A claim holds if this run could refute it "
        "and does not. A claim is undecided if this run cannot refute it, or did not measure it.",
        ["explanation", "claim", "predicted", "measured [95%]", "verdict"],
        rows,
        "words",
    )


def _words(words: str) -> str:
    return "–" if words == "-" else escape(words)


def _law_table(laws: Mapping[str, Any]) -> str:
    """Return the table of the fitted laws: all tokens, each dataset, other starts of the fit."""
    unit = UNITS[laws["time"]]
    rows = [
        ("all probe tokens", laws["overall"]),
        *((dataset(d, each["name"]), each) for d, each in enumerate(laws["datasets"])),
        *((f"all, from {short(each['from'])} {unit}", each) for each in laws["other_starts"]),
    ]
    return table(
        f"L = E + B t<sup>−α</sup> with t in {unit}, fitted from {short(laws['settings']['from'])} "
        f"{unit} on. The 95% intervals of E and α are over the scatter of the probes about the "
        "law, with its serial correlation. In the columns “over documents”, value and 95% interval "
        "are from a bootstrap over documents, corrected for its bias.",
        _HEADER,
        [_law_row(name, law) for name, law in rows],
        "dense",
    )


def _law_row(name: str, law: Mapping[str, Any]) -> list[str]:
    if "undefined" in law:
        return [name, *["–"] * (len(_HEADER) - 2), escape(law["undefined"])]
    return [
        name,
        estimate(law, "floor"),
        estimate(law, "floor_documents"),
        estimate(law, "exponent"),
        estimate(law, "exponent_documents"),
        number(law["r2"]),
        number(law["n_points"], ","),
        doubt(law),
    ]


def doubt(law: Mapping[str, Any]) -> str:
    """Return the reasons to doubt a fitted law; nothing without any."""
    doubts = [] if law["converged"] else ["not converged"]
    if law["autocorrelation"] > DRIFT:
        doubts.append(f"residuals drift (ρ {number(law['autocorrelation'], '.2f')}): no power law")
    return "; ".join(doubts)


def _loss_above_floor(inputs: ReportInputs, laws: Mapping[str, Any]) -> str:
    """Draw L - E of every law against time, log-log; nothing if no law is defined."""
    arrays = inputs.arrays
    law_D = laws["datasets"]
    curves = [
        (name, law_D[d], arrays["mean_loss_DK"][d], dataset_colour(d), dataset_line(d))
        for d, name in largest_datasets(inputs.run.probe_set).items()
        if "undefined" not in law_D[d]
    ]
    if "undefined" not in laws["overall"]:
        overall = laws["overall"], arrays["mean_loss_K"], MEASURED, "-"
        curves.append(("all probe tokens", *overall))
    if not curves:
        return ""
    time_K = time_of(arrays["x_K"])
    later = time_K > 0

    def paint(figure: Figure) -> None:
        axes = figure.add_subplot()
        axes.set_yscale("log")
        for name, law, loss_K, colour, line in curves:
            _law_probes(axes, law, time_K[later], loss_K[later], colour)
            ends = np.geomspace(law["from_time"], law["to_time"], 2)
            height = law["scale"] * ends ** -law["exponent"]
            axes.plot(ends, height, color=colour, ls=line, label=name)
        time_axis(axes, TimeScale.from_times(time_K[later]), LABELS[inputs.time])
        axes.set_ylabel("mean loss − E (nats)")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(_two_or_five)
        axes.legend()

    return draw(
        "law", "Mean loss minus its fitted floor against time, with its power law", 3.4, paint
    )


def _two_or_five(value: float, _: float) -> str:
    """Label the minor ticks at 2 and 5 times a power of ten."""
    digit = round(value / 10 ** np.floor(np.log10(value)))
    return f"{value:g}" if digit in (2, 5) else ""


def _law_probes(
    axes: Axes, law: Mapping[str, Any], time_K: Floats, loss_K: Floats, colour: str
) -> None:
    """Draw the probes, filled where the law was fitted to them."""
    above_K = np.where(loss_K > law["floor"], loss_K - law["floor"], np.nan)
    fitted = (time_K >= law["from_time"] * 0.999) & (time_K <= law["to_time"] * 1.001)
    for chosen, face in ((~fitted, "white"), (fitted, colour)):
        axes.plot(time_K[chosen], above_K[chosen], "o", ms=3, mec=colour, mew=0.7, mfc=face)


def _tail(laws: Mapping[str, Any]) -> str:
    """Return a sentence on the exponent of the spectrum's tail, beside that of the loss."""
    found, difference = laws["tail"], laws["tail_minus_law"]
    if "undefined" in found:
        reason = escape(found["undefined"])
        return paragraph(f"Tail of the spectrum: {outcome(None, CLAIMED)}: {reason}.", "verdict")
    first, last = (short(math.exp(found[end])) for end in ("from_x", "to_x"))
    measured = (
        f"The drop-weighted spectrum falls with exponent {estimate(found, 'exponent')} from {first}"
        f" to {last} {UNITS[laws['time']]}; {number(found['share'], '.1%')} of its drop lies in "
        "this range."
    )
    if "undefined" in difference:
        reason = escape(difference["undefined"])
        return paragraph(
            f"{_TAIL_CLAIM}: {outcome(None, CLAIMED)}: {reason}. {measured}", "verdict"
        )
    return paragraph(
        f"{_TAIL_CLAIM}: {outcome(difference['agree'], CLAIMED)}. {measured} The exponent of the "
        f"tail minus the exponent of the loss is {estimate(difference, 'difference', '+,.3f')}."
        f"{_doubt_of_loss(laws['overall'])}",
        "verdict",
    )


def _doubt_of_loss(law: Mapping[str, Any]) -> str:
    against = doubt(law)
    return f" The law of the loss is in doubt: {against}." if against else ""


def _tail_verdict(laws: Mapping[str, Any]) -> Verdict:
    """Return the verdict: does the tail have the exponent of the loss?"""
    difference = laws["tail_minus_law"]
    if "undefined" in difference:
        return Verdict("laws", _TAIL_CLAIM, None, "–", escape(difference["undefined"]), CLAIMED)
    return Verdict(
        "laws",
        _TAIL_CLAIM,
        difference["agree"],
        estimate(difference, "difference", "+,.3f"),
        "exponent of the tail minus exponent of the loss; holds if zero is in its interval, which "
        "is over documents and the scatter of the probes",
        CLAIMED,
    )


def _zero_sum(result: Mapping[str, Any]) -> list[str]:
    """Return figure and table of how far losses move while the step doubles, or why not."""
    if "undefined" in result:
        reason = escape(result["undefined"])
        return [paragraph(f"Zero-sum learning: {outcome(None, CLAIMED)}: {reason}.")]
    values = {name: np.array(result[name], dtype=np.float64) for name in _METRICS}
    return [
        paragraph(
            "While the step doubles, the loss of a token rises or falls by M nats on average. A "
            "share D of these changes cancels in the mean over the tokens, so that the mean loss "
            "falls by (1 − D) M (Mircea et al. 2025). Noise also changes the losses of tokens, and "
            "all of its changes cancel."
        ),
        figure(
            _cancelling(np.array(result["from_step"], dtype=np.float64), values),
            "Left: the movement M, and the fall of the mean loss. Right: the share D that cancels.",
        ),
        table(
            "Changes from a probe to the probe nearest to twice its step.",
            ["steps", "M (nats)", "change of the mean loss (nats)", "D"],
            _doublings(result),
        ),
    ]


def _doublings(result: Mapping[str, Any]) -> list[list[str]]:
    """Return a row for one pair of probes per doubling of the step."""
    rows, shown_to = [], 0.0
    for first, last, movement, change, interference in zip(
        *(result[name] for name in ("from_step", "to_step", *_METRICS)), strict=True
    ):
        if first >= shown_to:
            shown_to = 2 * first
            rows.append(
                [
                    f"{number(first, ',.0f')} to {number(last, ',.0f')}",
                    number(movement),
                    number(change, "+,.3f"),
                    number(interference, ".1%"),
                ]
            )
    return rows


def _cancelling(from_step_P: Floats, values: Mapping[str, Floats]) -> str:
    """Draw movement and fall of the mean, and the share that cancels, while the step doubles."""
    scale = TimeScale.from_times(from_step_P)

    def paint(figure: Figure) -> None:
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


def _laws_over_runs(result: Mapping[str, Any] | None) -> list[str]:
    """Return the table of the runs and the two laws of them; nothing if there was one run."""
    if result is None:
        return []
    rows = [
        [
            escape(each["name"]),
            number(each["parameters"], ","),
            number(each["non_embedding"], ","),
            number(each["tokens"], ","),
            number(each["loss"]),
        ]
        for each in result["runs"]
    ]
    header = ["run", "parameters", "without embeddings", "training tokens", "last loss (nats)"]
    return [
        "<h3>Laws over runs</h3>",
        table("Mean loss of the watched tokens at each run's last probe.", header, rows),
        _chinchilla(result["chinchilla"]),
        *_multi_power(result["multi_power"]),
    ]


def _chinchilla(law: Mapping[str, Any]) -> str:
    if "undefined" in law:
        return _undefined_law("Chinchilla's law", law)
    return table(
        "Chinchilla's law, L = E + A N<sup>−α</sup> + B D<sup>−β</sup>, fitted to "
        f"{number(law['n_runs'], ',')} runs; N does not count the embeddings. R² of the logarithms "
        f"of the losses: {number(law['r2'])}.{_not_converged(law)}",
        ["", "fitted [95%]"],
        [[name, estimate(law, key, ",.4g")] for key, name in _PARAMETERS.items()],
    )


def _multi_power(result: Mapping[str, Any]) -> list[str]:
    if "undefined" in result:
        return [_undefined_law("Multi-power law", result)]
    law, score = result["law"], result["score"]
    fitted = ", ".join(escape(name) for name in result["fitted_on"])
    return [
        paragraph(
            f"The multi-power law is fitted to the losses and learning rates of {fitted}, and "
            f"predicts those of {escape(result['held_out'])}, which it has not seen."
            f"{_not_converged(law)}"
        ),
        facts(
            [
                ["R² of the losses", number(score["r2"])],
                ["Mean absolute error", f"{number(score['mae'], '.4f')} nats"],
                [
                    "Last loss",
                    f"{number(result['last_loss_predicted'])} nats predicted, "
                    f"{number(result['last_loss'])} measured",
                ],
            ]
        ),
    ]


def _not_converged(law: Mapping[str, Any]) -> str:
    return "" if law["converged"] else " The fit has not converged."


def _undefined_law(name: str, law: Mapping[str, Any]) -> str:
    return paragraph(f"{name}: {outcome(None, CLAIMED)}: {escape(law['undefined'])}.")
