"""Files that are whole or absent: written to a temporary name, synced, renamed."""

import errno
import json
import os
import secrets
import shutil
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.core.records import JSON

_CANNOT_SYNC: Final = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOTTY}
"""Errors of fsync on a file system without it."""
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


@contextmanager
def whole_or_absent_folder(path: Path) -> Iterator[Path]:
    """Yield a new folder beside `path`, with a hidden name; on success rename it to `path`.

    On an error the folder is removed. The caller syncs the files in it.

    Raises:
        TokscaleError: something is at `path`.
        OSError: the folder cannot be made.
    """
    if is_there(path):
        raise TokscaleError(f"{path} exists; expected a new folder; choose another name")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.absolute().with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    temporary.mkdir()
    try:
        yield temporary
        if is_there(path):  # an empty folder would be replaced without an error
            raise TokscaleError(f"{path} was made meanwhile; choose another name")
        os.replace(temporary, path)
        _sync_folder(path.absolute().parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_temporaries(folder: Path) -> None:
    """Remove temporary files of killed writers from `folder`, where nobody may be writing now."""
    for path in folder.glob(".*.tmp"):
        path.unlink(missing_ok=True)


def sync(descriptor: int) -> None:
    """Wait until the content of an open file is on the disk; do nothing on systems without fsync.

    Raises:
        OSError: the content may not be on the disk.
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
    """Wait until a folder's names are on the disk, if the folder can be opened and synced at all.

    CIFS, FUSE and other file systems refuse it with various errors; by then the file is whole and
    renamed.
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
    """Rename `temporary` to `path`.

    NFS may answer that there is no such file if its first answer was lost and it renamed already.
    """
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


def write_json(path: Path, content: Mapping[str, JSON]) -> None:
    """Write `content` to `path` as JSON, whole or not at all; NaN and infinity are refused."""
    write_text(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


def sealed(content: Mapping[str, JSON]) -> dict[str, JSON]:
    """Return `content` with its checksum added, to be written as JSON."""
    return {**content, "checksum": json_checksum(content)}


def check_seal(path: Path, content: Mapping[str, JSON]) -> None:
    """Refuse the content of a JSON file whose checksum is wrong; a file without one is accepted.

    Raises:
        TokscaleError: the checksum is wrong; the message names the file.
    """
    if content.get("checksum", found := json_checksum(content)) != found:
        raise TokscaleError(
            f"{path} is damaged or was edited: its checksum is wrong; restore it, or, if the "
            'change is meant, remove its "checksum"'
        )


def json_checksum(content: Mapping[str, JSON]) -> str:
    """Return the CRC-32 of JSON values in hexadecimal; "checksum" itself is left out."""
    rest = {name: value for name, value in content.items() if name != "checksum"}
    return f"{zlib.crc32(json.dumps(rest, sort_keys=True).encode()):08x}"


def is_there(path: Path) -> bool:
    """Return whether `path` exists in any form: also a folder, or a link that leads nowhere."""
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def why_unreadable(path: Path, error: OSError) -> str:
    """Return the reason of an error from safetensors, which says "No such file" whatever it is."""
    try:
        path.open("rb").close()
    except OSError as own:
        error = own
    return error.strerror or str(error)


def read_json(path: Path) -> dict[str, JSON]:
    """Read the JSON object in `path`.

    Raises:
        TokscaleError: the file is missing, unreadable or not a JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise TokscaleError(
            f"cannot read {path}: {error.strerror}; restore it, or name another file"
        ) from error
    except (ValueError, RecursionError) as error:
        raise TokscaleError(
            f"{path} is not JSON ({error}); restore it, or name another file"
        ) from error
    if not isinstance(content, dict):
        raise TokscaleError(f"{path} holds no JSON object; restore it, or name another file")
    return content


def schema_version(path: Path, content: Mapping[str, JSON]) -> int:
    """Return the schema version in the content or the metadata of a file.

    Raises:
        TokscaleError: the content has no schema version, or one that is not a whole number.
    """
    found = content.get("schema_version")
    try:
        return int(found)  # type: ignore[arg-type]
    except (TypeError, ValueError) as error:
        raise TokscaleError(
            f"{path} has schema version {found!r}; expected a whole number; restore or remove it"
        ) from error


def check_schema(path: Path, found: int, supported: int, remedy: str | None = None) -> None:
    """Refuse a file of a schema that this megatron-tokscale does not read.

    Args:
        path: the file.
        found: its schema version.
        supported: the newest schema version that is read.
        remedy: what to do about a file of an older schema, e.g. "fit the run again"; None if older
            files are read.

    Raises:
        TokscaleError: the schema is newer, or older and there is a remedy; the message names both
            versions.
    """
    if found > supported:
        raise TokscaleError(
            f"{path} has schema version {found}, this megatron-tokscale reads up to {supported}; "
            "upgrade megatron-tokscale"
        )
    if remedy is not None and found < supported:
        raise TokscaleError(
            f"{path} is of an older schema; {remedy} (its schema version is {found}; expected "
            f"{supported})"
        )
