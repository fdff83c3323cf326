"""A run that is being watched, in words for a terminal; texts and names are shown escaped."""

import math
from dataclasses import dataclass
from typing import Final

import numpy as np

from megatron_tokscale.core.words import aligned, counted, time_text
from megatron_tokscale.probe.probe_set_text import printable
from megatron_tokscale.probe.text import Passage, Tokenizer, marked, passages
from megatron_tokscale.store.progress import GroupProgress, most_fallen
from megatron_tokscale.store.token_state import STATE_ORDER, TokenState
from megatron_tokscale.store.watching import RunView

SHOWN_STATES: Final = tuple(each for each in STATE_ORDER if each is not TokenState.UNMOVED)
"""The states that losses tell without a fit: a token that has not moved may be to come."""
N_FALLEN: Final = 12  # tokens that fell most that are shown; our choice
_CANDIDATES: Final = 64 * N_FALLEN  # tokens that fell most, of which one per document is shown
_BEFORE, _AFTER = 48, 14  # characters of text before and after a token: a line of 100 in all
_NONE: Final = "–"
_UNITS: Final = ((86_400, "d"), (3600, "h"), (60, "min"), (1, "s"))


@dataclass(frozen=True)
class FallenToken:
    """A token that fell far since an octave ago.

    Attributes:
        dataset: its dataset, as an index.
        before: its level an octave ago, in nats.
        now: its level now.
        passage: the token in its context.
    """

    dataset: int
    before: float
    now: float
    passage: Passage


def fallen_tokens(view: RunView, tokenizer: Tokenizer | None) -> list[FallenToken]:
    """Return the tokens that fell most since an octave ago, at most one of each document."""
    progress, tokens = view.progress, view.tokens
    if progress is None:
        return []
    candidates = most_fallen(progress, _CANDIDATES)
    _, first = np.unique(tokens.cluster_N[candidates], return_index=True)
    chosen = candidates[np.sort(first)][:N_FALLEN].tolist()
    texts = (
        passages(tokens.probe_set, chosen, tokenizer)
        if tokens.probe_set
        else [Passage("", f"token {token}", "") for token in chosen]
    )
    return [
        FallenToken(
            int(tokens.dataset_N[token]),
            float(progress.level_N[token] + progress.fall_N[token]),
            float(progress.level_N[token]),
            text,
        )
        for token, text in zip(chosen, texts, strict=True)
    ]


def describe_view(view: RunView, fallen: list[FallenToken], now: float) -> str:
    """Return a run's progress in words.

    Args:
        view: the run.
        fallen: the tokens to show in context.
        now: Unix time in seconds.
    """
    lines = [f"{printable(view.paths.root)}: {where(view, now)}"]
    lines += [f"  {sentence}" for sentence in notes(view)]
    if view.progress is not None:
        lines += [f"  {since(view)}", "", *_table(view)]
    if fallen:
        octave_ago = time_text(view.progress.octave_ago) if view.progress else ""
        lines += ["", f"fell most since {view.unit} {octave_ago}, at most one of a document:"]
        lines += [_fallen(view, each) for each in fallen]
    return "\n".join([*lines, "", cost(view)]) + "\n"


def where(view: RunView, now: float) -> str:
    """Return how far the run is: its last probe, and how long ago that was taken."""
    if not view.records:
        return "no probe yet"
    record, launches = view.records[-1], view.info.launches
    planned = launches[-1].batch.train_iters if launches else None
    text = f"{view.unit} {time_text(view.time_of(record.step))}"
    text += f" of {planned:,}" if planned else ""
    text += f", {counted(len(view.records), 'probe')}"
    is_timed = record.wall_time > 0  # the time of imported losses is not known
    return text + (f", the last {duration(max(now - record.wall_time, 0))} ago" if is_timed else "")


def since(view: RunView) -> str:
    """Return the fall of the mean loss since an octave ago."""
    progress, overall = view.progress, view.groups[0]
    assert progress is not None
    text = (
        f"since {view.unit} {time_text(progress.octave_ago)}, an octave ago, the mean loss "
        f"{'fell' if overall.fall >= 0 else 'rose'} by {abs(overall.fall):.3f} nats"
    )
    if math.isfinite(overall.fall_share):
        text += f", {overall.fall_share:.1%} of its fall since {view.unit} "
        text += time_text(progress.start)
    return text


