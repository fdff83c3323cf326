"""Files that are whole or absent: written to a temporary name, synced, renamed."""

import errno
import json
import os
import secrets
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

from megatron_tokscale.core.errors import TokscaleError

_CANNOT_SYNC: Final = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOTTY}
"""Errors of a file system that has no fsync."""
_LOST: Final = {errno.EIO, errno.ENOSPC, errno.EDQUOT}
"""Errors of fsync after which the bytes may not be on the disk."""


@contextmanager
def whole_or_absent(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success sync it and rename it to `path`.

    On an error the temporary file is removed and `path` stays as it was.

    Raises:
        OSError: the directory or the file cannot be written; it names `path`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        _sync(temporary)
        _replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        if error.filename is None or str(error.filename) == str(temporary):
            error.filename = str(path)
            del error.filename2
        raise
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def remove_temporaries(folder: Path) -> None:
    """Remove what writers that were killed have left in `folder`; nobody may be writing there."""
    for path in folder.glob(".*.tmp"):
        path.unlink(missing_ok=True)


def sync(descriptor: int) -> None:
    """Wait until what was written to an open file is on the disk, where there is a way to.

    Raises:
        OSError: it is not.
    """
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _CANNOT_SYNC:
            raise


def _sync(path: Path) -> None:
    try:
        descriptor = os.open(path, os.O_RDWR)  # CIFS syncs nothing that is open for reading only
    except PermissionError:
        descriptor = os.open(path, os.O_RDONLY)
    try:
        sync(descriptor)
    finally:
        os.close(descriptor)


def _sync_folder(path: Path) -> None:
    """Wait until a folder's names are on the disk, if it can be opened and synced at all.

    CIFS, FUSE and others refuse it in many ways, and the file is whole and in its place by then.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno in _LOST:
            raise
    finally:
        os.close(descriptor)


def _replace(temporary: Path, path: Path) -> None:
    """Rename; NFS may say that there is no such file when an answer was lost and it asked twice."""
    file = temporary.stat().st_ino
    try:
        os.replace(temporary, path)
    except FileNotFoundError:
        if not path.exists() or path.stat().st_ino != file:
            raise


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path`, whole or not at all."""
    with whole_or_absent(path) as temporary:
        # A path that is not UTF-8 has characters that cannot be written.
        temporary.write_text(text, encoding="utf-8", errors="replace")


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write `content` to `path` as JSON, whole or not at all; NaN and infinity are refused."""
    write_text(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return `content` and its checksum, to be written as JSON."""
    return {**content, "checksum": json_checksum(content)}


def check_seal(path: Path, content: Mapping[str, Any]) -> None:
    """Refuse the content of a JSON file whose checksum is wrong; an older file has none.

    Raises:
        TokscaleError: naming the file.
    """
    if content.get("checksum", found := json_checksum(content)) != found:
        raise TokscaleError(
            f"{path} is damaged or was edited: its checksum is wrong; restore it, or, if the "
            'change is meant, remove its "checksum"'
        )


def json_checksum(content: Mapping[str, Any]) -> str:
    """Return the CRC-32 of plain values, their "checksum" left out, in hexadecimal."""
    rest = {name: value for name, value in content.items() if name != "checksum"}
    return f"{zlib.crc32(json.dumps(rest, sort_keys=True).encode()):08x}"


def is_there(path: Path) -> bool:
    """Return whether there is anything at `path`: also a folder, or a link that leads nowhere."""
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def read_json(path: Path) -> dict[str, Any]:
    """Read the JSON object in `path`.

    Raises:
        TokscaleError: the file is missing, unreadable or not a JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise TokscaleError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise TokscaleError(
            f"{path} is not JSON ({error}); restore it, or name another file"
        ) from error
    if not isinstance(content, dict):
        raise TokscaleError(f"{path} holds no JSON object; restore it, or name another file")
    return content


def schema_version(path: Path, content: Mapping[str, Any]) -> int:
    """Return the schema version that a file gives in `content`.

    Raises:
        TokscaleError: there is none, or it is not a whole number.
    """
    found = content.get("schema_version")
    try:
        return int(found)  # type: ignore[arg-type]
    except (TypeError, ValueError) as error:
        raise TokscaleError(
            f"{path} has schema version {found!r}; expected a whole number; restore or remove it"
        ) from error


def check_schema(path: Path, found: int, supported: int) -> None:
    """Refuse a file of a schema newer than this version reads.

    Raises:
        TokscaleError: naming both versions.
    """
    if found > supported:
        raise TokscaleError(
            f"{path} has schema version {found}, this megatron-tokscale reads up to {supported}; "
            "upgrade megatron-tokscale"
        )
