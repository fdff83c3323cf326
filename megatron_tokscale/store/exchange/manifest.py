"""The manifest.yaml beside a losses.npz: what it says of the file is compared with the file.

The authors' manifest "lists shapes, bytes and SHA-256" (docs/references.md, 1); the names of its
keys are not known to us. So every entry that names the file, or an array of it, is looked for, and
a value that contradicts the file is refused.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.core.files import is_there
from megatron_tokscale.core.records import JSON
from megatron_tokscale.store.exchange.files import Array

MANIFEST: Final = "manifest.yaml"
_HASHES: Final = {"sha256", "sha-256", "sha_256"}
_SIZES: Final = {"bytes", "size", "size_bytes", "n_bytes", "nbytes"}
_NAMES: Final = {"path", "file", "filename", "file_name", "name"}
_MOST_VALUES: Final = 100_000
"""Most values of a manifest; our choice: a thousand files with a hundred facts each."""
_FACTS: Final = _HASHES | _SIZES


@dataclass(frozen=True)
class FileFacts:
    """Facts of a file that a manifest can state.

    Attributes:
        path: the file.
        n_bytes: its size.
        sha256: its SHA-256, in hexadecimal.
        arrays: its arrays by name.
    """

    path: Path
    n_bytes: int
    sha256: str
    arrays: Mapping[str, Array]


def check_manifest(facts: FileFacts) -> str | None:
    """Compare the manifest beside a file with the file.

    Returns:
        A sentence that says what was compared; None without a manifest.

    Raises:
        TokscaleError: the manifest cannot be read, or contradicts the file.
    """
    path = facts.path.with_name(MANIFEST)
    if not is_there(path):
        return None
    content = _read(path)
    entries = _entries_of(content, facts.path) or _only_entry(content)
    checked: dict[str, None] = {}  # an ordered set
    for entry in entries:
        checked.update(dict.fromkeys(_compare(path, entry, facts)))
    shapes = [
        name
        for name, array in facts.arrays.items()
        if _compare_shape(path, entries or [content], name, array)
    ]
    if shapes:
        checked[f"the shapes of {', '.join(shapes)}"] = None
    if not checked:
        return f"{path} says nothing of {facts.path.name} that can be checked"
    return f"{path} agrees on {'; '.join(checked)}"


def _read(path: Path) -> JSON:
    try:
        import yaml
    except ImportError as error:
        raise TokscaleError(
            f"{path} cannot be checked without PyYAML; pip install pyyaml, or pass --no-manifest"
        ) from error
    try:
        content: JSON = yaml.safe_load(path.read_text(encoding="utf-8"))
        _check_size(content)
    except (yaml.YAMLError, OSError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise TokscaleError(
            f"{path} cannot be read ({reason}); expected YAML; restore it, or pass --no-manifest"
        ) from error
    if isinstance(content, Mapping) or (isinstance(content, list) and content):
        return content
    raise TokscaleError(
        f"{path} has no entries; expected those of files; restore it, or pass --no-manifest"
    )


def _check_size(content: JSON) -> None:
    """Refuse a content that aliases of YAML have made too large, or without end.

    Raises:
        ValueError: it has too many values.
    """
    left, count = [content], 0
    while left:
        count += 1
        if count > _MOST_VALUES:
            raise ValueError(f"it has more than {_MOST_VALUES:,} values, or holds itself")
        value = left.pop()
        if isinstance(value, Mapping):
            left += value.values()
        elif isinstance(value, list):
            left += value


def _walk(content: JSON, key: str = "") -> Iterator[tuple[str, Mapping[str, JSON]]]:
    """Yield every mapping within `content` with the key that it has in its parent."""
    if isinstance(content, Mapping):
        yield key, content
        for name, each in content.items():
            yield from _walk(each, str(name))
    elif isinstance(content, Sequence) and not isinstance(content, str):
        for each in content:
            yield from _walk(each, key)


def _entries_of(content: JSON, file: Path) -> list[Mapping[str, JSON]]:
    """Return the mappings that name the file: by their key, or by a value such as `path`.

    Where several files have its name, their folders tell them apart.
    """
    found = []
    for key, entry in _walk(content):
        named = [key, *(str(entry[name]) for name in _NAMES & entry.keys())]
        found += [(name, entry) for name in named if name.rsplit("/", 1)[-1] == file.name]
    if len({name for name, _ in found}) > 1:
        ours = (file.name, f"{file.absolute().parent.name}/{file.name}")
        found = [(name, entry) for name, entry in found if name.endswith(ours[1]) or name in ours]
    return [entry for _, entry in found]


def _only_entry(content: JSON) -> list[Mapping[str, JSON]]:
    """Return the one mapping with a hash or a size, if it names no other file."""
    found = [
        entry
        for _, entry in _walk(content)
        if _FACTS & {str(key).lower() for key in entry} and not _NAMES & entry.keys()
    ]
    return found if len(found) == 1 and found[0] is content else []


def _compare(path: Path, entry: Mapping[str, JSON], facts: FileFacts) -> Iterator[str]:
    """Yield what a manifest's entry of the file says rightly.

    Raises:
        TokscaleError: it says something wrong.
    """
    for key, value in entry.items():
        if str(key).lower() in _HASHES:
            if str(value).lower().removeprefix("sha256:") != facts.sha256:
                raise _contradiction(path, f"SHA-256 {value}", facts.path, facts.sha256)
            yield f"the SHA-256 of {facts.path.name}"
        if str(key).lower() in _SIZES and isinstance(value, int):
            if value != facts.n_bytes:
                raise _contradiction(path, f"{value} bytes", facts.path, f"{facts.n_bytes}")
            yield f"the size of {facts.path.name}"


def _compare_shape(path: Path, entries: Sequence[JSON], name: str, array: Array) -> bool:
    """Return whether the entries give the shape of an array, rightly.

    Raises:
        TokscaleError: they give another shape.
    """
    found = False
    for entry in entries:
        for key, mapping in _walk(entry):
            shape = mapping.get("shape") if name in (key, mapping.get("name")) else None
            if shape is None and key in ("shapes", "arrays", "shape") and name in mapping:
                shape = mapping[name]
            if isinstance(shape, Sequence) and not isinstance(shape, str):
                if list(shape) != list(array.shape):
                    given = f"shape {list(shape)} of {name}"
                    raise _contradiction(path, given, path.parent, f"{list(array.shape)}")
                found = True
    return found


def _contradiction(path: Path, given: str, of: Path, found: str) -> TokscaleError:
    return TokscaleError(
        f"{path} gives {given}; the file has {found}; fetch {of.name} again, or pass --no-manifest"
    )
