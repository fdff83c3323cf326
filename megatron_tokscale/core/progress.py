"""Progress and messages of a running command: a bar on a terminal, plain lines in a log."""

import codecs
import os
import sys
import time
from contextlib import suppress
from typing import TYPE_CHECKING, NoReturn, TextIO

if TYPE_CHECKING:
    import tqdm as bars

_LINES = 10  # lines in a log for a whole task: enough to see it go on, too few to fill the log
_ASCII = {"░": ".", "▒": ":", "▓": "+", "█": "#"}
"""Characters for the shades of a plan's picture on a terminal that cannot show them."""
_ERRORS = "megatron-tokscale"  # name of the error handler that prints them


class Progress:
    """Reports progress on stderr: a bar on a terminal, a line for every tenth elsewhere."""

    def __init__(self, what: str, total: int, unit: str):
        self._what, self._total, self._unit = what, total, unit
        self._started = time.monotonic()
        self._shown = 0
        self._bar: bars.tqdm[NoReturn] | None = None
        if _can_draw(sys.stderr):
            from tqdm import tqdm

            self._bar = tqdm(total=total, desc=what, unit=unit, unit_scale=True)

    def __call__(self, done: int, total: int | None = None, note: str = "") -> None:
        """Report that `done` of the total are done, with `note` behind the number."""
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
    """Print a line on stderr; ignore a stderr that is closed or that nobody reads any more."""
    if sys.stderr:  # a closed one is None, which print would take for stdout
        try:
            print(line, file=sys.stderr, flush=True)
        except OSError:
            mute(sys.stderr)


def mute(stream: TextIO) -> None:
    """Redirect a stream to the null device, so that the interpreter's end does not fail on it."""
    with suppress(OSError, ValueError, AttributeError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def print_what_can_be() -> None:
    """Set stdout and stderr to print an ASCII character for one that their encoding lacks."""
    codecs.register_error(_ERRORS, _in_ascii)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors=_ERRORS)


def _in_ascii(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lacking = error.object[error.start : error.end]
    return "".join(_ASCII.get(character, "?") for character in lacking), error.end


def _can_draw(stream: TextIO | None) -> bool:
    """Return whether the stream is a terminal on which a bar can be redrawn in place."""
    if stream is None or not stream.isatty() or os.environ.get("TERM") == "dumb":
        return False
    try:
        return os.get_terminal_size(stream.fileno()).columns > 0
    except (OSError, ValueError):
        return False
