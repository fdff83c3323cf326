"""The axis of an imported matrix: which one it is, and a value for every column.

Shapes: K columns.
"""

import math
from contextlib import suppress
from pathlib import Path
from typing import Final, cast

import numpy as np

from megatron_tokscale.core.arrays import Floats
from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.store.exchange.files import MATRIX, VALUES, ArrayFile
from megatron_tokscale.store.imported import Axis

_AXES: Final[dict[str, Axis]] = {"t": "T", "d": "D", "m": "M", "step": "T", "steps": "T"}
"""Axes by the names that leave no doubt; other names need --axis."""
_LARGEST: Final = 2.0**62
"""Largest step or number of training tokens: a 64-bit integer holds it."""
_LARGEST_VALUE: Final = 1e100
"""Largest value in other units; our choice: far above the FLOPs of any training."""
UNITS: Final = {"step": "step", "steps": "step", "tokens": "tokens"}
"""Units by the names of an axis that give them."""


def find_axis(path: Path, given: Axis | None, name: str) -> Axis:
    """Return the axis.

    Raises:
        TokscaleError: it is not known, or the file contradicts the user.
    """
    named = _AXES.get(name.lower())
    if given is None and named is None:
        state = f"names its axis '{name}'" if name else "does not name its axis"
        raise TokscaleError(
            f"{path} {state}; expected T (time), D (training tokens) or M (model size); give it "
            "with --axis"
        )
    if given and named and given != named:
        raise TokscaleError(
            f"{path} names its axis '{name}', --axis is {given}; leave --axis out, or correct it"
        )
    return cast("Axis", given or named)


def check_values(path: Path, axis: Axis, unit: str | None, value_K: Floats) -> None:
    """Refuse values that are no times or sizes.

    Raises:
        TokscaleError: a value is not finite, negative, too large, or 0 on D or M; two values along
            T are equal; or steps are not whole numbers.
    """
    least = 0 if axis == "T" else math.ulp(0.0)
    bad = [value for value in value_K.tolist() if not (math.isfinite(value) and value >= least)]
    if bad:
        raise TokscaleError(
            f"the axis {axis} of {path} has the value {bad[0]:g}; expected numbers "
            f"{'from' if axis == 'T' else 'above'} 0; correct the values, or give others with "
            "--values"
        )
    counts = unit in ("tokens", "billion-tokens") or (axis == "T" and unit == "step")
    scale = 1e9 if unit == "billion-tokens" else 1.0
    largest = _LARGEST / scale if counts else _LARGEST_VALUE
    if value_K.max() > largest:
        raise TokscaleError(
            f"the axis {axis} of {path} has the value {value_K.max():g}; expected at most "
            f"{largest:.2g}; correct the values, or the --unit"
        )
    equal = np.flatnonzero(np.diff(np.sort(value_K)) == 0)
    if axis == "T" and len(equal):
        raise TokscaleError(
            f"the axis T of {path} has the value {np.sort(value_K)[equal[0]]:g} twice; expected "
            "one column per time; leave a column out, or give the axis D or M"
        )
    if axis == "T" and unit == "step" and (value_K != np.round(value_K)).any():
        raise TokscaleError(
            f"the axis of {path} is in steps but its values are not whole numbers; give another "
            "--unit"
        )


def read_values(file: ArrayFile, given: str | None, shape: tuple[int, ...]) -> Floats:
    """Return the values of the axis of a matrix of shape (N, K), (K).

    Raises:
        TokscaleError: they are not given, cannot be read, or are not one per column.
    """
    if given is None and VALUES not in file.arrays:
        raise TokscaleError(
            f"{file.path} has no array {VALUES}; expected a value of the axis for each of its "
            f"{shape[1]} columns; give them with --values"
        )
    name = VALUES if given is None else given
    if name in file.arrays:
        array = file.arrays[name]
        if len(array.shape) != 1 or array.dtype.kind not in "iuf":
            raise TokscaleError(
                f"array '{name}' of {file.path} has shape {array.shape} and type {array.dtype}; "
                "expected a number per column; name another with --values"
            )
        _check_number(file, array.shape[0], shape)
        return file.small(name).astype(np.float64)
    value_K = _numbers(name)
    _check_number(file, len(value_K), shape)
    return value_K


def _check_number(file: ArrayFile, n_values: int, shape: tuple[int, ...]) -> None:
    """Refuse values that are not one per column, before they are read.

    Raises:
        TokscaleError: their number is another.
    """
    if n_values == shape[1]:
        return
    turned = "; its rows are as many: transpose it" if n_values == shape[0] else ""
    raise TokscaleError(
        f"{n_values} values of the axis are given for {file.path}, which has {shape[1]} columns"
        f"{turned}; expected one per column; give others with --values"
    )


def _numbers(given: str) -> Floats:
    """Return the numbers in a text with commas or spaces between them, or in a file of that name.

    Raises:
        TokscaleError: it is neither.
    """
    with suppress(ValueError):
        return _split(given)
    try:
        path = Path(given)
        if path.suffix == ".npy":
            return ArrayFile.open(path).small(MATRIX).astype(np.float64).ravel()
        return _split(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TokscaleError(
            f"--values {given[:60]} is no list of numbers, no array of the file and no file of "
            f"numbers ({getattr(error, 'strerror', None) or error}); expected one of them"
        ) from error


def _split(text: str) -> Floats:
    return np.array([float(word) for word in text.replace(",", " ").split()])
