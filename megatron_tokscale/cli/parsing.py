"""Parser, help and groups of options that the verbs share.

Imports stay cheap: whatever needs numpy or torch is imported by the function that uses it.
"""

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from megatron_tokscale.core.errors import TokscaleError, say
from megatron_tokscale.core.progress import mute
from megatron_tokscale.core.seed import DEFAULT_SEED

if TYPE_CHECKING:
    from megatron_tokscale.store import Run

Arguments = argparse.Namespace
type Verbs = argparse._SubParsersAction[Parser]


class HelpWithDefaults(argparse.HelpFormatter):
    """Help that marks each option as required or shows its default.

    The text of an option without a default says what happens if the option is absent.
    """

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        if not action.option_strings:
            return text
        if action.required:
            return f"{text} (required)"
        is_value = isinstance(action.default, str | int | float | Path)
        is_switch = isinstance(action.default, bool) or action.nargs == 0
        if not is_value or is_switch or "default:" in text:
            return text
        return f"{text} (default: %(default)s)"


class Parser(argparse.ArgumentParser):
    """Parser whose errors are one line, as all errors are, and whose help shows defaults."""

    def _get_formatter(self) -> argparse.HelpFormatter:
        return HelpWithDefaults(self.prog)

    def error(self, message: str) -> NoReturn:
        """Raise a `TokscaleError` that names the verb whose help to read."""
        raise TokscaleError(f"{message}; see `{self.prog} --help`")

    # Loose types: argparse declares three overloads of this method.
    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse, and refuse unknown flags here, where the verb is known, not in the root."""
        namespace, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return namespace, unknown

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        """Exit after --help or --version; flush their output first."""
        flush_stdout()
        super().exit(status, message)


def flush_stdout() -> None:
    """Flush stdout.

    Raises:
        OSError: the reader of stdout is gone, or its disk is full.
    """
    if sys.stdout:
        try:
            sys.stdout.flush()
        except OSError:
            mute(sys.stdout)
            raise


def add_run(parser: argparse.ArgumentParser) -> None:
    """Add the argument RUN."""
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory (holds tokscale/)")


def add_runs(parser: argparse.ArgumentParser) -> None:
    """Add the argument RUN of verbs that take several."""
    parser.add_argument(
        "runs", type=Path, nargs="+", metavar="RUN", help="run directory (holds tokscale/)"
    )


def add_data(parser: argparse.ArgumentParser, use: str = "required") -> None:
    """Add the group of Megatron's data flags, `use` in its title."""
    data = parser.add_argument_group(
        f"data of the job ({use})",
        "Give them in one way, as the job does: --data-path, --data-args-path, --train-data-path "
        "with its valid and test forms, or --per-split-data-args-path.",
    )
    words = "prefixes of datasets, or weights and prefixes in turn"
    data.add_argument("--data-path", nargs="+", metavar="WORD", help=words)
    data.add_argument(
        "--data-args-path", type=Path, metavar="FILE", help="file that holds the --data-path words"
    )
    for part in ("train", "valid", "test"):
        data.add_argument(
            f"--{part}-data-path", nargs="+", metavar="WORD", help=f"{words}, of this part alone"
        )
    data.add_argument(
        "--per-split-data-args-path",
        type=Path,
        metavar="JSON",
        help="file that holds the words of all three parts",
    )
    data.add_argument(
        "--split",
        metavar="SHARES",
        help="shares of training, validation and test; required with --data-args-path, refused "
        "where each part has its own datasets (default: with --data-path Megatron's 969,30,1)",
    )


def add_seed(parser: argparse._ActionsContainer, use: str) -> None:
    """Add --seed with `use` as its help."""
    parser.add_argument("--seed", type=int, default=DEFAULT_SEED, metavar="N", help=use)


def add_resampling(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the bootstrap."""
    parser.add_argument(
        "--resamples",
        type=int,
        default=200,
        metavar="N",
        help="resamples of documents, or of what stands in for them, for 95%% intervals",
    )
    add_seed(parser, "seed of all draws: resamples, permutations, samples of tokens")


def add_tokenizer(parser: argparse.ArgumentParser, use: str) -> None:
    """Add --tokenizer, which shows `use` as text."""
    parser.add_argument(
        "--tokenizer",
        type=Path,
        metavar="FILE",
        help=f"tokenizer.json, to show {use} as text (default: show token ids)",
    )


def open_run(path: Path) -> "Run":
    """Open a run; say on stderr which probes are left out, and what stands in for documents."""
    return open_runs([path])[0]


def open_runs(paths: Iterable[Path]) -> "list[Run]":
    """Open runs as `open_run` does; what stands in for documents in several of them is said once.

    All are open before the first word: a run that cannot be opened leaves one line.
    """
    from megatron_tokscale.store import Run

    runs = [Run.open(path) for path in paths]
    for run in runs:
        tell_left_out(run)
    for note in dict.fromkeys(run.tokens.note_on_units() for run in runs):
        if note is not None:
            say(note)
    return runs


def tell_left_out(run: "Run") -> None:
    """Say on stderr which probes of a run are left out of every analysis, if any are."""
    if run.left_out:
        value_of = run.imported.value_of if run.imported else {}
        steps = ", ".join(f"{value_of.get(step, step):.10g}" for step in run.left_out)
        several = len(run.left_out) > 1
        word = ("value" if run.default_time == "axis" else "step") + "s" * several
        where = f"{word} {steps}" + " of the axis" * (run.default_time == "axis")
        probes, have, are = ("probes", "have", "are") if several else ("probe", "has", "is")
        say(f"the {probes} of {run.path} at {where} {have} no finite loss and {are} left out")
