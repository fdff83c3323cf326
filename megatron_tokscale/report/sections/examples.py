"""Example tokens, chosen by a stated rule, each in its context with its losses and its model.

Shapes: N tokens, K probe steps, G grid points.
"""

import math
from typing import Any

import numpy as np

from megatron_tokscale.core.arrays import Integers, Mask
from megatron_tokscale.fit import FitStatus, SigmoidFits, TokenClass
from megatron_tokscale.probe.text import BEFORE, Passage, passages
from megatron_tokscale.report.analysis import Analysis
from megatron_tokscale.report.markup import dataset, escape, number, paragraph, section
from megatron_tokscale.report.scale import UNITS, TimeScale, time_of
from megatron_tokscale.report.sections.classes import CLASS_MEANINGS
from megatron_tokscale.report.sections.trajectory import trajectory

MIN_R2 = 0.8
MAX_MIDPOINT_SE = 0.25
_MODEL_POINTS = 80
_TEN_NINETY_DECADES = 2 * math.log(9) / math.log(10)


def examples(analysis: Analysis, tokenizer: Any, n_tokens: int, seed: int) -> str:
    """The section with the example tokens."""
    chosen = choose(analysis.fits, n_tokens, seed)
    parts = []
    for token_class, tokens in chosen.items():
        if len(tokens):
            title = f"{token_class.label}: {CLASS_MEANINGS[token_class]}"
            parts.append(f"<h3>{escape(title)}</h3>")
            parts += _cards(analysis, tokens, tokenizer)
    unit = UNITS[analysis.time]
    return section(
        "tokens",
        "Example tokens",
        paragraph(
            "The marked token is predicted from the text before it "
            f"(the last {BEFORE} tokens are shown). Points: its loss in nats at each probe, "
            f"against {unit} (log scale). Line: the model of its class; dotted: its learning time."
        ),
        paragraph(
            "How they were chosen: among falling tokens whose fit is well determined "
            f"(R² at least {MIN_R2:g}, learning time known to {MAX_MIDPOINT_SE:.0%} or better), "
            "one at random from each of as many groups of equal size along the learning time; of "
            f"every other class a few at random. Seed {seed}.",
            "soft",
        ),
        *parts,
    )


def choose(fits: SigmoidFits, n_tokens: int, seed: int) -> dict[TokenClass, Integers]:
    """At most `n_tokens` tokens: a twelfth of them of each class but falling, the rest falling."""
    chosen: dict[TokenClass, Integers] = {TokenClass.FALLING: np.zeros(0, np.int64)}
    for token_class in CLASS_MEANINGS:
        if token_class not in (TokenClass.FALLING, TokenClass.UNFITTED):
            of_class = np.flatnonzero(fits.is_class(token_class))
            generator = np.random.default_rng([seed, int(token_class)])
            count = min(n_tokens // 12, len(of_class))
            chosen[token_class] = np.sort(generator.choice(of_class, count, replace=False))
    left = n_tokens - sum(len(tokens) for tokens in chosen.values())
    chosen[TokenClass.FALLING] = _spread_over_learning_times(fits, left, seed)
    return chosen


def well_determined(fits: SigmoidFits) -> Mask:
    """Falling tokens with a good fit and a midpoint that is known well."""
    return np.asarray(
        fits.is_class(TokenClass.FALLING)
        & fits.trusted_N
        & (fits.r2_N >= MIN_R2)
        & (fits.midpoint_se_N <= MAX_MIDPOINT_SE)
    )


def _spread_over_learning_times(fits: SigmoidFits, count: int, seed: int) -> Integers:
    if count < 1:
        return np.zeros(0, np.int64)
    candidates = np.flatnonzero(well_determined(fits))
    order = candidates[np.argsort(fits.midpoint_N[candidates], kind="stable")]
    generator = np.random.default_rng([seed, int(TokenClass.FALLING)])
    groups = np.array_split(order, max(min(count, len(order)), 1))
    return np.array([generator.choice(group) for group in groups if len(group)], dtype=np.int64)


def _cards(analysis: Analysis, tokens: Integers, tokenizer: Any) -> list[str]:
    run, fits = analysis.run, analysis.fits.rows(tokens)
    time_K = time_of(fits.x_K)
    scale = TimeScale.from_times(time_K)
    time_G = np.geomspace(scale.low, scale.high, _MODEL_POINTS)
    model_NG = fits.predict(np.log(time_G))
    texts = passages(run.probe_set, tokens.tolist(), tokenizer)
    cards = []
    for i, (token, text) in enumerate(zip(tokens.tolist(), texts, strict=True)):
        fit = fits.rows(slice(i, i + 1))
        loss_K = run.read_losses(token, token + 1)[0].astype(np.float64)
        midpoints = [time for time in _midpoints(fit) if scale.low <= time <= scale.high]
        alt = f"Loss of this token from {loss_K[0]:.2f} nats at the first probe to {loss_K[-1]:.2f}"
        svg = trajectory(scale, time_K, loss_K, time_G, model_NG[i], midpoints, alt)
        cards.append(_card(text, _where(analysis, token), _facts(fit, analysis.time), svg))
    return cards


def _card(text: Passage, where: str, facts: str, svg: str) -> str:
    shown = (
        f"<span>{escape(text.before)}</span><mark>{escape(text.target)}</mark>"
        f"<span>{escape(text.after)}</span>"
    )
    return (
        f'<div class="token"><div><p class="text" dir="auto">{shown}</p>'
        f'<p class="facts">{where}<br>{facts}</p></div>\n{svg}</div>'
    )


def _where(analysis: Analysis, token: int) -> str:
    tokens = analysis.run.probe_set
    index = int(tokens.dataset_N[token])
    return (
        f"{dataset(index, tokens.datasets[index])}, document {int(tokens.document_N[token])}, "
        f"position {int(tokens.position_N[token])}, id {int(tokens.label_N[token])}"
    )


def _midpoints(fit: SigmoidFits) -> list[float]:
    """Times of the transitions of the one token in `fit`."""
    return sorted(np.exp(fit.transitions.midpoint_E).tolist())


def _facts(fit: SigmoidFits, time: str) -> str:
    """What the model of its class says of the one token in `fit`."""
    token_class, unit = TokenClass(int(fit.class_N[0])), UNITS[time]
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
    """A time with three digits, or all whole ones."""
    return number(float(value), ",.0f" if value >= 100 else ".3g")


def _within(value: float, error: float) -> str:
    """A time and its standard error, to the error's second digit."""
    if not (math.isfinite(error) and error > 0):
        return _significant(value)
    digits = min(max(1 - math.floor(math.log10(error)), 0), 3)
    return f"{number(value, f',.{digits}f')} ± {number(error, f',.{digits}f')}"
