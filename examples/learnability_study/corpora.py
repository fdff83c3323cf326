"""Five kinds of text from installed packages, cut into short documents; no network.

Documents have 200 to 1500 characters and are cut at paragraphs and definitions, so that samples of
128 tokens differ in their subjects. The last kind, checksums, is noise: nothing in it can be
learned but its alphabet and its layout.
"""

import ast
import importlib.util
import random
import re
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import distributions
from pathlib import Path

from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.core.files import write_json
from megatron_tokscale.demo.corpus import library_source, speeches, take, train_tokenizer
from megatron_tokscale.demo.corpus import write_dataset as write_tokens

WEIGHTS = {"speeches": 0.225, "python": 0.225, "cpp": 0.225, "docstrings": 0.225, "checksums": 0.1}
"""Weights of the blend by the names of the datasets."""
NOISE = "checksums"
SHORTEST, LONGEST = 200, 1500
_PARAGRAPH = re.compile(r"(?<=\n)[ \t]*\n")
_DEFINITION = re.compile(r"(?<=\n)(?=(?:    )?(?:@|def |class |async def ))")
_DOCUMENTED = ("numpy", "scipy", "sympy", "networkx", "matplotlib")
_LINES_OF_NOISE = 16
_SEED = 1234


def pieces(text: str, border: re.Pattern[str]) -> Iterator[str]:
    """Yield documents of a text: cut at borders, short pieces joined, long ones cut at lines."""
    held = ""
    for piece in border.split(text):
        for part in _no_longer_than(LONGEST, piece):
            if len(held) + len(part) > LONGEST:
                held = ""
            held += part
            if len(held) >= SHORTEST:
                yield held
                held = ""


def _no_longer_than(limit: int, piece: str) -> Iterator[str]:
    while len(piece) > limit:
        line, sentence = piece.rfind("\n", 0, limit), piece.rfind(". ", 0, limit)
        end = 1 + line if line >= SHORTEST else 2 + sentence if sentence >= SHORTEST else limit
        end = min(end, limit)
        yield piece[:end]
        piece = piece[end:]
    yield piece


def prose() -> Iterator[str]:
    """Yield paragraphs of the State of the Union speeches."""
    for speech in speeches():
        yield from pieces(speech, _PARAGRAPH)


def python_source() -> Iterator[str]:
    """Yield functions and classes of Python's standard library."""
    for source in library_source():
        yield from pieces(source, _DEFINITION)


def cpp_headers() -> Iterator[str]:
    """Yield passages of the C++ headers that come with torch."""
    for path in sorted((_package("torch") / "include").rglob("*.h")):
        yield from pieces(path.read_text(encoding="utf-8", errors="replace"), _PARAGRAPH)


def docstrings() -> Iterator[str]:
    """Yield paragraphs of scientific packages' docstrings."""
    for name in _DOCUMENTED:
        for path in sorted(_package(name).rglob("*.py")):
            if "tests" in path.parts:
                continue
            for node in ast.walk(ast.parse(path.read_bytes())):
                if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module):
                    yield from pieces(ast.get_docstring(node) or "", _PARAGRAPH)


def checksums() -> Iterator[str]:
    """Yield SHA-256 checksums of the files of all installed packages, with their sizes."""
    found = set()
    for distribution in distributions():
        for line in (distribution.read_text("RECORD") or "").splitlines():
            found.add(line.partition(",sha256=")[2])
    lines = sorted(found - {""})
    random.Random(_SEED).shuffle(lines)
    for start in range(0, len(lines) - _LINES_OF_NOISE, _LINES_OF_NOISE):
        yield "\n".join(lines[start : start + _LINES_OF_NOISE])


def _package(name: str) -> Path:
    found = importlib.util.find_spec(name)
    if found is None or found.origin is None:
        raise TokscaleError(
            f"{name} is not installed; the study reads its text: pip install {name}"
        )
    return Path(found.origin).parent


SOURCES: dict[str, Callable[[], Iterable[str]]] = {
    "speeches": prose,
    "python": python_source,
    "cpp": cpp_headers,
    "docstrings": docstrings,
    NOISE: checksums,
}


def texts(characters: int) -> dict[str, list[str]]:
    """Return documents of each kind, shuffled and none twice: `characters`, of noise a fifth."""
    return {
        name: take(dict.fromkeys(source()), characters // (5 if name == NOISE else 1), _SEED)
        for name, source in SOURCES.items()
    }


def write_data(folder: Path, tokenizer: Path, characters: int, vocab_size: int) -> None:
    """Write a dataset per kind of text, one tokenizer for all, and counts to `data.json`."""
    parts = texts(characters)
    folder.mkdir(parents=True, exist_ok=True)
    train_tokenizer((text for part in parts.values() for text in part), vocab_size, tokenizer)
    counts = {
        name: {
            "documents": len(part),
            "characters": sum(map(len, part)),
            "tokens": write_tokens(part, tokenizer, folder / name),
        }
        for name, part in parts.items()
    }
    write_json(folder / "data.json", counts)
