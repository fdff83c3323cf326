"""Progress of long work: the protocol that analyses report to, and its form on stderr.

An analysis reports to a `Progress` and prints nothing itself. A verb passes `ProgressOnStderr`: a
bar on a terminal, plain lines in a log, nothing where stderr is closed.
"""

import codecs
import os
import sys
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Final, NoReturn, Protocol, TextIO

if TYPE_CHECKING:
    import tqdm as bars

_LINES: Final = 10
"""Lines that a meter prints in a log, one per tenth of the work: enough to see that it advances."""
_ASCII: Final = {"░": ".", "▒": ":", "▓": "+", "█": "#"}
"""ASCII characters for the shades of a plan's picture, for a terminal that cannot show them."""
_ERROR_HANDLER: Final = "megatron-tokscale"


class Meter(Protocol):
    """Receiver of the progress of one stage of the work."""

    def __call__(self, done: int, note: str = "") -> None:
        """Report that `done` units of the stage are done; `note` is shown beside the number."""


class Progress(Protocol):
    """Receiver of the progress of long work."""

    def stage(self, what: str) -> None:
        """Report that a stage without a count begins."""

    def meter(self, what: str, total: int, unit: str) -> Meter:
        """Begin a stage of `total` units and return the meter that the stage reports to."""


class NoProgress:
    """Progress that is discarded."""

    def stage(self, what: str) -> None:
        """Print nothing."""

    def meter(self, what: str, total: int, unit: str) -> Meter:
        """Return a meter that prints nothing."""
        return lambda done, note="": None


class ProgressOnStderr:
    """Progress that a person reads on a terminal or in a log."""

    def stage(self, what: str) -> None:
        """Print the name of a stage."""
        print_line(f"megatron-tokscale: {what}")

    def meter(self, what: str, total: int, unit: str) -> Meter:
        """Return a bar on a terminal, or a meter that prints ten lines in a log."""
        return _StderrMeter(what, total, unit)


class _StderrMeter:
    """Bar or lines on stderr for one stage of the work."""

    def __init__(self, what: str, total: int, unit: str):
        self._what, self._total, self._unit = what, total, unit
        self._started = time.monotonic()
        self._tenths_shown = 0
        self._bar: bars.tqdm[NoReturn] | None = None
        if _can_draw(sys.stderr):
            from tqdm import tqdm

            self._bar = tqdm(total=total, desc=what, unit=unit, unit_scale=True)

    def __call__(self, done: int, note: str = "") -> None:
        if self._bar is None:
            self._print(done, note)
            return
        with suppress(OSError):
            self._bar.set_postfix_str(note)
            self._bar.update(done - self._bar.n)
            if done >= self._total:
                self._bar.close()

    def _print(self, done: int, note: str) -> None:
        tenths = _LINES * done // max(self._total, 1)
        if tenths <= self._tenths_shown:
            return
        self._tenths_shown = tenths
        rate = done / max(time.monotonic() - self._started, 1e-9)
        seconds_left = (self._total - done) / max(rate, 1e-9)
        print_line(
            f"{self._what}: {done:,} of {self._total:,} {self._unit}, "
            f"{rate:,.1f} {self._unit}/s, {seconds_left:.0f} s left {note}".rstrip()
        )


def print_line(line: str) -> None:
    """Print a line on stderr; do nothing where nobody reads stderr."""
    if sys.stderr:  # a closed stream is None, which print would take for stdout
        try:
            print(line, file=sys.stderr, flush=True)
        except OSError:
            mute(sys.stderr)


def mute(stream: TextIO) -> None:
    """Redirect a stream to nowhere, so that the interpreter's last flush of it cannot fail."""
    with suppress(OSError, ValueError, AttributeError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def replace_unprintable() -> None:
    """Print an ASCII character, mostly "?", for each one that the terminal's encoding lacks."""
    codecs.register_error(_ERROR_HANDLER, _in_ascii)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors=_ERROR_HANDLER)


def _in_ascii(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lacking = error.object[error.start : error.end]
    return "".join(_ASCII.get(character, "?") for character in lacking), error.end


def _can_draw(stream: TextIO | None) -> bool:
    """Return whether a bar can be redrawn on a stream: on a terminal that has a width."""
    if stream is None or not stream.isatty() or os.environ.get("TERM") == "dumb":
        return False
    try:
        return os.get_terminal_size(stream.fileno()).columns > 0
    except (OSError, ValueError):
        return False
