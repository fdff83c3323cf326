"""`report_run`: from a run and its analysis to one HTML page."""

import importlib
from collections.abc import Sequence
from pathlib import Path

from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.core.files import write_text
from megatron_tokscale.core.seed import DEFAULT_SEED
from megatron_tokscale.report.inputs import ReportInputs
from megatron_tokscale.store import Run


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
        TokscaleError: the analysis is missing or of other probes, a package is missing, the
            tokenizer does not fit, or another run or an axis is of another probe set.
        OSError: the page cannot be written.
    """
    _require("matplotlib")
    if tokenizer is not None:
        _require("tokenizers")
    inputs = ReportInputs.read(
        run, beside=beside, axes=axes, tokenizer=tokenizer, n_tokens=n_tokens, seed=seed
    )

    from megatron_tokscale.report.page import render  # imports matplotlib

    path = out or run.paths.report
    write_text(path, render(inputs))
    return path


def _require(package: str) -> None:
    try:
        importlib.import_module(package)
    except ImportError as error:
        raise TokscaleError(
            f"the report needs {package}; run `pip install megatron-tokscale[report]`"
        ) from error
