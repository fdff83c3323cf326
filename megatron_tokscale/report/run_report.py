"""From a run and its analysis, or from a comparison of two runs, to one HTML page."""

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.core.files import is_there, write_text
from megatron_tokscale.core.seed import DEFAULT_SEED
from megatron_tokscale.core.writable import unwritable
from megatron_tokscale.report.html import COMPARISON_TITLE, TITLE
from megatron_tokscale.report.inputs import ReportInputs
from megatron_tokscale.results.comparison import Comparison
from megatron_tokscale.store import Run

_BYTES_TO_THE_TITLE: Final = 2**12  # more than the lines before the title of any version's page


def report_run(
    run: Run,
    *,
    beside: Run | None = None,
    axes: Sequence[Path] = (),
    tokenizer: Path | None = None,
    n_tokens: int = 36,
    seed: int = DEFAULT_SEED,
    out: Path | None = None,
) -> Path:
    """Write the report of a run as one self-contained HTML page; equal inputs give equal bytes.

    Args:
        run: an opened run with its fits and spectra.
        beside: a run on the same probe set that trained under a plan; `run` is its baseline.
        axes: folders that `axis_run` wrote, of runs on the same probe set.
        tokenizer: a tokenizer.json to show the tokens' text; without it their ids are shown.
        n_tokens: number of example tokens.
        seed: seed of the choice of example tokens.
        out: path of the page; by default RUN/analysis/report.html.

    Returns:
        The path of the page, which is whole or absent.

    Raises:
        TokscaleError: something other than a report is at the path of the page, or it cannot be
            written; the analysis is missing or of other probes, a package is missing, the
            tokenizer does not fit, or another run or an axis is of another probe set.
        OSError: the page cannot be written.
    """
    path = out or run.paths.report
    check_page(path)
    if tokenizer is not None:
        _require("tokenizers")
    inputs = ReportInputs.read(
        run, beside=beside, axes=axes, tokenizer=tokenizer, n_tokens=n_tokens, seed=seed
    )

    from megatron_tokscale.report.page import render  # imports matplotlib

    write_text(path, render(inputs))
    return path


def report_comparison(found: Comparison, out: Path) -> Path:
    """Write the page of a comparison as one self-contained HTML file, and return its path.

    Raises:
        TokscaleError: something other than such a page is at `out`, or it cannot be written; a
            package is missing.
        OSError: the page cannot be written.
    """
    check_page(out, COMPARISON_TITLE, "--page")

    from megatron_tokscale.report.comparison_page import render_comparison  # imports matplotlib

    write_text(out, render_comparison(found))
    return out


def check_page(path: Path, title: str = TITLE, flag: str = "--out") -> None:
    """Refuse a path for a page that this user could not write, or that is taken.

    Args:
        path: the file.
        title: the start of the titles of such pages, by which an earlier one is known.
        flag: the flag that names the file.

    Raises:
        TokscaleError: something other than an earlier page is at `path`, or no file can be made
            there, or the package that draws a report's figures is missing.
    """
    if title in (TITLE, COMPARISON_TITLE):
        _require("matplotlib")
    if reason := unwritable(path.parent, path.name):
        raise TokscaleError(
            f"{path} cannot be written ({reason}); expected a path in a folder that you may write "
            f"to; choose another {flag}"
        )
    if not is_there(path):
        return
    kind = "report" if title == TITLE else "page of this verb"
    try:
        with path.open("rb") as file:
            start = file.read(_BYTES_TO_THE_TITLE)
    except OSError as error:
        raise TokscaleError(
            f"{path} cannot be read ({error.strerror}); expected a new file or an earlier {kind}; "
            f"choose another {flag}"
        ) from error
    if f"<title>{title}".encode() not in start:
        raise TokscaleError(
            f"{path} exists and is no {kind}; expected a new file or an earlier {kind}; choose "
            f"another {flag}"
        )


def _require(package: str) -> None:
    try:
        importlib.import_module(package)
    except ImportError as error:
        raise TokscaleError(
            f"the report needs {package}; run `pip install megatron-tokscale[report]`"
        ) from error
