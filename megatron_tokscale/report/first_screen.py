"""The first screen: what the run learns now, when it learns the rest, what to train it on next.

Shapes: N tokens, K probe steps, D datasets, S states, G grid points.
"""

import math
from collections.abc import Sequence
from typing import Final

import numpy as np
from matplotlib.figure import Figure

from megatron_tokscale.core.arrays import Floats, Integers
from megatron_tokscale.core.words import time_text
from megatron_tokscale.fit import SigmoidFits, TokenState
from megatron_tokscale.fit.states import net_fall
from megatron_tokscale.report.charts import (
    TimeScale,
    draw,
    largest_datasets,
    left_out,
    time_axis,
    time_label,
    time_of,
    time_unit,
)
from megatron_tokscale.report.html import (
    STATE_COLOURS,
    STATE_WORDS,
    dataset,
    escape,
    estimate,
    figure,
    number,
    paragraph,
    passage,
    plural,
    section,
    swatch,
    table,
)
from megatron_tokscale.report.inputs import ReportInputs
from megatron_tokscale.report.sections.examples import (
    MIN_R2,
    passages_of,
    trajectory_of,
)
from megatron_tokscale.report.sections.forecast import (
    fall,
    horizon_names,
    shown_judgements,
    uncorrected,
)
from megatron_tokscale.report.sections.overview import warnings
from megatron_tokscale.report.token_states import Shares, StateShares
from megatron_tokscale.results.estimate import Estimate
from megatron_tokscale.results.forecast import Forecast, Method, Standing
from megatron_tokscale.store.token_state import STATE_ORDER

_ASKED: Final = (TokenState.LEARNED, TokenState.UNDER_WAY, TokenState.TO_COME)
N_SHOWN: Final = 6  # tokens in two rows
_CONTEXT: Final = 90  # characters of text before a token: three lines of a card
_LN_2: Final = math.log(2)


def first_screen(inputs: ReportInputs) -> str:
    """Return the head of the page as HTML: three questions, each with its answer."""
    shares = StateShares.of(inputs.fits, inputs.run.tokens, inputs.seed)
    return "\n".join(
        [
            '<div class="top">',
            *warnings(inputs),
            section("now", "What is it learning now?", *_now(inputs, shares)),
            '<div class="halves">',
            section("rest", "When will it learn the rest?", *_rest(inputs)),
            section("next", "What should it train on next?", *_next(inputs)),
            "</div>",
            section("learning", "Tokens that it is learning now", *_learning(inputs, shares)),
            "</div>",
        ]
    )


def _now(inputs: ReportInputs, shares: StateShares) -> list[str]:
    """Return the shares of learned, under way and to come: in a sentence, drawn, in a table."""
    tokens = inputs.run.tokens
    learned, under_way, to_come, unmoved = (
        number(shares.overall[s].value, ".1%") for s in (*_ASKED, TokenState.UNMOVED)
    )
    at = f"{escape(inputs.time)} {time_text(math.exp(inputs.fits.x_K[-1]))}"
    header = [
        "tokens of",
        *(swatch(STATE_COLOURS[state], STATE_WORDS[state]) for state in STATE_ORDER),
    ]
    rows = [_row("all datasets" if len(tokens.datasets) > 1 else "all", shares.overall)]
    if len(tokens.datasets) > 1:
        rows += [
            _row(dataset(d, name), shares.by_dataset[d]) for d, name in enumerate(tokens.datasets)
        ]
    return [
        paragraph(
            f"At {at}, the run has learned <b>{learned}</b> of its "
            f"{plural(tokens.n_tokens, 'watched token')}. <b>{under_way}</b> are under way and "
            f"<b>{to_come}</b> to come; {unmoved} have never moved.",
            "lead",
        ),
        figure(
            _picture(inputs, shares),
            "Share of the tokens in each state, by the fits of the whole run."
            + left_out(largest_datasets(tokens), tokens),
        ),
        table(
            "Learned: fallen by 80% of the fitted drop. Under way: by 20 to 80%. To come: by less. "
            "Never moved: flat at a high loss, so no fit tells when it falls. Forgotten: risen "
            f"by 20% of all its change or more. Intervals are 95%, over {inputs.units}.",
            header,
            rows,
            "states",
        ),
    ]


def _row(name: str, shares: Shares | None) -> list[str]:
    if shares is None:
        return [name, *("–" for _ in STATE_ORDER)]
    return [name, *(_share(shares[state], asked=state in _ASKED) for state in STATE_ORDER)]


def _share(found: Estimate, *, asked: bool) -> str:
    """Return a share of tokens; one that the first screen asks for has its interval."""
    text = number(found.value, ".1%")
    return f"<b>{text}</b>{_range(found)}" if asked else text


def _range(found: Estimate) -> str:
    """Return an interval of shares in percent, in a short form."""
    if not found.has_interval:
        return ""
    low, high = (number(100 * bound, ".1f") for bound in (found.low, found.high))
    return f' <span class="interval">{low} to {high}</span>'


