"""The text around a token, safe to show: control characters are visible, no id fails to decode.

Shapes: B sequences, S sequence length, N watched tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, cast

import numpy as np

from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.probe import ProbeSet

BEFORE, AFTER = 24, 6  # tokens shown before and after: about a line of English; our choice
_CONTROL_PICTURES = 0x2400
_DELETE = 0x7F
_CONTROLS = {code: chr(_CONTROL_PICTURES + code) for code in range(32) if chr(code) not in "\n\t"}
_BREAKS = {
    ord("\r"): "\u240d",
    _DELETE: "\u2421",
    **dict.fromkeys(range(128, 160), "�"),
    **dict.fromkeys((*range(8234, 8239), *range(8294, 8298)), "�"),
}
_VISIBLE = _CONTROLS | _BREAKS
_MARKS = _VISIBLE | {ord("\n"): "↵", ord("\t"): "⇥"}


class Tokenizer(Protocol):
    """A tokenizer as the `tokenizers` library has it."""

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Return the text of the ids."""

    def id_to_token(self, id: int) -> str | None:
        """Return the vocabulary's piece of an id; None if it has none."""

    def get_vocab_size(self) -> int:
        """Return the number of ids."""


@dataclass(frozen=True)
class Passage:
    """The text of a token and the texts before and after it; plain text, not HTML."""

    before: str
    target: str
    after: str


def read_tokenizer(path: Path) -> Tokenizer:
    """Read a tokenizer.json.

    Raises:
        TokscaleError: the file cannot be read.
    """
    import tokenizers

    try:
        return cast("Tokenizer", tokenizers.Tokenizer.from_file(str(path)))
    except Exception as error:  # the library raises nothing narrower
        raise TokscaleError(
            f"cannot read tokenizer {path} ({error}); give a tokenizer.json of the `tokenizers` "
            "library, or none to show ids"
        ) from error


def load_tokenizer(path: Path, probe_set: ProbeSet) -> Tokenizer:
    """Read a tokenizer.json whose vocabulary has every id of the probe set.

    Raises:
        TokscaleError: the file cannot be read, or has too small a vocabulary.
    """
    tokenizer = read_tokenizer(path)
    highest = int(max(probe_set.tokens_BS.max(), probe_set.labels_BS.max()))
    if highest >= tokenizer.get_vocab_size():
        raise TokscaleError(
            f"tokenizer {path} has {tokenizer.get_vocab_size()} tokens, the probe set has id "
            f"{highest}; give the tokenizer of the run's data"
        )
    return tokenizer


def passages(
    probe_set: ProbeSet, tokens: Sequence[int], tokenizer: Tokenizer | None
) -> list[Passage]:
    """Return each watched token with at most `BEFORE` tokens before it and `AFTER` after it.

    The tokens before come from the token's sequence; the tokens after end at the first unwatched
    one.
    """
    row_N, column_N = np.nonzero(probe_set.mask_BS)
    found = []
    for token in tokens:
        row, column = int(row_N[token]), int(column_N[token])
        before = probe_set.tokens_BS[row, max(column + 1 - BEFORE, 0) : column + 1]
        after = probe_set.labels_BS[row, column + 1 : column + 1 + AFTER]
        watched = probe_set.mask_BS[row, column + 1 : column + 1 + AFTER]
        after = after[np.logical_and.accumulate(watched)]
        target = int(probe_set.labels_BS[row, column])
        found.append(_passage(tokenizer, before.tolist(), target, after.tolist()))
    return found


def _passage(
    tokenizer: Tokenizer | None, before: list[int], target: int, after: list[int]
) -> Passage:
    """Return the text of all ids, cut where the target's begins and ends.

    A token of a byte-level vocabulary may be part of a character and has no text alone. So three
    sequences are decoded: the ids before, those with the target, and all. Each cut is the end of
    the text that two of the sequences share.
    """
    if tokenizer is None:
        return Passage(
            " ".join(map(str, before)) + " ", str(target), " " + " ".join(map(str, after))
        )
    left, until, whole = (
        tokenizer.decode(ids, skip_special_tokens=False)
        for ids in (before, [*before, target], [*before, target, *after])
    )
    start = _shared(left, until)
    stop = _shared(until, whole)
    shown = until[start:] or tokenizer.id_to_token(target) or str(target)
    return Passage(
        left[:start].translate(_VISIBLE), marked(shown), whole[stop:].translate(_VISIBLE)
    )


def _shared(a: str, b: str) -> int:
    """Return the length of the common beginning of two texts."""
    return next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )


def marked(text: str) -> str:
    """Return the text with signs for line breaks and tabs, and for blanks if it has only blanks."""
    text = text.translate(_MARKS)
    return text if text.strip(" ") else text.replace(" ", "␣")
