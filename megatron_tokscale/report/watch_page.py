"""The page of a run that is being watched: it is written again and again, and reloads itself."""

import math
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from megatron_tokscale.core.files import write_text
from megatron_tokscale.core.words import time_text
from megatron_tokscale.report.html import (
    STATE_COLOURS,
    STATE_WORDS,
    dataset,
    escape,
    number,
    paragraph,
    passage,
    plural,
    section,
    swatch,
    table,
    whole_page,
)
from megatron_tokscale.store.progress import BEYOND, LEAST_FALL, GroupProgress
from megatron_tokscale.store.token_state import BEGUN, TokenState
from megatron_tokscale.store.watch_text import (
    SHOWN_STATES,
    FallenToken,
    cost,
    notes,
    since,
    where,
)
from megatron_tokscale.store.watching import RunView

WATCH_TITLE: Final = "What it is learning now"
"""Title of every page of this kind; `watch --page` knows an earlier one by it."""


def write_watch_page(
    view: RunView, fallen: list[FallenToken], path: Path, now: float, refresh: float | None
) -> None:
    """Write the page, whole or not at all.

    Args:
        view: the run.
        fallen: the tokens to show in context.
        path: the file.
        now: Unix time in seconds.
        refresh: seconds after which a browser loads the page again; None for never.

    Raises:
        OSError: the page cannot be written.
    """
    write_text(path, render_view(view, fallen, now, refresh))


def render_view(
    view: RunView, fallen: list[FallenToken], now: float, refresh: float | None = None
) -> str:
    """Return the page as HTML; arguments as of `write_watch_page`."""
    return whole_page(
        f"{WATCH_TITLE}: {view.paths.root.absolute().name}",
        '<div class="top">',
        *(paragraph(escape(note), "warning") for note in notes(view)),
        section("now", "Learned, under way, to come", *_now(view, now)),
        section("fell", "Tokens that fell most", *_fell(view, fallen)),
        section("cost", "What the probes cost", paragraph(f"{escape(cost(view))}.")),
        "</div>",
        refresh=refresh,
    )


def _now(view: RunView, now: float) -> list[str]:
    """Return how far the run is, what fell, and the table of datasets."""
    written = datetime.fromtimestamp(now, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    found = [paragraph(f"{_sentence(where(view, now))}, as of {written}.", "soft")]
    progress = view.progress
    if progress is None:
        return found
    overall = view.groups[0]
    found.append(paragraph(f"{_sentence(since(view))}.{_shares(overall)}", "lead"))
    is_one = len(view.tokens.datasets) == 1
    names = ["all", *(dataset(d, name) for d, name in enumerate(view.tokens.datasets))]
    groups = view.groups[: 1 if is_one else None]
    header = ["tokens of", "tokens", "loss", "fell", "share"]
    header += [_named(state) for state in SHOWN_STATES]
    start = f"{escape(view.unit)} {time_text(progress.start)}"
    ago = f"{escape(view.unit)} {time_text(progress.octave_ago)}"
    found += [_stack(name, group) for name, group in zip(names, groups, strict=False)]
    rows = [_row(name, group) for name, group in zip(names, groups, strict=False)]
    caption = f"Loss, and its fall since {ago}, in nats per token; shares of tokens by their state."
    definitions = (
        f"Share: of the fall since {start}. Under way: at least {BEGUN:.0%} of a token's fall "
        f"since {start} has happened since {ago}. Learned: at least {1 - BEGUN:.0%} had happened "
        "by then. To come: not fallen. Known: not fallen, and its probability is above 1/2. "
        f"Forgotten: risen by {BEGUN:.0%} of its fall or more. A fall or rise counts from "
        f"{LEAST_FALL:g} nats and {BEYOND:g} standard errors on."
    )
    found += [table(caption, header, rows, "dense"), paragraph(definitions, "soft")]
    return found


def _shares(overall: GroupProgress) -> str:
    """Return a sentence on the shares of all tokens in the states; nothing if none is known."""
    if not overall.share:
        return ""
    _, learned, under_way, to_come, forgotten = (
        f"<b>{number(overall.share[state], '.1%')}</b>" for state in SHOWN_STATES
    )
    return (
        f" {learned} of the tokens are learned, {under_way} under way, {to_come} to come and "
        f"{forgotten} forgotten."
    )


def _sentence(text: str) -> str:
    """Return a text as HTML with a capital letter at its start."""
    return escape(text[0].upper() + text[1:])


def _named(state: TokenState) -> str:
    return swatch(STATE_COLOURS[state], state.label)


def _row(name: str, group: GroupProgress) -> list[str]:
    return [
        name,
        number(group.n_tokens, ","),
        number(group.loss),
        number(group.fall),
        number(group.fall_share, ".1%"),
        *(number(group.share.get(state, math.nan), ".1%") for state in SHOWN_STATES),
    ]


def _stack(name: str, group: GroupProgress) -> str:
    """Draw the shares of a group's tokens in the states as one bar below its name."""
    if not group.share:
        return ""
    left, parts = 0.0, []
    for state in SHOWN_STATES:
        width = 100 * group.share[state]
        colour, words = STATE_COLOURS[state], STATE_WORDS[state]
        parts.append(
            f'<rect x="{left:.2f}" y="0" width="{width:.2f}" height="4" fill="{colour}">'
            f"<title>{words}: {width:.1f}%</title></rect>"
        )
        left += width
    shares = ", ".join(f"{STATE_WORDS[state]} {group.share[state]:.1%}" for state in SHOWN_STATES)
    return (
        f'<p class="facts">{name}</p><svg class="stack" role="img" aria-label="{escape(shares)}" '
        f'viewBox="0 0 100 4" preserveAspectRatio="none">{"".join(parts)}</svg>'
    )


def _fell(view: RunView, fallen: list[FallenToken]) -> list[str]:
    """Return a card per token that fell far."""
    if not fallen or view.progress is None:
        return [paragraph("No token has fallen beyond its noise yet.")]
    ago = f"{escape(view.unit)} {time_text(view.progress.octave_ago)}"
    cards = "".join(_card(view, each) for each in fallen)
    return [
        paragraph(
            f"The {plural(len(fallen), 'token')} that fell most since {ago}, at most one of each "
            "document. The network predicts the marked token from the text before it.",
            "soft",
        ),
        f'<div class="cards">{cards}</div>',
    ]


def _card(view: RunView, token: FallenToken) -> str:
    text, names = token.passage, view.tokens.datasets
    return (
        f'<div class="card">{passage(text.before, text.target, text.after)}'
        f'<p class="facts">{dataset(token.dataset, names[token.dataset])}, from '
        f"{number(token.before, ',.2f')} to <b>{number(token.now, ',.2f')} nats</b></p></div>"
    )
