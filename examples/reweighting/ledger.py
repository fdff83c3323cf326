"""The ledger of a study: a JSON-lines file of all its results, small enough to commit.

A machine may go away during a study of many hours. The ledger then says which runs are finished,
and what came out: a run in the ledger is not trained again, and the tables need the ledger alone.
The first line holds the study's settings; each other line is one named result. Numbers are rounded
to five significant digits: the noise of a probe is a few thousandths of a loss.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from threading import Lock
from typing import Final

from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.core.files import write_text
from megatron_tokscale.core.records import JSON, to_json

_DIGITS: Final = 5
_SETTINGS: Final = "settings"


class Ledger:
    """The results of a study by name, in the order in which they came.

    Args:
        path: the ledger's file; a new one is begun.
        settings: settings of the study.

    Raises:
        TokscaleError: the file is damaged, or holds the results of other settings.
    """

    def __init__(self, path: Path, settings: Mapping[str, JSON]):
        self.path = path
        self._lock = Lock()
        self._results: dict[str, dict[str, JSON]] = {_SETTINGS: dict(settings)}
        if path.exists():
            self._results = _read(path)
            if self._results.get(_SETTINGS) != settings:
                raise TokscaleError(
                    f"{path} holds results of other settings; expected those of this study; give "
                    "another --ledger"
                )

    def __contains__(self, name: str) -> bool:
        return name in self._results

    def __getitem__(self, name: str) -> dict[str, JSON]:
        return self._results[name]

    def add(self, name: str, result: Mapping[str, object]) -> None:
        """Add a result, arrays included, and write the ledger, whole or not at all.

        Raises:
            TokscaleError: the ledger has a result of that name.
        """
        with self._lock:
            if name in self:
                raise TokscaleError(f"{self.path} has a result of {name}; expected none")
            self._results[name] = {key: rounded(to_json(value)) for key, value in result.items()}
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_text(self.path, "".join(map(_line, self._results.items())))


def rounded(value: JSON) -> JSON:
    """Return a value with numbers of five significant digits; None for one that is not finite."""
    match value:
        case float():
            return float(f"{value:.{_DIGITS}g}") if math.isfinite(value) else None
        case list():
            return [rounded(part) for part in value]
        case dict():
            return {key: rounded(part) for key, part in value.items()}
        case _:
            return value


def _line(item: tuple[str, dict[str, JSON]]) -> str:
    name, result = item
    words = json.dumps({"name": name, **result}, separators=(",", ":"), allow_nan=False)
    return words + "\n"


def _read(path: Path) -> dict[str, dict[str, JSON]]:
    results = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            result = json.loads(line)
            results[result.pop("name")] = result
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise TokscaleError(
                f"line {number} of {path} is damaged ({error}); expected a result; remove the line"
            ) from error
    return results
