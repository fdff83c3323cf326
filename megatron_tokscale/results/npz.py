"""Frozen dataclasses of arrays as .npz files, and back.

A field's annotation gives the type of the numbers; the part of its name after the last underscore
gives the axes, one character each: `measured_interval_D2G: Floats` has three axes of float64.
"""

import typing
from pathlib import Path
from typing import Final

import numpy as np

from megatron_tokscale.core.arrays import Floats, Floats32, Integers
from megatron_tokscale.core.checked import read_arrays, write_arrays
from megatron_tokscale.core.errors import TokscaleError

_NUMBERS: Final[dict[object, type[np.generic]]] = {
    Floats: np.float64,
    Floats32: np.float32,
    Integers: np.int64,
}
"""Types of numbers by the annotation of an array."""


def write_npz(path: Path, arrays: object) -> str:
    """Write a dataclass of arrays, whole or not at all; return the CRC-32 of the file."""
    return write_arrays(path, vars(arrays))


def read_npz[T](kind: type[T], path: Path, checksum: str, again: str) -> T:
    """Read the dataclass of arrays that `write_npz` wrote, if the file's CRC-32 is `checksum`.

    Args:
        kind: the dataclass.
        path: the file.
        checksum: as the JSON file beside it gives it.
        again: what to do about a file that cannot be used, e.g. "run `...` again".

    Raises:
        TokscaleError: the file is missing or damaged, has another checksum, or has other arrays
            than `kind`.
    """
    found = read_arrays(path, checksum, again)
    expected = array_forms(kind)
    for name in sorted(found.keys() ^ expected.keys()):
        state = "is missing" if name in expected else "is unknown"
        raise TokscaleError(f"{path} is damaged: array {name} {state}; {again}")
    for name, (dtype, n_axes) in expected.items():
        array = found[name]
        if array.dtype != dtype or array.ndim != n_axes:
            raise TokscaleError(
                f"{path} is damaged: array {name} has type {array.dtype} and {array.ndim} axes; "
                f"expected {dtype} and {n_axes}; {again}"
            )
    return kind(**found)


def array_forms(kind: type) -> dict[str, tuple[np.dtype[np.generic], int]]:
    """Return the type of the numbers and the number of axes of every array of a dataclass."""
    return {
        name: (np.dtype(_NUMBERS[annotation]), len(name.rpartition("_")[2]))
        for name, annotation in typing.get_type_hints(kind).items()
    }