def _picture(inputs: ReportInputs, shares: StateShares) -> str:
    """Draw the shares of the states over time, one panel per dataset."""
    shown = largest_datasets(inputs.run.tokens)
    time_G = time_of(shares.x_G)
    scale = TimeScale(float(time_G[0]), float(time_G[-1]), has_zero=False)
    columns = min(len(shown), 3)
    rows = math.ceil(len(shown) / columns)

    def paint(figure: Figure) -> None:
        panels = figure.subplots(rows, columns, sharey=True, squeeze=False).ravel()
        for panel, (d, name) in zip(panels, shown.items(), strict=False):
            below_G = np.zeros(len(time_G))
            for share_G, state in zip(shares.share_DSG[d], STATE_ORDER, strict=True):
                colour, above_G = STATE_COLOURS[state], below_G + share_G
                label = STATE_WORDS[state] if panel is panels[0] else None
                panel.fill_between(time_G, below_G, above_G, color=colour, lw=0, label=label)
                below_G = above_G
            panel.set_title(name)
            panel.set_ylim(0, 1)
            panel.set_yticks([0, 0.5, 1], ["0", "50%", "100%"])
            panel.grid(visible=False)
            time_axis(panel, scale, time_label(inputs.time))
            panel.set_xlim(scale.low, scale.high)
        for panel in panels[len(shown) :]:
            panel.set_axis_off()
        panels[0].set_ylabel("share of the tokens")
        figure.legend(loc="outside upper left", ncols=len(STATE_ORDER), handlelength=1.0)

    alt = "Shares of the tokens that are learned, under way and to come, over time, by dataset"
    return draw("states", alt, 0.3 + 1.9 * rows, paint)


def _rest(inputs: ReportInputs) -> list[str]:
    """Return the forecast of the falls to come, or the verb that makes it."""
    expected = inputs.spectrum.summary.overall.expected_nats
    found = inputs.forecast
    if found is None:
        return [
            paragraph(
                f"<code>megatron-tokscale forecast {escape(_path(inputs))}</code> forecasts it. "
                "What the tokens have left that have not fallen half-way, if they fall as their "
                f"groups did: {estimate(expected)} nats per token."
            )
        ]
    return [_verdict(found), _falls_table(inputs, found)]


def _verdict(found: Forecast) -> str:
    """Return the sentence on the method of the forecast, and what its back-tests say of it."""
    best = shown_judgements(found.judgements)[0]
    link = '<a href="#forecast">back-tests</a>'
    missed = f"missed the falls that came by {number(best.error, '.0%')} on average."
    text = {
        Standing.STANDS: f"The {link} of this forecast {missed}",
        Standing.REFUTED: f"The {link} refute this forecast: they {missed}",
        Standing.UNTESTED: f"No {link} tell how far this forecast misses.",
    }[best.standing]
    if found.best is Method.NOTHING:
        text += " To say that nothing more falls does better."
    return paragraph(
        f"Forecast by the {escape(best.method)}, if training goes on as now. {text}",
        "warning" if best.standing is Standing.REFUTED or found.best is Method.NOTHING else "",
    )


def _falls_table(inputs: ReportInputs, found: Forecast) -> str:
    """Return the forecast falls by horizon: of all tokens, and of each dataset.

    Those of the datasets are by the hazard; they are left out where it is refuted.
    """
    horizons, best = found.now.horizons, shown_judgements(found.judgements)[0].method
    rows = [["all tokens", *(fall(each.falls.get(best)) for each in horizons)]]
    names, datasets = inputs.run.tokens.datasets, found.now.groups.get("dataset", ())
    standing = {each.method: each.standing for each in found.judgements}
    refuted = standing.get(Method.HAZARD) is Standing.REFUTED
    caption = "Fall of the mean loss from now on, in nats per token; of a dataset, per token of it."
    if len(datasets) > 1 and (best is Method.HAZARD or not refuted):
        if best is not Method.HAZARD:
            by = f"by the {escape(Method.HAZARD)}"
            rows.append(
                [f"all tokens, {by}", *(fall(h.falls.get(Method.HAZARD)) for h in horizons)]
            )
            caption += f" Those of the datasets are {by}."
        rows += [
            [_named(names, each.name), *(estimate(nats) for nats in each.falls)]
            for each in datasets
        ]
    header = ["", *horizon_names(horizons, time_unit(inputs.time))]
    return table(caption + uncorrected(found.now), header, rows, "dense")


def _named(names: Sequence[str], name: str) -> str:
    return dataset(names.index(name), name) if name in names else escape(name)


def _next(inputs: ReportInputs) -> list[str]:
    """Return what falls now and what is left, by dataset; the plan or scores, or their verbs."""
    falls, summary = last_octave(inputs), inputs.spectrum.summary
    rows = [
        [dataset(d, each.name), fall(falls.get(d)), estimate(each.expected_nats)]
        for d, each in enumerate(summary.datasets)
    ]
    return [
        table(
            "Nats per token. Fell: fall of the loss in the last factor of two in time. Left: drops "
            "of the tokens that have not fallen half-way, if they fall as their groups did.",
            ["dataset", "fell", "left"],
            rows,
            "dense",
        ),
        paragraph(_plan_or_verbs(inputs)),
    ]


