"""Facts about the runs of tables that the tables do not hold: sizes, names, tokens per step."""

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from megatron_tokscale.core.errors import TokscaleError

_KEYS: Final = ("file", "name", "parameters", "tokens_per_step")


@dataclass(frozen=True)
class TableFacts:
    """One run's table, and what is known about the run.

    Attributes:
        file: the table.
        name: name of the run; by default the file's name without its ending.
        parameters: parameters of the model without embeddings; None if not known.
        tokens_per_step: tokens in a batch; None if not known.
    """

    file: Path
    name: str
    parameters: int | None = None
    tokens_per_step: float | None = None


def tables_of(files: Sequence[Path], manifest: Path | None) -> tuple[TableFacts, ...]:
    """Return the facts about each file, or about each file of the manifest where none are given.

    A manifest is CSV, or JSON with a list of objects. Its columns are `file` (a path from the
    manifest's folder) and, optionally, `name`, `parameters` and `tokens_per_step`.

    Raises:
        TokscaleError: the manifest cannot be read or does not name a file, a name comes twice, or
            there is no table.
    """
    if manifest is None:
        tables = [TableFacts(file, file.stem) for file in files]
    else:
        tables = _read_manifest(manifest)
    if manifest is not None and files:
        by_path = {each.file.resolve(): each for each in tables}
        for file in files:
            if file.resolve() not in by_path:
                raise TokscaleError(f"{manifest} does not name {file}; add a row for it")
        tables = [replace(by_path[file.resolve()], file=file) for file in files]
    if not tables:
        raise TokscaleError("there are no tables of losses; give --curves FILE or a --manifest")
    names = [each.name for each in tables]
    for name in names:
        if names.count(name) > 1:
            raise TokscaleError(
                f"two tables are named '{name}'; expected a name for each; give names by --manifest"
            )
    return tuple(tables)


def _read_manifest(path: Path) -> list[TableFacts]:
    try:
        text = path.read_text(encoding="utf-8-sig")
        is_json = path.suffix.lower() == ".json"
        rows = json.loads(text) if is_json else list(csv.DictReader(text.splitlines()))
    except (OSError, ValueError, RecursionError, csv.Error) as error:
        raise TokscaleError(
            f"cannot read the manifest {path}: {error}; expected CSV or JSON"
        ) from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise TokscaleError(f"{path} is not a list of objects; expected one for each run")
    return [_facts(path, row, f"row {number + 1} of {path}") for number, row in enumerate(rows)]


def _facts(manifest: Path, row: dict[str, object], where: str) -> TableFacts:
    unknown = [key for key in row if key not in _KEYS]
    if unknown:
        raise TokscaleError(
            f"{where} has the unknown column '{unknown[0]}'; expected {', '.join(_KEYS)}"
        )
    if not row.get("file"):
        raise TokscaleError(f"{where} names no file; expected a path in the column 'file'")
    file = manifest.parent / str(row["file"])
    parameters = _number(row.get("parameters"), f"parameters in {where}")
    return TableFacts(
        file=file,
        name=str(row.get("name") or file.stem),
        parameters=None if parameters is None else round(parameters),
        tokens_per_step=_number(row.get("tokens_per_step"), f"tokens_per_step in {where}"),
    )


def _number(value: object, where: str) -> float | None:
    """Return a number above 0; None for an empty cell."""
    if value is None or value == "":
        return None
    try:
        number = float(str(value).replace("_", ""))
    except ValueError:
        number = float("nan")
    if not 0 < number < float("inf"):
        raise TokscaleError(f"{where} is '{value}'; expected a number above 0")
    return number
