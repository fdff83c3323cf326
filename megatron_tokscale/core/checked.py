"""Analysis files that carry a checksum, so that a damaged one is never taken for a good one."""

import io
import struct
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Final, cast

import numpy as np

from megatron_tokscale import __version__
from megatron_tokscale.core.arrays import AnyArray
from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.core.files import (
    check_schema,
    is_there,
    json_checksum,
    read_json,
    schema_version,
    sealed,
    whole_or_absent,
    write_json,
)
from megatron_tokscale.core.records import JSON, read_as, to_json

_AT_ONCE = 2**24  # bytes of a file that are read at a time: 16 MB, little memory and few calls
_DAMAGE: Final = (
    *(OSError, ValueError, KeyError, TypeError, EOFError, NotImplementedError, RuntimeError),
    *(zipfile.BadZipFile, zlib.error, struct.error, MemoryError),
)
"""Errors that numpy raises while it reads a damaged .npz file."""


_ENVELOPE: Final = {"schema_version", "version", "checksum"}
"""The keys of a file that are about the file, not its content."""


def write_typed_result(path: Path, schema: int, record: object) -> None:
    """Write a dataclass as JSON, with its schema version, this package's version and a checksum.

    The file is whole or absent.

    Raises:
        TypeError: JSON has no form for a value of the record.
    """
    content = cast("Mapping[str, JSON]", to_json(record))
    write_json(path, sealed({"schema_version": schema, "version": __version__, **content}))


def read_typed_result[T](kind: type[T], path: Path, schema: int, again: str) -> T:
    """Read the dataclass that `write_typed_result` wrote, of exactly this schema.

    Args:
        kind: the dataclass.
        path: the file.
        schema: the schema version to expect.
        again: what to do about a file that cannot be used, e.g. "run `...` again"; the message of
            every error ends with it.

    Raises:
        TokscaleError: the file is missing, damaged, of another schema, or holds no `kind`.
    """
    if not is_there(path):
        raise TokscaleError(f"{path} is not there; {again}")
    try:
        content = read_json(path)
    except TokscaleError as error:
        raise TokscaleError(f"{path} is damaged ({error}); {again}") from error
    check_schema(path, schema_version(path, content), schema, again)
    if content.get("checksum") != json_checksum(content):
        raise TokscaleError(f"{path} is damaged: its checksum is wrong; {again}")
    record = {name: value for name, value in content.items() if name not in _ENVELOPE}
    return read_as(kind, record, path, again)


def write_arrays(path: Path, arrays: Mapping[str, AnyArray]) -> str:
    """Write arrays to an .npz file, whole or not at all; return the CRC-32 of the file."""
    with whole_or_absent(path) as temporary:
        with temporary.open("wb") as file:
            np.savez_compressed(file, allow_pickle=False, **arrays)
        return file_checksum(temporary)


def read_arrays(path: Path, checksum: object, again: str) -> dict[str, AnyArray]:
    """Return the arrays of an .npz file by name, if its CRC-32 is `checksum`.

    Raises:
        TokscaleError: the file is missing or damaged, or has another checksum.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise TokscaleError(f"cannot read {path}: {error.strerror or error}; {again}") from error
    if f"{zlib.crc32(data):08x}" != checksum:
        raise TokscaleError(
            f"{path} is damaged, or was not written together with the JSON beside it; {again}"
        )
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as file:
            return dict(file.items())
    except _DAMAGE as error:
        raise TokscaleError(f"{path} is damaged ({error!r}); {again}") from error


def file_checksum(path: Path) -> str:
    """Return the CRC-32 of a file in hexadecimal, read a few megabytes at a time."""
    found = 0
    with path.open("rb") as file:
        while block := file.read(_AT_ONCE):
            found = zlib.crc32(block, found)
    return f"{found:08x}"
