"""The section with example tokens, each in its context, with its losses and its model.

Shapes: N tokens, K probe steps, G grid points.
"""

import math
from collections.abc import Callable
from typing import Final

import numpy as np

from megatron_tokscale.core.arrays import Floats, Integers, Mask
from megatron_tokscale.fit import FitStatus, SigmoidFits, TokenClass
from megatron_tokscale.probe.text import BEFORE, Passage, passages
from megatron_tokscale.report.charts import TimeScale, time_of, time_unit
from megatron_tokscale.report.html import dataset, escape, number, paragraph, passage
from megatron_tokscale.report.inputs import ReportInputs
from megatron_tokscale.report.sections import Section
from megatron_tokscale.report.sections.classes import CLASS_MEANINGS

MIN_R2: Final = 0.8  # our choice: a worse fit does not illustrate its class
MAX_MIDPOINT_SE: Final = 0.25  # in x: a learning time known to a quarter
_SHARE_OF_CLASS: Final = 12  # one of twelve examples comes from each class other than falling
_MODEL_POINTS: Final = 80  # points of the drawn model: smooth at the size of the figure
_TEN_NINETY_DECADES: Final = 2 * math.log(9) / math.log(10)  # 10-90% width in decades, over w
_WIDTH: Final = 300  # of a trajectory's SVG, in its own units
_HEIGHT: Final = 118
_LEFT: Final = 26  # margins: labels of the y axis at the left, of the x axis below
_RIGHT: Final = 6
_TOP: Final = 6
_BOTTOM: Final = 18
_MAX_POINTS: Final = 120  # most probes in a figure; more could not be told apart


def examples_section(inputs: ReportInputs) -> list[Section]:
    """Return the section with the example tokens, class by class."""
    chosen = choose(inputs.fits, inputs.n_tokens, inputs.seed)
    cards = []
    for token_class, tokens in chosen.items():
        if len(tokens):
            title = f"{token_class.label}: {CLASS_MEANINGS[token_class]}"
            cards.append(f"<h3>{escape(title)}</h3>")
            cards += _cards(inputs, tokens)
    unit = time_unit(inputs.time)
    parts = [
        paragraph(
            f"{_what_is_shown(inputs)} Points: loss of the token in nats at each probe, against "
            f"{unit} on a logarithmic axis. Line: the fitted model of its class. Dotted line: its "
            "learning time."
        ),
        paragraph(
            "The falling tokens are chosen among those with a well-determined fit (R² at least "
            f"{MIN_R2:g}, learning time known to {MAX_MIDPOINT_SE:.0%} or better): ordered by "
            "learning time, these form groups of equal size, and one token of each group is drawn "
            "at random. Of every other class a few tokens are drawn at random. The seed is "
            f"{inputs.seed}.",
            "soft",
        ),
        *cards,
    ]
    return [Section("tokens", "Example tokens", "Example tokens", parts)]


def _what_is_shown(inputs: ReportInputs) -> str:
    if inputs.run.tokens.probe_set is None:
        return "The losses were imported without text."
    return (
        "The network predicts the marked token from the text before it, of which the last "
        f"{BEFORE} tokens are shown."
    )


