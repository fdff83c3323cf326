"""Several matrices along T, one per run: a folder of run directories from files or a manifest.

The manifest is JSON, a list of objects (or an object with such a list as "runs"), or CSV with a
header. Its keys are the fields of `ListedRun`; a file is relative to the manifest.
"""

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.core.files import whole_or_absent_folder
from megatron_tokscale.core.progress import NoProgress, Progress
from megatron_tokscale.core.records import JSON, from_json
from megatron_tokscale.store.exchange.import_run import ImportSummary, write_run
from megatron_tokscale.store.exchange.sources import (
    INTERCHANGE_FILE,
    ImportSettings,
    MatrixSource,
    file_sha256,
)

MANIFESTS: Final = (".json", ".csv")
"""Ends of the names of manifests of several runs."""
_NUMBERS: Final = ("size", "tokens", "seed")
_LARGEST: Final = 2**63 - 1


@dataclass(frozen=True)
class ListedRun:
    """One run of a manifest.

    Attributes:
        file: its file of losses.
        name: name of its run directory; None for the name of the file.
        size: size of its model.
        tokens: training tokens by its last column.
        seed: seed of its training.
    """

    file: str
    name: str | None = None
    size: int | None = None
    tokens: int | None = None
    seed: int | None = None

    @property
    def folder(self) -> str:
        """Name of the run directory."""
        path = Path(self.file)
        stem = path.parent.name if path.name == INTERCHANGE_FILE else path.stem
        return self.name or stem


def listed_runs(files: Sequence[Path]) -> tuple[ListedRun, ...]:
    """Return the runs of files, or of the one manifest among them.

    Raises:
        TokscaleError: the manifest cannot be read, or two runs have one name.
    """
    if len(files) == 1 and files[0].suffix in MANIFESTS:
        runs = _read_manifest(files[0])
    else:
        runs = tuple(ListedRun(str(path)) for path in files)
    for k, run in enumerate(runs):
        if not _is_folder_name(run.folder) or run.folder in {each.folder for each in runs[:k]}:
            raise TokscaleError(
                f"{run.folder!r} is no name for the directory of {run.file}, or another run has "
                "it; expected a name of its own without '/'; name the runs in a manifest"
            )
    return runs


def _is_folder_name(name: str) -> bool:
    """Return whether a folder in another folder can have this name, which verbs print."""
    return Path(name).name == name and name != ".." and name.isprintable() and len(name) <= 200


def import_runs(
    files: Sequence[Path],
    out: Path,
    settings: ImportSettings,
    size_measure: str,
    progress: Progress | None = None,
) -> list[ImportSummary]:
    """Write a run directory for each file into the new folder `out`, all or none.

    The runs count as runs with the same watched tokens: the user lists them together.

    Args:
        files: files of losses, or one manifest.
        out: the folder to make.
        settings: description of the files.
        size_measure: the measure of the sizes in a manifest: see `ImportSettings.size`.
        progress: receiver of the losses imported; None for none.

    Raises:
        TokscaleError: a file cannot be imported, is not along T, or has another number of tokens
            than the first; or `out` exists.
        OSError: the disk is full or the folder cannot be written.
    """
    runs = listed_runs(files)
    folder = files[0].parent if files[0].suffix in MANIFESTS else Path()
    name = settings.tokens_name or f"imported together: {_identity(files)}"
    sources = []
    for run in runs:
        own = replace(
            settings,
            tokens_name=name,
            size={size_measure: run.size} if run.size else settings.size,
            training_tokens=run.tokens or settings.training_tokens,
            seed=settings.seed if run.seed is None else run.seed,
        )
        sources.append(MatrixSource.open(folder / run.file, own))
    for source in sources:
        _check_alike(source, sources[0])
    summaries = []
    with whole_or_absent_folder(out) as temporary:
        for run, source in zip(runs, sources, strict=True):
            at = temporary / run.folder
            at.mkdir()
            summaries.append(write_run(source, at, out / run.folder, progress or NoProgress()))
    return summaries


def _identity(files: Sequence[Path]) -> str:
    first = files[0] / INTERCHANGE_FILE if files[0].is_dir() else files[0]
    if not first.is_file():
        raise TokscaleError(f"{first} is not there; name a file of losses")
    return file_sha256(first)


def _check_alike(source: MatrixSource, first: MatrixSource) -> None:
    path = source.file.path
    if source.axis != "T":
        raise TokscaleError(
            f"{path} is along {source.axis}, where every column is a run; expected matrices along "
            "T; import it alone"
        )
    if source.n_tokens != first.n_tokens:
        raise TokscaleError(
            f"{path} has {source.n_tokens:,} tokens, {first.file.path} has {first.n_tokens:,}; "
            "expected losses of the same tokens; import it alone"
        )


def _read_manifest(path: Path) -> tuple[ListedRun, ...]:
    try:
        text = path.read_text(encoding="utf-8-sig")  # spreadsheets write a byte order mark
        content: JSON = json.loads(text) if path.suffix == ".json" else _rows(text)
        if isinstance(content, dict) and set(content) == {"runs"}:
            content = content["runs"]
        runs = from_json(tuple[ListedRun, ...], _with_whole_numbers(content), "runs")
        _check_numbers(runs)
    except (OSError, ValueError, csv.Error, RecursionError) as error:
        raise TokscaleError(
            f"manifest {path} cannot be read ({error}); expected runs with file, and perhaps name, "
            "size, tokens and seed"
        ) from error
    if not runs:
        raise TokscaleError(f"manifest {path} lists no run; expected one or more")
    return runs


def _check_numbers(runs: Sequence[ListedRun]) -> None:
    """Refuse numbers that are none of a run.

    Raises:
        ValueError: a size, a number of tokens or a seed is negative or above 64 bits.
    """
    for run in runs:
        for name in _NUMBERS:
            value: int | None = getattr(run, name)
            if value is not None and not 0 <= value <= _LARGEST:
                raise ValueError(f"{name} of {run.file} is {value:.6g}; expected 0 to {_LARGEST:g}")


def _with_whole_numbers(content: JSON) -> JSON:
    """Return JSON rows whose numbers such as 1.3e9 are whole; other values stay as they are."""
    if not isinstance(content, list):
        return content
    return [
        {
            name: int(value)
            if name in _NUMBERS and isinstance(value, float) and value.is_integer()
            else value
            for name, value in row.items()
        }
        if isinstance(row, dict)
        else row
        for row in content
    ]


def _rows(text: str) -> list[JSON]:
    """Return the rows of a CSV with a header; an empty cell is missing.

    Raises:
        ValueError: a number cannot be read, or a row has more cells than the header.
    """
    rows: list[JSON] = []
    for row in csv.DictReader(io.StringIO(text, newline=""), skipinitialspace=True):
        if None in row:
            raise ValueError(f"a row has more cells than the header: {row}")
        known = {name.strip(): value.strip() for name, value in row.items() if value}
        rows.append(
            {
                name: _whole(name, value) if name in _NUMBERS else value
                for name, value in known.items()
                if value
            }
        )
    return rows


def _whole(name: str, value: str) -> int:
    """Return the whole number that a cell such as 1.3e9 gives."""
    number = float(value)
    if not 0 <= number <= _LARGEST or number != round(number):  # in this order: infinity, NaN
        raise ValueError(f"{name} is {value}; expected a whole number")
    return int(value) if value.isdecimal() else int(number)
