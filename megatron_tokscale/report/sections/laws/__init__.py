"""The section on laws: power laws of the loss, and predictions of rival explanations.

Shapes: P pairs of probes, from a step to about its double.
"""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from megatron_tokscale.laws.explain import SPECTRUM
from megatron_tokscale.report.charts import (
    TimeScale,
    draw,
    largest_datasets,
    left_out,
    time_axis,
)
from megatron_tokscale.report.html import (
    MEASURED,
    NULL,
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
from megatron_tokscale.report.sections.laws.power_laws import (
    law_table,
    loss_figure,
    tail,
    tail_verdict,
    undecided,
)
from megatron_tokscale.report.verdicts import VerdictRow, outcome
from megatron_tokscale.results.estimate import Undefined
from megatron_tokscale.results.laws import (
    ChinchillaForecast,
    ChinchillaLaw,
    LawsResult,
    ScheduleForecast,
    SeveralRuns,
    ZeroSumPair,
    ZeroSumResult,
)
from megatron_tokscale.results.verdict import Verdict


def laws_section(inputs: ReportInputs) -> list[Section]:
    """Return the section with explanations, power laws, zero-sum learning, and laws over runs."""
    laws = inputs.laws
    if laws is None:
        return []
    tokens = inputs.run.tokens
    picture = loss_figure(inputs, laws)
    parts = [
        _explanations(laws),
        "<h3>Power laws of the loss</h3>",
        law_table(laws),
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
        tail(laws),
        "<h3>Zero-sum learning</h3>",
        *_zero_sum(laws.zero_sum),
        *_laws_over_runs(laws.several),
    ]
    return [Section("laws", "Laws", "Laws and rival explanations", parts, _verdicts(laws))]


def _verdicts(laws: LawsResult) -> list[VerdictRow]:
    """Return the verdicts on the tail, and on the claims of rivals that are not undecided."""
    return [
        tail_verdict(laws),
        *(
            VerdictRow(
                "laws",
                f"{escape(each.explanation)}: {escape(each.claim)}",
                each.verdict,
                _words(each.measured),
                f"predicted: {_words(each.predicted)}",
            )
            for each in laws.explanations
            if each.explanation != SPECTRUM and each.verdict != Verdict.UNDECIDED
        ),
    ]


def _explanations(laws: LawsResult) -> str:
    """Return the table of each explanation's prediction and the measurement."""
    rows = [
        [
            *(_words(text) for text in (each.explanation, each.claim)),
            *(_words(text) for text in (each.predicted, each.measured)),
            outcome(each.verdict),
        ]
        for each in laws.explanations
    ]
    return table(
        "Predictions of each explanation for this run, with the margin of the claim. A claim holds "
        "if the whole 95% interval of its number is within the margin, and fails if the whole "
        "interval is outside; else it is undecided, as is a claim that was not measured. The "
        "verdicts are corrected for their number (Holm).",
        ["explanation", "claim", "predicted", "measured [95%]", "verdict"],
        rows,
        "words",
    )


def _words(text: str) -> str:
    return "–" if text == "-" else escape(text)


def _zero_sum(result: ZeroSumResult | Undefined) -> list[str]:
    """Return figure and table of how losses move while the step doubles, or the reason for none."""
    if isinstance(result, Undefined):
        return [undecided("Zero-sum learning", result)]
    return [
        paragraph(
            "While the step doubles, the loss of a token rises or falls by M nats on average. A "
            "share D of these changes cancels in the mean over the tokens, so that the mean loss "
            "falls by (1 − D) M (Mircea et al. 2025). Noise also changes the losses of tokens, and "
            "all of its changes cancel."
        ),
        figure(
            _cancelling(result.pairs),
            "Left: the movement M, and the fall of the mean loss. Right: the share D that cancels.",
        ),
        table(
            "Changes from a probe to the probe nearest to twice its step.",
            ["steps", "M (nats)", "change of the mean loss (nats)", "D"],
            _doublings(result.pairs),
        ),
    ]


def _cancelling(pairs: Sequence[ZeroSumPair]) -> str:
    """Draw movement and fall of the mean, and the share that cancels, while the step doubles."""
    from_step_P = np.array([each.from_step for each in pairs])
    movement_P = np.array([each.movement.value for each in pairs])
    change_P = np.array([each.change.value for each in pairs])
    cancelled_P = np.array([each.interference.value for each in pairs])
    scale = TimeScale.from_times(from_step_P)

    def paint(figure: Figure) -> None:
        left, right = figure.subplots(1, 2)
        left.plot(from_step_P, movement_P, color=MEASURED, label="movement M")
        left.plot(from_step_P, -change_P, color=NULL, ls="--", label="fall of the mean loss")
        left.axhline(0, color="#999999", lw=0.7)
        left.set_ylabel("nats per token")
        left.legend()
        right.plot(from_step_P, 100 * cancelled_P, color=MEASURED)
        right.set_ylim(0, 100)
        right.set_ylabel("cancelled D (%)")
        for axes in (left, right):
            time_axis(axes, scale, "from step t to 2t: t")

    alt = "How far tokens' losses move while the step doubles, and what share of that cancels"
    return draw("zero-sum", alt, 2.6, paint)


def _doublings(pairs: Sequence[ZeroSumPair]) -> list[list[str]]:
    """Return a row for one pair of probes per doubling of the step."""
    rows, shown_to = [], 0.0
    for each in pairs:
        if each.from_step < shown_to:
            continue
        shown_to = 2 * each.from_step
        rows.append(
            [
                f"{number(each.from_step, ',.0f')} to {number(each.to_step, ',.0f')}",
                number(each.movement.value),
                number(each.change.value, "+,.3f"),
                number(each.interference.value, ".1%"),
            ]
        )
    return rows


def _laws_over_runs(several: SeveralRuns | None) -> list[str]:
    """Return the table of the runs and the two laws over them; nothing for a single run."""
    if several is None:
        return []
    rows = [
        [
            escape(each.name),
            number(each.parameters, ","),
            number(each.non_embedding, ","),
            number(each.tokens, ","),
            number(each.loss),
        ]
        for each in several.runs
    ]
    header = ["run", "parameters", "without embeddings", "training tokens", "last loss (nats)"]
    return [
        "<h3>Laws over runs</h3>",
        table("Mean loss of the watched tokens at each run's last probe.", header, rows),
        _chinchilla(several.chinchilla),
        _chinchilla_forecast(several.chinchilla_forecast),
        *_multi_power(several.multi_power),
    ]


def _chinchilla(law: ChinchillaLaw | Undefined) -> str:
    if isinstance(law, Undefined):
        return undecided("Chinchilla's law", law)
    rows = [
        ("E (nats)", law.floor),
        ("A", law.A),
        ("α, of the parameters", law.alpha),
        ("B", law.B),
        ("β, of the tokens", law.beta),
        ("a = β / (α + β): the best size grows as FLOPs<sup>a</sup>", law.a),
    ]
    return table(
        "Chinchilla's law, L = E + A N<sup>−α</sup> + B D<sup>−β</sup>, fitted to "
        f"{number(law.n_runs, ',')} runs; N does not count the embeddings. R² of the logarithms "
        f"of the losses: {number(law.r2)}.{_not_converged(law.converged)}",
        ["", "fitted [95%]"],
        [[name, estimate(value, ",.4g")] for name, value in rows],
    )


def _chinchilla_forecast(forecast: ChinchillaForecast | Undefined) -> str:
    if isinstance(forecast, Undefined):
        return undecided("Forecast of the largest model", forecast)
    rows = [
        [escape(name), number(loss), number(predicted), number(predicted / loss - 1, "+.2%")]
        for name, loss, predicted in zip(
            forecast.names, forecast.loss_S, forecast.predicted_S, strict=True
        )
    ]
    return table(
        f"Runs of the largest model, predicted by the law of the other {forecast.law.n_runs} runs. "
        f"Mean relative error: {estimate(forecast.error, '+.4f')}.",
        ["run", "last loss (nats)", "predicted", "error"],
        rows,
    )


def _multi_power(forecasts: Sequence[ScheduleForecast] | Undefined) -> list[str]:
    if isinstance(forecasts, Undefined):
        return [undecided("Multi-power law", forecasts)]
    return [part for each in forecasts for part in _schedule_forecast(each)]


def _schedule_forecast(forecast: ScheduleForecast) -> list[str]:
    fitted = ", ".join(escape(name) for name in forecast.fitted_on)
    return [
        paragraph(
            f"The multi-power law is fitted to the losses and learning rates of {fitted}, and "
            f"predicts those of {escape(forecast.held_out)}, which it has not seen."
            f"{_not_converged(forecast.law.converged)}"
        ),
        facts(
            [
                ["R² of the losses", number(forecast.score.r2)],
                ["Mean absolute error", f"{number(forecast.score.mae, '.4f')} nats"],
                ["Mean of error over loss", estimate(forecast.score.mean_relative, ".4f")],
                [
                    "Last loss",
                    f"{number(forecast.last_loss_predicted)} nats predicted, "
                    f"{number(forecast.last_loss)} measured",
                ],
            ]
        ),
    ]


def _not_converged(converged: bool) -> str:
    return "" if converged else " The fit has not converged."