def notes(view: RunView) -> list[str]:
    """Return sentences on what is not as a reader would expect."""
    found = [f"left out: {printable(reason)}" for reason in view.unreadable.values()]
    if view.n_abandoned:
        files = counted(view.n_abandoned, "probe")
        found.append(f"{files} of branches that the run has left are not counted")
    if not view.records:
        return found
    progress, last = view.progress, view.time_of(view.records[-1].step)
    if progress is None:
        found.append("what fell is told once there is a probe at or before half the time")
        return found
    if progress.time != last:
        found.append(
            f"the probes after {view.unit} {time_text(progress.time)} have no finite loss and are "
            "left out"
        )
    if lost := _n_lost(view):
        found.append(
            f"{lost:,} of {counted(view.tokens.n_tokens, 'token')} "
            f"{'has' if lost == 1 else 'have'} losses that are NaN or infinite: the numbers that "
            "need these losses leave the tokens out"
        )
    if progress.start > 0:
        found.append(
            f"the first probe is at {view.unit} {time_text(progress.start)}: falls since the start "
            "are falls since then"
        )
    if not view.groups[0].share:
        found.append("the states of tokens are told once their noise is known, after some probes")
    return found


def _n_lost(view: RunView) -> int:
    """Return the number of tokens with a NaN or an infinite loss at a probe that the table needs.

    Once the states of the others are known, such a token's state is unknown.
    """
    assert view.progress is not None
    start_N, before_N, loss_N = view.progress.start_N, view.progress.before_N, view.progress.loss_N
    lost_N = ~(np.isfinite(start_N) & np.isfinite(before_N) & np.isfinite(loss_N))
    if view.groups[0].share:
        lost_N |= view.progress.state_N == TokenState.UNKNOWN
    return int(np.count_nonzero(lost_N))


def cost(view: RunView) -> str:
    """Return what the probes on disk have cost, in time."""
    records = [record for record in view.records if record.wall_time > 0]
    if not records:
        return "cost of the probes: not known"
    text = (
        f"{counted(len(records), 'probe')} took {duration(view.probe_seconds)}, the last "
        f"{duration(records[-1].duration)}"
    )
    elapsed = records[-1].wall_time - records[0].wall_time
    later = sum(record.duration for record in records[1:])
    share = f", {later / elapsed:.2%} of the time from the first to the last" if elapsed > 0 else ""
    return text + share


def duration(seconds: float) -> str:
    """Return a duration in its largest unit: "3.2 min", "45 s", "0.31 s"."""
    size, unit = next((each for each in _UNITS if seconds >= each[0]), _UNITS[-1])
    return f"{seconds / size:.2g} {unit}" if seconds < 10 * size else f"{seconds / size:.0f} {unit}"


def _table(view: RunView) -> list[str]:
    header = ["dataset", "tokens", "loss", "fell", "of its fall"]
    header += [state.label for state in SHOWN_STATES]
    names = ["all", *map(printable, view.tokens.datasets)]
    is_one = len(view.tokens.datasets) == 1
    groups = view.groups[: 1 if is_one else None]
    rows = [_row(name, group) for name, group in zip(names, groups, strict=False)]
    return aligned([header, *rows])


def _row(name: str, group: GroupProgress) -> list[str]:
    return [
        name,
        f"{group.n_tokens:,}",
        *(_number(value, ".3f") for value in (group.loss, group.fall)),
        _number(group.fall_share, ".1%"),
        *(_number(group.share.get(state, math.nan), ".1%") for state in SHOWN_STATES),
    ]


def _number(value: float, pattern: str) -> str:
    return f"{value:{pattern}}" if math.isfinite(value) else _NONE


def _fallen(view: RunView, token: FallenToken) -> str:
    name = printable(view.tokens.datasets[token.dataset])
    before, after = marked(token.passage.before), marked(token.passage.after)
    text = f"{before[-_BEFORE:]}[{token.passage.target}]{after[:_AFTER]}"
    return f"  {token.before:6.2f} to {token.now:5.2f}  {name}  {text}"
