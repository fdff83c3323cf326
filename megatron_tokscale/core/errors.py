"""The error that a user can act on, and how it ends a program: one line, exit code 2."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from megatron_tokscale.core.progress import print_line

EXIT_CODE = 2  # as argparse's: the command line or its input is wrong


class TokscaleError(Exception):
    """Error of bad input or an unsupported setting; the message says what to do about it."""


class AgreedError(TokscaleError):
    """Error that all ranks of a job raise together, so that one of them prints it for all."""


class UndefinedError(Exception):
    """Error of a number that the data do not define: too few probes, a loss that does not fall.

    Estimators raise it where their input is valid but does not determine the number. It is not a
    `TokscaleError`: bad input ends a verb, while an undefined number is written down with its
    reason.
    """


def leads_node() -> bool:
    """Return whether this is the first process of its node, or the only one."""
    return os.environ.get("LOCAL_RANK", "0") in ("", "0")


@contextmanager
def exit_with_one_line(
    speaks: Callable[[], bool] = leads_node, meet: Callable[[], None] | None = None
) -> Iterator[None]:
    """Turn a `TokscaleError` into one line on stderr and `SystemExit(2)`.

    The first process of each node prints an error that all ranks meet: an `AgreedError`, or one
    that is raised before the ranks are connected. An `UndefinedError` ends a program in the same
    way: the one number that the program was to find is undefined.

    Args:
        speaks: returns whether this process prints an error that it may have met alone.
        meet: waits for the other ranks after an `AgreedError`, when this process has printed it or
            need not. A launcher kills the ranks of a node as soon as one has ended, so no rank may
            end before the first of its node has printed the line.
    """
    try:
        yield
    except (TokscaleError, UndefinedError) as error:
        is_agreed = isinstance(error, AgreedError)
        if leads_node() if is_agreed else speaks():
            say(str(error))
        if is_agreed and meet is not None:
            meet()
        raise SystemExit(EXIT_CODE) from error


def say(message: str) -> None:
    """Print a message as one line on stderr."""
    print_line(f"megatron-tokscale: {' '.join(message.split())}")
