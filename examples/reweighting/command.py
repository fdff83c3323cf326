"""The parts that the commands of studies share: settings, folder, flags, tables at the end."""

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from reweighting.chain import Chain, Training, run_phases
from reweighting.ledger import Ledger

from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.core.files import read_json, write_json, write_text
from megatron_tokscale.core.records import from_json, to_json


@dataclass(frozen=True, kw_only=True)
class StudySettings:
    """Settings of a study.

    Attributes:
        training: model, data and training.
    """

    training: Training

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read settings."""
        return from_json(cls, read_json(path), str(path))

    def open(self, folder: Path, ledger: Path) -> Ledger:
        """Begin a study of these settings in `folder`, or resume it; return its ledger.

        Raises:
            TokscaleError: `folder` or `ledger` is of other settings.
        """
        content = to_json(self)
        assert isinstance(content, Mapping)
        known = folder / "study.json"
        if known.exists() and read_json(known) != content:
            raise TokscaleError(
                f"{folder} holds a study with other settings; expected those given; give another "
                "--folder"
            )
        opened = Ledger(ledger, content)
        if not known.exists():
            write_json(known, content)
        return opened


def study_parser(
    description: str, folder: str, settings: str, phases: Sequence[str]
) -> argparse.ArgumentParser:
    """Return the parser of a study's command; `folder` and `settings` describe their defaults."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--folder", type=Path, help=f"default: {folder}")
    parser.add_argument("--settings", type=Path, help=f"default: {settings}")
    parser.add_argument("--ledger", type=Path, help="default: FOLDER/ledger.jsonl")
    parser.add_argument("--out", type=Path, help="write the tables here too")
    parser.add_argument("--at-once", type=int, default=2, help="jobs at once, a core each")
    parser.add_argument("--until", choices=("none", *phases), default=phases[-1], help="last phase")
    return parser


def run_study(study: Chain, given: argparse.Namespace, tables: Callable[[], str]) -> None:
    """Run the phases that the flags name; print the tables, also if a phase has failed."""
    try:
        run_phases(study, given.until, given.at_once)
    finally:
        text = tables()
        print(text)
        if given.out:
            write_text(given.out, text)
