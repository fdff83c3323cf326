"""Progress of a long computation: a bar on a terminal, plain lines in a log."""

import sys
import time
from typing import Any

_LINES = 10


class Progress:
    """Reports how much of `total` is done, on stderr."""

    def __init__(self, what: str, total: int, unit: str):
        self._what, self._total, self._unit = what, total, unit
        self._started = time.monotonic()
        self._shown = 0
        self._bar: Any = None
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total, desc=what, unit=unit, unit_scale=True)

    def __call__(self, done: int, total: int | None = None, note: str = "") -> None:
        """Report that `done` of the total are done; `note` is shown behind it."""
        if self._bar is not None:
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
            print(
                f"{self._what}: {done:,} of {self._total:,} {self._unit}, "
                f"{rate:,.1f} {self._unit}/s, {left:.0f} s left {note}".rstrip(),
                file=sys.stderr,
                flush=True,
            )
