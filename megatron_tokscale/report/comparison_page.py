"""The page of a comparison of two runs: what B gained and lost against A, and how much sooner.

Shapes: G bins of x.
"""

import math
from collections.abc import Sequence
from typing import Final

import numpy as np
from matplotlib.figure import Figure

from megatron_tokscale.core.words import time_text
from megatron_tokscale.report.charts import TimeScale, draw, time_axis, time_label, time_unit
from megatron_tokscale.report.html import (
    COMPARISON_TITLE,
    MEASURED,
    NULL,
    escape,
    estimate,
    facts,
    figure,
    number,
    paragraph,
    passage,
    plural,
    section,
    swatch,
    table,
    whole_page,
)
from megatron_tokscale.results.comparison import (
    Change,
    ChangedToken,
    ComparedRun,
    Comparison,
    GroupComparison,
    Passage,
    Sooner,
    SpectraTest,
    undetermined,
)
from megatron_tokscale.results.estimate import Estimate, Undefined

_OF_A: Final = MEASURED
_OF_B: Final = "#d55e00"
_SHOWN: Final = 12  # tokens of each kind; compare.json has more
_GROUPINGS: Final = {
    "frequency decile": "By frequency of the token, from the rarest decile",
    "class in A": "By class in A",
    "position decile": "By length of the context, from the shortest decile",
}
"""Titles of the groupings below the first table, in order; others come after them."""


def render_comparison(found: Comparison) -> str:
    """Return the page of a comparison as HTML; equal results give equal text."""
    return whole_page(
        f"{COMPARISON_TITLE}: {found.b.name} (B) against {found.a.name} (A)",
        '<div class="top">',
        *(paragraph(escape(note), "warning") for note in found.notes),
        section("changed", "What is different in B?", *_changed(found)),
        section("spectra", "When each run learned", *_spectra(found)),
        "</div>",
        section("groups", "Which tokens", *_groups(found)),
        section("sooner", "How much sooner", *_sooner_parts(found)),
        section("gained", "Tokens gained by B", *_examples(found, found.gained, "gained")),
        section("lost", "Tokens lost by B", *_examples(found, found.lost, "lost")),
        section("runs", "What was compared", *_runs(found)),
    )


def _changed(found: Comparison) -> list[str]:
    """Return the headline, and the table over all tokens and by dataset."""
    return [
        paragraph(_headline(found), "lead"),
        *_between_seeds(found),
        _change_table(
            [found.overall, *found.groups.get("dataset", ())],
            "Gained: learned by B and not by A, beyond the noise between seeds; below it, all such "
            "tokens with the lower late loss in B, and as many of another seed of A. Lost: the "
            "reverse. Sooner: the factor by which B needs less time for the tokens that both "
            "learn. Lower: late loss of A less "
            f"that of B, in nats. Intervals are 95%, over {found.unit_kind}.",
        ),
    ]


def _headline(found: Comparison) -> str:
    """Return the two sentences on the loss and on the tokens, as HTML."""
    overall = found.overall
    lower, factor = overall.lower, overall.late_loss.factor
    way = "lower" if lower.value >= 0 else "higher"
    size = _negative(lower) if lower.value < 0 else lower
    text = f"The late loss of B is <b>{estimate(size)}</b> nats {way} than that of A"
    if isinstance(factor, Estimate):
        ahead, behind = ("B", "A") if factor.value >= 1 else ("A", "B")
        text += (
            f": {ahead} reaches the late loss of {behind} <b>{estimate(_above_one(factor), ',.2f')}"
            "</b> times sooner"
        )
    gained, lost = overall.gained.called, overall.lost.called
    if isinstance(gained, Undefined) or isinstance(lost, Undefined):
        return (
            f"{text}. B has learned {plural(overall.gained.tokens, 'token')} that A has not, and A "
            f"{plural(overall.lost.tokens, 'token')} that B has not, with the lower late loss "
            "there. How many of them another seed would change is undecided without a second seed "
            "(<code>--noise</code>)."
        )
    return (
        f"{text}. Beyond the noise between seeds B gained <b>{plural(gained, 'token')}</b> and "
        f"lost <b>{plural(lost, 'token')}</b>, of {number(found.compared, ',')}."
    )


def _between_seeds(found: Comparison) -> list[str]:
    """Return the sentence on how far further seeds of A are from A; empty without any."""
    if not found.noise:
        return []
    lower = ", ".join(number(each, "+,.3f") for each in found.overall.seed_lower)
    sooner = ", ".join(number(each, ",.2f") for each in found.overall.late_loss.seeds)
    recipe = found.overall.late_loss.recipe
    over_seeds = (
        f" Over {found.unit_kind} and seeds, B is {estimate(recipe, ',.2f')} times sooner."
        if isinstance(recipe, Estimate)
        else ""
    )
    return [
        paragraph(
            f"The same for further seeds of A in the place of B: late losses lower by {lower} "
            f"nats, {sooner} times sooner.{over_seeds}",
            "soft",
        )
    ]


