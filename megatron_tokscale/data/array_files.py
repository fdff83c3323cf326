"""Arrays in files that one rank writes once and all the others map."""

import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import DTypeLike, NDArray

from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.core.files import whole_or_absent

_BLOCK: Final = 1 << 22
"""Bytes, or array elements, at once: their temporary arrays stay far below a gigabyte."""


def write_array(file: Path, array: NDArray[np.generic]) -> None:
    """Write an array in numpy's format, and a checksum behind it, whole or not at all."""
    with whole_or_absent(file) as temporary:
        with temporary.open("wb") as stream:
            np.save(stream, array)
        checksum = _checksum(temporary, temporary.stat().st_size)
        with temporary.open("ab") as stream:
            stream.write(checksum)


def is_right(file: Path) -> bool:
    """Return whether a file that `write_array` wrote is as it was written; it is read once.

    A file of an older version has no checksum; it passes if its length is right.
    """
    try:
        array = np.load(file, mmap_mode="r", allow_pickle=False)
        end, size = array.offset + array.nbytes, file.stat().st_size
        if size == end:
            return True
        with file.open("rb") as stream:
            stream.seek(end)
            return stream.read() == _checksum(file, end)
    except (OSError, ValueError, EOFError):
        return False


def check_array(file: Path) -> None:
    """Refuse a file that is not as `write_array` wrote it.

    Raises:
        TokscaleError: naming the file.
    """
    if not is_right(file):
        raise TokscaleError(
            f"index file {file} is damaged: its checksum is wrong; expected the one written behind "
            "it; remove it, and the next job of the plan makes it again"
        )


def _checksum(file: Path, size: int) -> bytes:
    """Return the CRC-32 of the first `size` bytes of a file."""
    found = 0
    with file.open("rb") as stream:
        while size and (block := stream.read(min(_BLOCK, size))):
            found, size = zlib.crc32(block, found), size - len(block)
    return found.to_bytes(4)


def map_array(file: Path, shape: tuple[int, ...], *dtypes: DTypeLike) -> NDArray[np.generic]:
    """Map an array of a plan.

    Args:
        file: where it is.
        shape: the shape that it must have.
        dtypes: the types that it may have.

    Raises:
        TokscaleError: the file is missing, damaged, or holds something else.
    """
    name = f"index file {file}"
    array = open_array(file, name, "; is this directory shared by all nodes?", "remove it")
    if array.shape != shape or array.dtype not in dtypes:
        raise TokscaleError(
            f"{name} holds {array.dtype} of shape {array.shape}; expected shape {shape} of "
            f"{' or '.join(np.dtype(dtype).name for dtype in dtypes)}; remove it"
        )
    return array


def open_array(
    file: Path | str, name: str, if_missing: str, if_damaged: str
) -> NDArray[np.generic]:
    """Map an array.

    Args:
        file: where it is.
        name: its name in messages.
        if_missing: the end of the message that it is not there.
        if_damaged: the remedy in the message that it cannot be read.

    Raises:
        TokscaleError: the file is missing or damaged.
    """
    try:
        array = np.load(file, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError as error:
        raise TokscaleError(f"{name} is not there{if_missing}") from error
    except (OSError, ValueError, EOFError) as error:
        raise TokscaleError(f"{name} is damaged ({error}); {if_damaged}") from error
    # A plain view: indexing a memmap runs Python code for every element.
    return np.asarray(array.view(np.ndarray))


def blocks(start: int, stop: int) -> Iterator[slice]:
    """Yield slices of a range that keep the temporary arrays of a large array small."""
    for begin in range(start, stop, _BLOCK):
        yield slice(begin, min(begin + _BLOCK, stop))
