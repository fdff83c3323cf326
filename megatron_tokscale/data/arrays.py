"""Arrays in files: written once by one rank, mapped by all the others."""

from collections.abc import Iterator
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import DTypeLike, NDArray

from megatron_tokscale.errors import TokscaleError
from megatron_tokscale.files import whole_or_absent

_BLOCK: Final = 1 << 22


def write_array(file: Path, array: NDArray[np.generic]) -> None:
    """Write an array in numpy's format, whole or not at all."""
    with whole_or_absent(file) as temporary, temporary.open("wb") as stream:
        np.save(stream, array)


def map_array(
    file: Path, shape: tuple[int, ...], *dtypes: DTypeLike, what: str = "index"
) -> NDArray[np.generic]:
    """Map an array that must have this shape and one of these types.

    Raises:
        TokscaleError: the file is missing, damaged, or holds something else.
    """
    try:
        array = np.load(file, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError as error:
        raise TokscaleError(
            f"{what} file {file} is not there; is this directory shared by all nodes?"
        ) from error
    except (OSError, ValueError, EOFError) as error:
        raise TokscaleError(f"{what} file {file} is damaged ({error}); remove it") from error
    if array.shape != shape or array.dtype not in dtypes:
        raise TokscaleError(f"{what} file {file} is not what its name says; remove it")
    # A plain view: indexing a memmap runs Python code for every element.
    return np.asarray(array.view(np.ndarray))


def blocks(start: int, stop: int) -> Iterator[slice]:
    """Slices that keep the temporary arrays of a large array small."""
    for begin in range(start, stop, _BLOCK):
        yield slice(begin, min(begin + _BLOCK, stop))
