"""The error that a user can act on, and how it ends a program: one line, exit code 2."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

EXIT_CODE = 2


class TokscaleError(Exception):
    """Bad input or an unsupported setting: the message says what, where, and what to do."""


class UndefinedError(Exception):
    """A number that the data do not define: too few probes, a loss that does not fall.

    Estimators raise it where their input is good and holds no answer. It is no `TokscaleError`: bad
    input ends a verb, an undefined number is written down with its reason.
    """


@contextmanager
def exit_with_one_line() -> Iterator[None]:
    """Turn a `TokscaleError` into one line on stderr and `SystemExit(2)`.

    An `UndefinedError` ends a program in the same way: the one number it was to find is undefined.

    In a distributed job the ranks of a node meet the same error: its first rank speaks for it.
    """
    try:
        yield
    except (TokscaleError, UndefinedError) as error:
        if int(os.environ.get("LOCAL_RANK", "0")) == 0:
            message = " ".join(str(error).split())
            print(f"megatron-tokscale: {message}", file=sys.stderr, flush=True)
        raise SystemExit(EXIT_CODE) from error
