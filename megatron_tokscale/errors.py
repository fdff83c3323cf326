"""The error that a user can act on, and how it ends a program: one line, exit code 2."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

EXIT_CODE = 2


class TokscaleError(Exception):
    """Bad input or an unsupported setting: the message says what, where, and what to do."""


@contextmanager
def exit_with_one_line() -> Iterator[None]:
    """Turn a `TokscaleError` into one line on stderr and `SystemExit(2)`.

    In a distributed job the ranks of a node meet the same error: its first rank speaks for it.
    """
    try:
        yield
    except TokscaleError as error:
        if int(os.environ.get("LOCAL_RANK", "0")) == 0:
            message = " ".join(str(error).split())
            print(f"megatron-tokscale: {message}", file=sys.stderr, flush=True)
        raise SystemExit(EXIT_CODE) from error
