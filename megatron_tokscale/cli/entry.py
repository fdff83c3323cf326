"""Entry of `megatron-tokscale VERB`: parse arguments, run the verb, map errors to exit codes."""

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Final

from megatron_tokscale import __version__
from megatron_tokscale.cli import (
    compare,
    demo,
    doctor,
    exchange,
    fit,
    forecast,
    laws,
    plan,
    probe,
    report,
    score,
    spectrum,
    trace,
    watch,
)
from megatron_tokscale.cli.bounds import check_numbers
from megatron_tokscale.cli.parsing import Parser, flush_stdout
from megatron_tokscale.core.errors import TokscaleError, exit_with_one_line, say
from megatron_tokscale.core.progress import mute, replace_unprintable

_SIGINT: Final = 130
_SIGPIPE: Final = 141
"""Exit codes that a shell gives to a program that a signal ended."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the verb that the command line names; bad input ends with one line and exit code 2."""
    with _end_in_order():
        _forget_rank_of_pod(sys.argv if argv is None else argv)
        arguments = make_parser().parse_args(argv)
        # scipy's L-BFGS-B calls BLAS on few numbers, where its threads only wait for one another.
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
        arguments.verb(arguments)


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of all verbs."""
    parser = Parser(
        prog="megatron-tokscale",
        description="Learning-time spectra for Megatron-LM: what is the model learning now, when "
        "will it learn the rest, and what should it be fed next?",
    )
    parser.add_argument(
        "--version",
        action="version",
        version=f"%(prog)s {__version__}",
        help="print the version and exit",
    )
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    for module in (
        *(probe, watch, fit, spectrum, laws, compare, forecast),
        *(score, plan, trace, report, exchange, demo, doctor),
    ):
        module.add_verb(verbs)
    check_numbers(parser)
    return parser


def _forget_rank_of_pod(argv: Sequence[str]) -> None:
    """Drop a LOCAL_RANK that a pod sets in every shell and no launcher gave to this process.

    Errors are printed by the first process of a node alone, so a stray rank would silence them.
    """
    is_launched = "TORCHELASTIC_RUN_ID" in os.environ or "--distributed" in argv
    if not (is_launched and os.environ.get("LOCAL_RANK", "").isdecimal()):
        os.environ.pop("LOCAL_RANK", None)


@contextmanager
def _end_in_order() -> Iterator[None]:
    """Print only what the terminal can show, and end with at most one line on stderr."""
    replace_unprintable()
    with exit_with_one_line():
        try:
            yield
            flush_stdout()
        except BrokenPipeError:
            mute(sys.stdout)
            raise SystemExit(_SIGPIPE) from None
        except KeyboardInterrupt:
            say("interrupted")
            raise SystemExit(_SIGINT) from None
        except OSError as error:
            reason = error.strerror or error
            raise TokscaleError(f"{error.filename or 'output'}: {reason}") from error
        except MemoryError as error:
            detail = f" ({error})" if str(error) else ""
            raise TokscaleError(f"out of memory{detail}; give the process more") from error