def _negative(found: Estimate) -> Estimate:
    """Return the negative of a number with its interval."""
    return Estimate(-found.value, -found.high, -found.low)


def _above_one(factor: Estimate) -> Estimate:
    """Return the factor, or that of the other run over this one if it is below 1."""
    if factor.value >= 1:
        return factor
    return Estimate(1 / factor.value, 1 / factor.high, 1 / factor.low)


def _change_table(groups: Sequence[GroupComparison], caption: str) -> str:
    header = ["tokens of", "tokens", "learned by A", "by B", "gained", "lost", "sooner", "lower"]
    rows = [
        [
            escape(group.name),
            number(group.tokens, ","),
            number(group.learned_a, ".1%"),
            number(group.learned_b, ".1%"),
            _change(group.gained),
            _change(group.lost),
            _factor(group.learning_times.factor),
            estimate(group.lower),
        ]
        for group in groups
    ]
    return table(caption, header, rows, "dense")


def _change(found: Change) -> str:
    """Return the called tokens, and below them all that differ and as many of another seed."""
    called = (
        '<span class="soft">undecided</span>'
        if isinstance(found.called, Undefined)
        else f"<b>{number(found.called, ',')}</b>"
    )
    seed = "" if isinstance(found.seed, Undefined) else f", seed {number(found.seed, ',.0f')}"
    return f'{called} <span class="interval">of {number(found.tokens, ",")}{seed}</span>'


def _factor(found: Estimate | Undefined) -> str:
    return "–" if isinstance(found, Undefined) else estimate(found, ",.2f")


def _spectra(found: Comparison) -> list[str]:
    """Return the two spectra in one picture, and the test of their difference."""
    spectra = found.spectra
    if isinstance(spectra, Undefined):
        return [paragraph(f"The spectra are undefined: {escape(spectra.undefined)}.")]
    seeds = " Grey: further seeds of A." if spectra.noise else ""
    return [
        figure(
            _spectra_figure(found, spectra),
            "Drop-weighted learning-time spectra: the nats per token that each run learns per unit "
            f"of x, the logarithm of the time.{seeds}",
        ),
        paragraph(_difference(found, spectra)),
    ]


def _difference(found: Comparison, spectra: SpectraTest) -> str:
    p_seeds = (
        f"between seeds: {escape(spectra.p_seeds.undefined)}"
        if isinstance(spectra.p_seeds, Undefined)
        else f"between seeds p = {number(spectra.p_seeds, '.2g')}"
    )
    others = ", ".join(number(each) for each in spectra.seeds)
    seeds = f"; of another seed of A: {others}" if spectra.seeds else ""
    return (
        f"Do the spectra differ? <b>{escape(spectra.outcome)}</b>. Their distance is "
        f"{estimate(spectra.distance)} nats per token{seeds}. By {found.unit_kind} p = "
        f"{number(spectra.p_documents, '.2g')}, {p_seeds}; they differ if both are at most "
        f"{number(spectra.level, 'g')}."
    )


def _spectra_figure(found: Comparison, spectra: SpectraTest) -> str:
    edges = np.exp(np.array(spectra.edges))
    scale = TimeScale(float(edges[0]), float(edges[-1]), has_zero=False)

    def paint(figure: Figure) -> None:
        axes = figure.add_subplot()
        for s, each in enumerate(spectra.noise):
            label = "further seeds of A" if s == 0 else None
            axes.stairs(each, edges, baseline=None, color=NULL, lw=0.8, label=label)
        axes.stairs(spectra.a, edges, color=_OF_A, alpha=0.1, fill=True, lw=0)
        axes.stairs(spectra.a, edges, baseline=None, color=_OF_A, lw=1.8, label="A")
        axes.stairs(spectra.b, edges, baseline=None, color=_OF_B, lw=1.8, label="B")
        axes.set_ylim(bottom=0)
        time_axis(axes, scale, time_label(found.clock_name))
        axes.set_xlim(scale.low, scale.high)
        axes.set_ylabel("nats per unit of x")
        axes.legend()

    return draw("spectra", "Learning-time spectra of A and B", 2.9, paint)


def _groups(found: Comparison) -> list[str]:
    """Return a table per grouping, but for the datasets, which stand in the first table."""
    known = [name for name in _GROUPINGS if name in found.groups]
    others = [name for name in found.groups if name not in (*_GROUPINGS, "dataset")]
    tables = [
        _change_table(found.groups[name], f"<b>{escape(_GROUPINGS.get(name, name))}</b>")
        for name in (*known, *others)
    ]
    return [paragraph("The columns are those of the first table.", "soft"), *tables]