def last_octave(inputs: ReportInputs) -> dict[int, Estimate]:
    """Return the fall of each dataset's mean loss over the last factor of two in time, in nats."""
    arrays = inputs.spectrum.arrays
    finite_K = np.isfinite(arrays.x_K)
    x_K = arrays.x_K[finite_K]
    if not len(x_K) or x_K[-1] - x_K[0] < _LN_2:
        return {}
    loss_RDK = arrays.mean_loss_RDK[:, :, finite_K].astype(np.float64)
    right = int(np.searchsorted(x_K, x_K[-1] - _LN_2))
    left = max(right - 1, 0)
    gap = x_K[right] - x_K[left]
    share = float((x_K[-1] - _LN_2 - x_K[left]) / gap) if gap > 0 else 0.0
    before_RD = (1 - share) * loss_RDK[:, :, left] + share * loss_RDK[:, :, right]
    fall_RD = before_RD - loss_RDK[:, :, -1]
    falls = {d: Estimate.from_resamples(fall_R) for d, fall_R in enumerate(fall_RD.T)}
    return {d: fall for d, fall in falls.items() if math.isfinite(fall.value)}


def _plan_or_verbs(inputs: ReportInputs) -> str:
    """Return what there is of a plan and of scores, and the verb for the next step."""
    followed = (
        f'The run follows a <a href="#plan">data plan</a> '
        f"({escape(inputs.plan.plan.provenance.policy)}). "
        if inputs.plan is not None
        else ""
    )
    if inputs.scores:
        scored = ", ".join(
            f"{escape(name)} {number(each.reliability['fall'].mean, ',.3f')} nats"
            if "fall" in each.reliability
            else escape(name)
            for name, each in inputs.scores.items()
        )
        return (
            f"{followed}Its documents have scores; mean fall of the scored ones: {scored}. "
            "<code>megatron-tokscale plan build fall</code> makes a plan by them, and prints what "
            "it can gain."
        )
    return (
        f"{followed}Which documents still fall: <code>megatron-tokscale score "
        f"{escape(_path(inputs))} --data-path …</code> scores them, and <code>megatron-tokscale "
        "plan build fall</code> makes a plan by the scores and prints what it can gain."
    )


def _path(inputs: ReportInputs) -> str:
    return str(inputs.run.path)


def _learning(inputs: ReportInputs, shares: StateShares) -> list[str]:
    """Return the tokens under way that fell most in the last factor of two in time."""
    tokens, fall_N = choose_under_way(inputs.fits, shares, inputs.run.tokens.cluster_N)
    if not len(tokens):
        return [paragraph("No token with a good fit is under way.")]
    since = time_text(math.exp(inputs.fits.x_K[-1]) / 2)
    return [
        paragraph(
            f"Tokens under way with a good fit (R² at least {MIN_R2:g}) that fell most since "
            f"{escape(inputs.time)} {since}, at most one of each of the {inputs.units}. Points: "
            f"losses in nats over {time_unit(inputs.time)}. Line: fit.",
            "soft",
        ),
        f'<div class="cards">{"".join(under_way_cards(inputs, tokens, fall_N))}</div>',
    ]


def choose_under_way(
    fits: SigmoidFits, shares: StateShares, cluster_N: Integers
) -> tuple[Integers, Floats]:
    """Return the tokens that are shown, and every token's fall over the last factor of two in time.

    Args:
        fits: fits of the tokens.
        shares: their states.
        cluster_N: document of each token, or what stands in for it: at most one token of each.
    """
    last = float(fits.x_K[-1])
    fall_N = net_fall(fits, last)[0] - net_fall(fits, last - _LN_2)[0]
    good_N = (shares.state_N == TokenState.UNDER_WAY) & (fits.r2_N >= MIN_R2) & (fall_N > 0)
    candidates = np.flatnonzero(good_N)
    order = candidates[np.argsort(-fall_N[candidates], kind="stable")]
    _, first = np.unique(cluster_N[order], return_index=True)
    return order[np.sort(first)][:N_SHOWN], fall_N


def under_way_cards(inputs: ReportInputs, tokens: Integers, fall_N: Floats) -> list[str]:
    """Return a card per token: its losses, its text, its fall."""
    names, dataset_N = inputs.run.tokens.datasets, inputs.run.tokens.dataset_N
    cards = []
    for token, text in zip(tokens.tolist(), passages_of(inputs, tokens), strict=True):
        d = int(dataset_N[token])
        cards.append(
            f'<div class="card">{trajectory_of(inputs, token)}'
            f"{passage(text.before[-_CONTEXT:], text.target, text.after)}"
            f'<p class="facts">{dataset(d, names[d])}, fell by '
            f"<b>{number(float(fall_N[token]), ',.2f')} nats</b></p></div>"
        )
    return cards
