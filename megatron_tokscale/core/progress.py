"""Messages while work goes on: a bar on a terminal, plain lines in a log."""

import codecs
import os
import sys
import time
from contextlib import suppress
from typing import Any

_LINES = 10
_ASCII = {"░": ".", "▒": ":", "▓": "+", "█": "#"}
"""Shades of a plan's picture, which stay apart on a terminal that cannot show them."""
_ERRORS = "megatron-tokscale"


class Progress:
    """Reports how much of `total` is done, on stderr; where nobody can read it, nothing."""

    def __init__(self, what: str, total: int, unit: str):
        self._what, self._total, self._unit = what, total, unit
        self._started = time.monotonic()
        self._shown = 0
        self._bar: Any = None
        if _can_draw(sys.stderr):
            from tqdm import tqdm

            self._bar = tqdm(total=total, desc=what, unit=unit, unit_scale=True)

    def __call__(self, done: int, total: int | None = None, note: str = "") -> None:
        """Report that `done` of the total are done; `note` is shown behind it."""
        if self._bar is not None:
            with suppress(OSError):
                self._bar.set_postfix_str(note)
                self._bar.update(done - self._bar.n)
                if done >= self._total:
                    self._bar.close()
            return
        tenth = _LINES * done // max(self._total, 1)
        if tenth > self._shown:
            self._shown = tenth
            rate = done / max(time.monotonic() - self._started, 1e-9)
            left = (self._total - done) / max(rate, 1e-9)
            print_line(
                f"{self._what}: {done:,} of {self._total:,} {self._unit}, "
                f"{rate:,.1f} {self._unit}/s, {left:.0f} s left {note}".rstrip()
            )


def print_line(line: str) -> None:
    """Print a line on stderr; work does not end because nobody listens there any more."""
    if sys.stderr:  # a closed one is None, which print would take for stdout
        try:
            print(line, file=sys.stderr, flush=True)
        except OSError:
            mute(sys.stderr)


def mute(stream: Any) -> None:
    """Send what is left to be printed nowhere, so that the interpreter's end does not try again."""
    with suppress(OSError, ValueError, AttributeError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def print_what_can_be() -> None:
    """Print an ASCII character, most often "?", for one that the terminal's encoding lacks."""
    codecs.register_error(_ERRORS, _in_ascii)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors=_ERRORS)


def _in_ascii(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lacking = error.object[error.start : error.end]
    return "".join(_ASCII.get(character, "?") for character in lacking), error.end


def _can_draw(stream: Any) -> bool:
    """Return whether a bar can be drawn over: not in a log, nor without a width."""
    if stream is None or not stream.isatty() or os.environ.get("TERM") == "dumb":
        return False
    try:
        return os.get_terminal_size(stream.fileno()).columns > 0
    except (OSError, ValueError):
        return False
