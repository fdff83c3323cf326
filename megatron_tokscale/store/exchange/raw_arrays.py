"""Arrays in .npy, .npz and safetensors files, read in pieces through plain file reads.

A memory map would do, but its pages count as memory of the process, and a deflated member of an
.npz file has none.

Shapes: N rows, K columns, n rows of a piece.
"""

import json
import math
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from tokenize import TokenError
from typing import IO, Final

import numpy as np

from megatron_tokscale.core.arrays import AnyArray

PIECE_VALUES: Final = 2**22
"""Numbers of a piece: 16 MB in float32, of which a few copies are in memory at a time. Our choice:
larger pieces are not faster."""
_SAFETENSORS: Final = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
    "I8": "|i1",
    "U8": "|u1",
    "BOOL": "|b1",
}
"""numpy's types by safetensors' names of them."""


@dataclass(frozen=True)
class RawArray:
    """An array in a file that is read in pieces.

    Attributes:
        shape: its shape.
        dtype: type of its values.
        is_column_major: true if it is stored column by column.
        opened: opens the file at the array's first byte.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[np.generic]
    is_column_major: bool
    opened: Callable[[], AbstractContextManager[IO[bytes]]]

    def pieces(self) -> Iterator[tuple[slice, AnyArray]]:
        """Yield the array by pieces: (slice of columns, rows of these columns).

        The rows of a column come in order. A one-dimensional array has no columns: its pieces have
        one dimension.

        Raises:
            OSError, ValueError: the file ends early.
        """
        if self.is_column_major and len(self.shape) == 2:
            with self.opened() as file:
                for k in range(self.shape[1]):
                    for piece in self._read(file, self.shape[0], ()):
                        yield slice(k, k + 1), piece[:, None]
            return
        columns = slice(0, int(np.prod(self.shape[1:])))
        with self.opened() as file:
            # An array without dimensions is one row.
            for piece in self._read(file, (*self.shape, 1)[0], self.shape[1:]):
                yield columns, piece

    def _read(self, file: IO[bytes], n_rows: int, row: tuple[int, ...]) -> Iterator[AnyArray]:
        """Yield the next `n_rows` rows of shape `row`."""
        per_row = max(int(np.prod(row)), 1)
        at_once = max(PIECE_VALUES // per_row, 1)
        for start in range(0, n_rows, at_once):
            count = min(at_once, n_rows - start)
            n_bytes = count * per_row * self.dtype.itemsize
            data = file.read(n_bytes)
            if len(data) < n_bytes:
                raise ValueError("it ends early")
            yield np.frombuffer(data, self.dtype).reshape(count, *row)


def npy_array(path: Path) -> RawArray:
    """Return the array of an .npy file.

    Raises:
        OSError, ValueError: the file cannot be read or is no .npy file.
    """
    with path.open("rb") as file:
        shape, is_column_major, dtype = _read_header(file)
        start = file.tell()
    _check_size(shape, dtype, path.stat().st_size - start)

    def opened() -> IO[bytes]:
        file = path.open("rb")
        file.seek(start)
        return file

    return RawArray(shape, dtype, is_column_major, opened)


def npz_arrays(path: Path) -> dict[str, RawArray]:
    """Return the arrays of an .npz file by name; members that are no arrays are left out.

    Raises:
        OSError, ValueError, RuntimeError, zipfile.BadZipFile: the file cannot be read or is no
            .npz file.
    """
    with zipfile.ZipFile(path) as archive:
        members = [name for name in archive.namelist() if name.endswith(".npy")]
        if len(set(members)) < len(members):
            raise ValueError("two of its arrays have one name")
        return {name.removesuffix(".npy"): _member(path, archive, name) for name in members}


def _member(path: Path, archive: zipfile.ZipFile, name: str) -> RawArray:
    with archive.open(name) as file:
        shape, is_column_major, dtype = _read_header(file)
        _check_size(shape, dtype, archive.getinfo(name).file_size - file.tell())

    def opened() -> IO[bytes]:
        with zipfile.ZipFile(path) as again:
            file = again.open(name)  # keeps the file open after its archive is closed
        _read_header(file)
        return file

    return RawArray(shape, dtype, is_column_major, opened)


def _read_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[np.generic]]:
    """Return shape, order and type of the .npy array that begins here.

    Raises:
        ValueError: no array begins here, or one of Python objects, which reading would run.
    """
    version = np.lib.format.read_magic(file)
    try:
        if version == (1, 0):
            shape, is_column_major, dtype = np.lib.format.read_array_header_1_0(file)
        else:
            shape, is_column_major, dtype = np.lib.format.read_array_header_2_0(file)
    except (ValueError, MemoryError, RecursionError, TokenError) as error:
        # numpy's own message advises to unpickle.
        raise ValueError("the header of an array is damaged") from error
    if dtype.hasobject:
        raise ValueError("it has Python objects, which are not read")
    return shape, is_column_major and len(shape) > 1, dtype


def _check_size(shape: tuple[int, ...], dtype: np.dtype[np.generic], n_bytes: int) -> None:
    """Refuse a shape that is none, or that needs more than the `n_bytes` that are there.

    Raises:
        ValueError: the shape is such.
    """
    if any(isinstance(size, bool) or size < 0 for size in shape):
        raise ValueError(f"an array has the shape {shape}")
    if math.prod(shape) * dtype.itemsize > n_bytes:
        raise ValueError(f"it ends early: an array of shape {shape} has {n_bytes} bytes")


def safetensors_arrays(path: Path) -> dict[str, RawArray]:
    """Return the arrays of a safetensors file by name, without types that numpy does not have.

    Raises:
        OSError, ValueError, KeyError, TypeError: the file cannot be read or is no safetensors file.
    """
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8).ljust(8, b"\0"))
        if not 0 < length < path.stat().st_size:
            raise ValueError("it is no safetensors file")
        header = json.loads(file.read(length))
    if not isinstance(header, dict):
        raise ValueError("it is no safetensors file")
    tensors = {name: about for name, about in header.items() if name != "__metadata__"}
    found = {
        name: _tensor(path, 8 + length, about)
        for name, about in tensors.items()
        if about["dtype"] in _SAFETENSORS
    }
    if tensors and not found:
        types = ", ".join(sorted({str(about["dtype"]) for about in tensors.values()}))
        raise ValueError(f"its arrays are of {types}, which numpy does not have")
    return found


def _tensor(path: Path, data: int, about: Mapping[str, object]) -> RawArray:
    dtype = np.dtype(_SAFETENSORS[str(about["dtype"])])
    begin, end = (int(each) for each in about["data_offsets"])  # type: ignore[attr-defined]
    shape = tuple(int(each) for each in about["shape"])  # type: ignore[attr-defined]
    n_bytes = math.prod(shape) * dtype.itemsize
    if min(begin, *shape, 0) < 0 or end - begin != n_bytes:
        raise ValueError(f"an array of shape {shape} has {end - begin} bytes from byte {begin}")
    _check_size(shape, dtype, path.stat().st_size - data - begin)

    def opened() -> IO[bytes]:
        file = path.open("rb")
        file.seek(data + begin)
        return file

    return RawArray(shape, dtype, False, opened)
