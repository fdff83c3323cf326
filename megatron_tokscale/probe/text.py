"""The text around a token, made safe to show: control characters are visible, ids never fail.

Shapes: B sequences, S sequence length, N watched tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.probe import ProbeSet

BEFORE, AFTER = 24, 6
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


@dataclass(frozen=True)
class Passage:
    """A token's text and what stands before and after it; plain text, not HTML."""

    before: str
    target: str
    after: str


def read_tokenizer(path: Path) -> Any:
    """Read a tokenizer.json.

    Raises:
        TokscaleError: the file cannot be read.
    """
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise TokscaleError(
            f"cannot read tokenizer {path} ({error}); give a tokenizer.json of the `tokenizers` "
            "library, or none to show ids"
        ) from error


def load_tokenizer(path: Path, probe_set: ProbeSet) -> Any:
    """Read a tokenizer.json that knows every id of the probe set.

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


def passages(probe_set: ProbeSet, tokens: Sequence[int], tokenizer: Any) -> list[Passage]:
    """The context of each watched token, at most `BEFORE` tokens before it and `AFTER` after.

    The tokens before are those of its sequence, the tokens after end where the watched ones do.
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


def _passage(tokenizer: Any, before: list[int], target: int, after: list[int]) -> Passage:
    """Cut the text of all ids where the target's begins and ends.

    A piece of a byte-level vocabulary may hold a part of a character: decoded alone it is nothing,
    so growing prefixes are decoded and what they share is what is settled.
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
    """How many characters both begin with."""
    return next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )


def marked(text: str) -> str:
    """Text with line breaks and tabs as signs, and blanks too if there is nothing else."""
    text = text.translate(_MARKS)
    return text if text.strip(" ") else text.replace(" ", "␣")