def _sooner_parts(found: Comparison) -> list[str]:
    """Return the factors of the learning times and of the late losses, by dataset."""
    groups = [found.overall, *found.groups.get("dataset", ())]
    rows = [
        [escape(f"{group.name}: {name}"), *_sooner(factor)]
        for group in groups
        for name, factor in (
            ("learning times", group.learning_times),
            ("late loss", group.late_loss),
        )
    ]
    return [
        table(
            "Factor by which B is sooner than A; above 1, B needs less time. Learning times: the "
            "median over the tokens that both learn, each counting by its drop. Late loss: the run "
            "with the lower late loss reaches that of the other sooner by it. These runs: interval "
            f"over {found.unit_kind}. Ways of training: B against the mean of A and its further "
            f"seeds, interval over {found.unit_kind} and seeds.",
            ["", "tokens", "these runs", "another seed of A", "ways of training"],
            rows,
        )
    ]


def _sooner(found: Sooner) -> list[str]:
    seeds = ", ".join(number(each, ",.2f") for each in found.seeds) or "–"
    factors = [
        f'<span class="soft">{escape(undetermined(each))}</span>'
        if isinstance(each, Undefined)
        else _factor(each)
        for each in (found.factor, found.recipe)
    ]
    return [number(found.tokens, ","), factors[0], seeds, factors[1]]


def _examples(found: Comparison, tokens: Sequence[ChangedToken], what: str) -> list[str]:
    """Return the strongest changed tokens in their context."""
    if not tokens:
        return [paragraph(f"No token is {what}.")]
    called = found.overall.gained.called
    intro = (
        "The strongest candidates: without a second seed nothing tells which of them are noise."
        if isinstance(called, Undefined)
        else "The strongest."
    )
    return [paragraph(intro, "soft"), *(_card(found, each) for each in tokens[:_SHOWN])]


def _card(found: Comparison, token: ChangedToken) -> str:
    text = token.passage or Passage("", f"token {token.token}", "")
    places = {"document": token.document, "position": token.position}
    place = ", ".join(
        [
            escape(token.dataset),
            *(f"{name} {value}" for name, value in places.items() if value is not None),
        ]
    )
    q_value = (
        "" if isinstance(token.q_value, Undefined) else f", q = {number(token.q_value, '.2g')}"
    )
    by_run = "<br>".join(
        f"{name}: {escape(state)}, loss <b>{number(loss, ',.2f')}</b>{_at(found, time)}"
        for name, state, loss, time in (
            ("A", token.state_a, token.late_loss_a, token.time_a),
            ("B", token.state_b, token.late_loss_b, token.time_b),
        )
    )
    return (
        f'<div class="token">{passage(text.before, text.target, text.after)}'
        f'<p class="facts">{place}<br>{by_run}<br>z = {number(token.z, ",.1f")}{q_value}</p></div>'
    )


def _at(found: Comparison, time: float) -> str:
    if not math.isfinite(time):
        return ""
    return f", learned at {time_text(time)} {time_unit(found.clock_name)}"


def _runs(found: Comparison) -> list[str]:
    """Return the settings of the comparison and of its runs."""
    settings = found.settings
    runs = [("A", found.a), ("B", found.b), *(("Seed of A", each) for each in found.noise)]
    return [
        facts(
            [
                *([name, _run(found, run)] for name, run in runs),
                ["Time", f"{escape(time_label(found.clock_name))}, up to {time_text(found.end)}"],
                [
                    "Tokens",
                    f"{number(found.compared, ',')} of {number(found.n_tokens, ',')} watched ones "
                    "have finite losses at all compared probes, in "
                    f"{number(found.n_units, ',')} {found.unit_kind}",
                ],
                ["Probe set", escape(found.probe_fingerprint)],
                ["False discovery rate", number(settings.rate, "g")],
                ["Late loss", f"mean over the last {number(settings.window, 'g')} of x"],
                [
                    "Draws",
                    f"{number(settings.n_resamples, ',')} resamples, "
                    f"{number(settings.swaps, ',')} swaps, seed {settings.seed}",
                ],
            ]
        )
    ]


def _run(found: Comparison, run: ComparedRun) -> str:
    refitted = ", fitted again up to there" if run.refitted else ""
    rate = (
        f", learning rate {number(run.learning_rate, '.0%')} of its peak"
        if math.isfinite(run.learning_rate)
        else ""
    )
    return (
        f"{swatch(_OF_B if run is found.b else _OF_A if run is found.a else NULL, run.name)}: "
        f"{plural(run.probes, 'probe')} up to {time_text(run.used)} of "
        f"{time_text(run.last)}{refitted}{rate}"
    )
