"""`megatron-tokscale watch`: what a run learns while a job trains it."""

import time
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_tokscale.cli.parsing import Arguments, Verbs, add_run, add_tokenizer, flush_stdout
from megatron_tokscale.core.errors import TokscaleError, say

if TYPE_CHECKING:
    from megatron_tokscale.probe.text import Tokenizer
    from megatron_tokscale.store.watching import RunView, RunWatcher


def add_verb(verbs: Verbs) -> None:
    """Add `watch`."""
    parser = verbs.add_parser(
        "watch",
        help="say what a run learns, while its job trains or after",
        description="Say what fell in the last octave of time, which tokens are learned, under "
        "way, to come and forgotten, and which fell most; say it again at each new probe, until it "
        "is interrupted. It needs no fit, reads the run's files from any machine that sees them, "
        "takes no lock and writes nothing but the page.",
    )
    add_run(parser)
    parser.add_argument("--once", action="store_true", help="say it once and end")
    parser.add_argument(
        "--page",
        type=Path,
        metavar="FILE",
        help="write it as an HTML page too, which a browser reloads by itself; a new file or an "
        "earlier such page (default: none)",
    )
    parser.add_argument(
        "--interval",
        type=float,
        default=30.0,
        metavar="S",
        help="seconds between two looks at the run's files",
    )
    add_tokenizer(parser, "tokens")
    parser.set_defaults(verb=_watch)


def _watch(arguments: Arguments) -> None:
    from megatron_tokscale.store.watching import RunWatcher

    if arguments.page:
        from megatron_tokscale.report.run_report import check_page
        from megatron_tokscale.report.watch_page import WATCH_TITLE

        check_page(arguments.page, WATCH_TITLE, "--page")
    watcher = RunWatcher(arguments.run)
    view = watcher.look()
    assert view is not None, "the first look shows the run"
    tokenizer = _tokenizer(arguments.tokenizer, view)
    _show(arguments, view, tokenizer)
    said = ""
    while not arguments.once:
        time.sleep(arguments.interval)
        view, error = _look_again(watcher)
        if view is not None:
            _show(arguments, view, tokenizer)
        elif error not in ("", said):
            say(f"{error}; looking again every {arguments.interval:g} s")
        said = error


def _tokenizer(path: Path | None, view: "RunView") -> "Tokenizer | None":
    """Read the tokenizer that fits the watched tokens, if one is given.

    Raises:
        TokscaleError: it cannot be read or does not fit, or the run has no text.
    """
    from megatron_tokscale.probe.text import load_tokenizer

    if path is None:
        return None
    if view.tokens.probe_set is None:
        raise TokscaleError(
            f"{view.paths.root} was imported and has no text for --tokenizer to show; leave out "
            "--tokenizer"
        )
    return load_tokenizer(path, view.tokens.probe_set)


def _look_again(watcher: "RunWatcher") -> "tuple[RunView | None, str]":
    """Return the run if it has changed, and the error if it cannot be read for the moment.

    A job that starts a run anew moves its files, and a file server may fail for a while.
    """
    try:
        return watcher.look(), ""
    except (TokscaleError, OSError) as error:
        return None, str(error)


def _show(arguments: Arguments, view: "RunView", tokenizer: "Tokenizer | None") -> None:
    """Print the run's progress, and write the page."""
    from megatron_tokscale.store.watch_text import describe_view, fallen_tokens

    fallen, now = fallen_tokens(view, tokenizer), time.time()
    print(describe_view(view, fallen, now))
    flush_stdout()
    if arguments.page:
        from megatron_tokscale.report.watch_page import write_watch_page

        refresh = None if arguments.once else arguments.interval
        write_watch_page(view, fallen, arguments.page, now, refresh)
