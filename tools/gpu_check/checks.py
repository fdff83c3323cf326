"""Results of the check: one line for each promise, kept on disk part by part."""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Literal

from megatron_tokscale.core.files import whole_or_absent

Verdict = Literal["proven", "FAILED", "not run", "measured"]

PROVEN: Final[Verdict] = "proven"
FAILED: Final[Verdict] = "FAILED"
NOT_RUN: Final[Verdict] = "not run"
MEASURED: Final[Verdict] = "measured"


@dataclass(frozen=True)
class Check:
    """Promise and its verdict.

    Attributes:
        promise: one sentence.
        verdict: "proven" or "FAILED"; "measured" for a figure without a limit; "not run".
        detail: figures, or the reason for the verdict.
    """

    promise: str
    verdict: Verdict
    detail: str = ""


def check(promise: str, *, holds: bool, detail: str = "") -> Check:
    """Return the check of a promise: proven if it `holds`, else failed."""
    return Check(promise, PROVEN if holds else FAILED, detail)


@dataclass(frozen=True)
class Part:
    """Part of the check.

    Attributes:
        name: name on the command line and on disk.
        seconds: expected duration on one GPU of the H100's class and 16 cores.
        run: makes the checks of the part at a site.
    """

    name: str
    seconds: int
    run: Callable[[Any], Iterator[Check]]


def read_checks(path: Path, identity: dict[str, str]) -> list[Check] | None:
    """Return the checks of a part; None if it has not run, or ran with another identity."""
    if not path.exists():
        return None
    record = json.loads(path.read_text(encoding="utf-8"))
    if record["identity"] != identity:
        return None
    return [Check(**entry) for entry in record["checks"]]


def write_checks(path: Path, identity: dict[str, str], checks: list[Check], seconds: float) -> None:
    """Write the checks of a part whole or not at all."""
    record = {
        "identity": identity,
        "seconds": round(seconds, 1),
        "checks": [asdict(entry) for entry in checks],
    }
    with whole_or_absent(path) as temporary:
        temporary.write_text(json.dumps(record, indent=1), encoding="utf-8")