def choose(fits: SigmoidFits, n_tokens: int, seed: int) -> dict[TokenClass, Integers]:
    """Choose at most `n_tokens` tokens: a twelfth from each class, the others falling."""
    chosen: dict[TokenClass, Integers] = {TokenClass.FALLING: np.zeros(0, np.int64)}
    for token_class in CLASS_MEANINGS:
        if token_class not in (TokenClass.FALLING, TokenClass.UNFITTED):
            of_class = np.flatnonzero(fits.is_class(token_class))
            generator = np.random.default_rng([seed, int(token_class)])
            count = min(n_tokens // _SHARE_OF_CLASS, len(of_class))
            chosen[token_class] = np.sort(generator.choice(of_class, count, replace=False))
    left = n_tokens - sum(len(tokens) for tokens in chosen.values())
    chosen[TokenClass.FALLING] = _spread_over_learning_times(fits, left, seed)
    return chosen


def well_determined(fits: SigmoidFits) -> Mask:
    """Return the falling tokens with a good fit and a well-known midpoint."""
    return np.asarray(
        fits.is_class(TokenClass.FALLING)
        & fits.trusted_N
        & (fits.r2_N >= MIN_R2)
        & (fits.midpoint_se_N <= MAX_MIDPOINT_SE)
    )


def _spread_over_learning_times(fits: SigmoidFits, count: int, seed: int) -> Integers:
    """Choose one token at random from each of `count` groups of like learning times."""
    if count < 1:
        return np.zeros(0, np.int64)
    candidates = np.flatnonzero(well_determined(fits))
    order = candidates[np.argsort(fits.midpoint_N[candidates], kind="stable")]
    generator = np.random.default_rng([seed, int(TokenClass.FALLING)])
    groups = np.array_split(order, max(min(count, len(order)), 1))
    return np.array([generator.choice(group) for group in groups if len(group)], dtype=np.int64)


def _cards(inputs: ReportInputs, tokens: Integers) -> list[str]:
    """Return a card per token: its context, its trajectory, and the facts of its model."""
    return [
        _card(
            text,
            _place(inputs, token),
            _facts(inputs.fits.rows(slice(token, token + 1)), inputs.time),
            trajectory_of(inputs, token),
        )
        for token, text in zip(tokens.tolist(), passages_of(inputs, tokens), strict=True)
    ]


def passages_of(inputs: ReportInputs, tokens: Integers) -> list[Passage]:
    """Return the text of each token in its context; its number where the run has no text."""
    probe_set = inputs.run.tokens.probe_set
    if probe_set is None:
        return [Passage("", f"token {token}", "") for token in tokens.tolist()]
    return passages(probe_set, tokens.tolist(), inputs.tokenizer)


def trajectory_of(inputs: ReportInputs, token: int) -> str:
    """Draw the losses of a token and its fitted curve."""
    fit = inputs.fits.rows(slice(token, token + 1))
    time_K = time_of(fit.x_K)
    scale = TimeScale.from_times(time_K)
    time_G = np.geomspace(scale.low, scale.high, _MODEL_POINTS)
    loss_K = inputs.run.read_losses(token, token + 1)[0].astype(np.float64)
    midpoints = [time for time in _midpoints(fit) if scale.low <= time <= scale.high]
    alt = f"Loss of this token from {loss_K[0]:.2f} nats at the first probe to {loss_K[-1]:.2f}"
    model_G = fit.predict(np.log(time_G))[0]
    return trajectory(scale, time_K, loss_K, time_G, model_G, midpoints, alt)


def _card(text: Passage, place: str, facts: str, svg: str) -> str:
    return (
        f'<div class="token"><div>{passage(text.before, text.target, text.after)}'
        f'<p class="facts">{place}<br>{facts}</p></div>\n{svg}</div>'
    )


def _place(inputs: ReportInputs, token: int) -> str:
    """Return dataset, document, position and id of a token, as far as they are known."""
    tokens = inputs.run.tokens
    index = int(tokens.dataset_N[token])
    columns = {
        "document": tokens.document_N,
        "sample": tokens.sample_N,
        "position": tokens.position_N,
        "id": tokens.label_N,
    }
    known = (
        f"{name} {int(value_N[token])}" for name, value_N in columns.items() if value_N is not None
    )
    return ", ".join([dataset(index, tokens.datasets[index]), *known])


def _midpoints(fit: SigmoidFits) -> list[float]:
    """Return the times of the transitions of the one token in `fit`, ascending."""
    return sorted(np.exp(fit.transitions.midpoint_E).tolist())


def _facts(fit: SigmoidFits, time: str) -> str:
    """Return the parameters of the model of the one token in `fit`, in words."""
    token_class, unit = TokenClass(int(fit.class_N[0])), time_unit(time)
    if token_class is TokenClass.TWO_STEP:
        return "; ".join(
            f"{'fell' if drop > 0 else 'rose'} by {number(abs(drop), '.2f')} nats at "
            f"<b>{_significant(np.exp(midpoint))} {unit}</b> over {_decades(width)}"
            for drop, midpoint, width in zip(
                fit.transitions.drop_E,
                fit.transitions.midpoint_E,
                fit.transitions.width_E,
                strict=True,
            )
        )
    if token_class is TokenClass.GRADUAL:
        onset = float(np.exp(fit.onset_N[0]))
        return (
            f"from <b>{_significant(onset)} {unit}</b> on, {number(float(fit.slope_N[0]), '+.2f')} "
            "nats per unit of x"
        )
    if token_class in (TokenClass.FLAT_KNOWN, TokenClass.FLAT_UNLEARNED):
        return f"mean loss <b>{number(float(fit.level_N[0]), '.3f')} nats</b>"
    return _one_sigmoid(fit, token_class, unit)


def _one_sigmoid(fit: SigmoidFits, token_class: TokenClass, unit: str) -> str:
    tau = float(np.exp(fit.midpoint_N[0]))
    error = tau * float(fit.midpoint_se_N[0])
    few = int(fit.status_N[0]) == FitStatus.TOO_FEW_POINTS
    word, moved = ("forgotten", "rise") if token_class is TokenClass.RISING else ("learned", "drop")
    return (
        f"{word} at <b>{_within(tau, error)} {unit}</b>, width {_decades(fit.width_N[0])}"
        f"{' (fewer than two probes inside)' if few else ''}, {moved} "
        f"{number(abs(float(fit.drop_N[0])), '.2f')} nats, R² {number(float(fit.r2_N[0]))}"
    )


def _decades(width: float) -> str:
    return f"{number(float(width) * _TEN_NINETY_DECADES, '.2f')} decades"


def _significant(value: float) -> str:
    """Return a time with three digits, or with all digits before the point."""
    return number(float(value), ",.0f" if value >= 100 else ".3g")


def _within(value: float, error: float) -> str:
    """Return a time and its standard error, to the error's second digit."""
    if not (math.isfinite(error) and error > 0):
        return _significant(value)
    digits = min(max(1 - math.floor(math.log10(error)), 0), 3)
    return f"{number(value, f',.{digits}f')} ± {number(error, f',.{digits}f')}"


def trajectory(
    scale: TimeScale,
    time_K: Floats,
    loss_K: Floats,
    time_G: Floats,
    model_G: Floats,
    midpoints: list[float],
    alt: str,
) -> str:
    """Draw losses (points), model (line) and transition midpoints as an SVG styled by the page.

    Times are in the scale's unit. The y axis begins at 0 and ends at one nat, or above the token's
    highest loss.
    """
    keep = np.unique(np.linspace(0, len(time_K) - 1, min(len(time_K), _MAX_POINTS)).astype(int))
    finite = loss_K[np.isfinite(loss_K)]
    top = max(1.05 * float(finite.max()) if len(finite) else 1.0, 1.0)

    def across(time: Floats) -> Floats:
        share = np.log(scale.place(time) / scale.left) / np.log(scale.high / scale.left)
        return np.asarray(_LEFT + share * (_WIDTH - _LEFT - _RIGHT))

    def down(loss: Floats) -> Floats:
        return np.asarray(_TOP + (1 - loss / top) * (_HEIGHT - _TOP - _BOTTOM))

    points = "".join(
        f"M{x:.1f} {y:.1f}h0"
        for x, y in zip(across(time_K[keep]), down(loss_K[keep]), strict=True)
        if np.isfinite(y)
    )
    line = "L".join(
        f"{x:.1f} {y:.1f}"
        for x, y in zip(across(time_G), down(model_G), strict=True)
        if np.isfinite(y)
    )
    floor = _HEIGHT - _BOTTOM
    marks = "".join(f"M{x:.1f} {_TOP}V{floor}" for x in across(np.array(midpoints)))
    return "".join(
        [
            f'<svg class="drawn" role="img" aria-label="{escape(alt)}" '
            f'viewBox="0 0 {_WIDTH} {_HEIGHT}">',
            f'<path class="a" d="M{_LEFT} {_TOP}V{floor}H{_WIDTH - _RIGHT}"/>',
            _y_labels(top, down),
            _x_labels(scale, across),
            f'<path class="c" d="{marks}"/>' if marks else "",
            f'<path class="m" d="M{line}"/>' if line else "",
            f'<path class="p" d="{points}"/>',
            "</svg>",
        ]
    )


def _y_labels(top: float, down: Callable[[Floats], Floats]) -> str:
    """Label 0 and at most three multiples of 1, 2 or 5 times a power of ten."""
    power = 10.0 ** np.floor(np.log10(top / 3))
    step = next(m * power for m in (1, 2, 5, 10) if top < 4 * m * power)
    value = np.arange(0.0, top * (1 + 1e-9), step)
    return "".join(
        f'<text x="{_LEFT - 4}" y="{y + 3:.1f}" text-anchor="end">{v:g}</text>'
        for v, y in zip(value, down(value), strict=True)
    )


def _x_labels(scale: TimeScale, across: Callable[[Floats], Floats]) -> str:
    ticks = scale.ticks()
    return "".join(
        f'<text x="{x:.1f}" y="{_HEIGHT - 5}" text-anchor="middle">{label}</text>'
        for x, label in zip(across(np.array(list(ticks))), ticks.values(), strict=True)
    )
