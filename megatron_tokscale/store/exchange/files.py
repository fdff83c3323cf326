"""The arrays of a file by name, for every format that can be imported.

Shapes: N rows, K columns.
"""

import math
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol

import numpy as np

from megatron_tokscale.core.arrays import AnyArray
from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.store.exchange.raw_arrays import (
    PIECE_VALUES,
    npy_array,
    npz_arrays,
    safetensors_arrays,
)

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

MATRIX: Final = "loss_matrix"
VALUES: Final = "axis_values"
"""Names of the two arrays of the interchange format; of a table, the columns with numbers as names,
and these numbers."""
_DAMAGE: Final = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    EOFError,
    OverflowError,
    RuntimeError,  # an encrypted member, a compression that zipfile lacks, JSON nested too deep
)


class Array(Protocol):
    """An array in a file, read in pieces; see `RawArray`."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""

    @property
    def dtype(self) -> np.dtype[np.generic]:
        """Type of its values."""

    def pieces(self) -> Iterator[tuple[slice, AnyArray]]:
        """Yield slices of columns, and the next rows of these columns."""


@dataclass(frozen=True)
class ArrayFile:
    """An opened file of arrays. Make one with `ArrayFile.open`.

    Attributes:
        path: the file.
        arrays: its arrays by name; the one array of an .npy file has the name of the matrix.
    """

    path: Path
    arrays: Mapping[str, Array]

    @classmethod
    def open(cls, path: Path) -> "ArrayFile":
        """Open a file; the end of its name says which format it has.

        Raises:
            TokscaleError: the file is missing or damaged, or of a format that is not read.
        """
        if path.suffix not in _READERS:
            raise TokscaleError(
                f"{path} has the end '{path.suffix}'; expected {', '.join(_READERS)}, a manifest "
                "(.json, .csv) or a run directory; convert the file"
            )
        with damage_named(path):
            return cls(path, _READERS[path.suffix](path))

    def pieces(self, name: str) -> Iterator[tuple[slice, AnyArray]]:
        """Yield the pieces of an array; see `RawArray.pieces`.

        Raises:
            TokscaleError: the file is damaged.
        """
        with damage_named(self.path):
            yield from self.arrays[name].pieces()

    def small(self, name: str) -> AnyArray:
        """Return a whole array as one dimension; one without dimensions has one value.

        Raises:
            TokscaleError: the file is damaged.
        """
        pieces = [piece.ravel() for _, piece in self.pieces(name)]
        return np.concatenate(pieces) if pieces else np.zeros(0, self.arrays[name].dtype)


@contextmanager
def damage_named(path: Path) -> Iterator[None]:
    """Turn the errors of reading a damaged file into a `TokscaleError` that names it."""
    try:
        yield
    except FileNotFoundError as error:
        raise TokscaleError(f"{path} is not there; name a file of losses") from error
    except (*_DAMAGE, zipfile.BadZipFile, zlib.error) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise TokscaleError(
            f"{path} cannot be read ({reason}); expected whole {path.suffix} data; restore it"
        ) from error


@dataclass(frozen=True)
class _Held:
    """An array in memory."""

    array: AnyArray

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    @property
    def dtype(self) -> np.dtype[np.generic]:
        return self.array.dtype

    def pieces(self) -> Iterator[tuple[slice, AnyArray]]:
        yield slice(0, 1), self.array


@dataclass(frozen=True)
class _TableColumns:
    """Columns of a parquet file: one as an array, or several of one type as a matrix.

    Attributes:
        path: the file.
        names: names of the columns.
        shape: shape of the array or the matrix.
        dtype: type of its values.
    """

    path: Path
    names: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: np.dtype[np.generic]

    def pieces(self) -> Iterator[tuple[slice, AnyArray]]:
        import pyarrow.parquet as pq

        # One column of one row group at a time: pyarrow's own batches keep several groups.
        with pq.ParquetFile(self.path) as file:
            for group in range(file.num_row_groups):
                for k, name in enumerate(self.names):
                    column = file.read_row_group(group, columns=[name]).column(0)
                    yield from self._rows(k, column.combine_chunks())

    def _rows(self, k: int, column: "pa.Array") -> Iterator[tuple[slice, AnyArray]]:
        """Yield the rows of column number `k` in a row group."""
        if len(self.shape) == 1:
            yield slice(0, 1), _numbers(column)
        elif len(self.names) > 1:
            yield slice(k, k + 1), _numbers(column)[:, None].astype(self.dtype, copy=False)
        else:  # lists
            rows = max(PIECE_VALUES // max(self.shape[1], 1), 1)
            for start in range(0, len(column), rows):
                lists = column.slice(start, rows)
                self._check_lengths(lists)
                values = _numbers(lists.flatten())
                yield slice(0, self.shape[1]), values.reshape(-1, self.shape[1])

    def _check_lengths(self, lists: "pa.Array") -> None:
        """Refuse a missing list, or one of another length, whose numbers would move to others."""
        import pyarrow.compute as pc

        lengths = pc.list_value_length(lists)
        if lists.null_count or pc.any(pc.not_equal(lengths, self.shape[1])).as_py():
            raise ValueError(
                f"a list of column '{self.names[0]}' is missing, or not of {self.shape[1]} numbers"
            )


def _numbers(column: object) -> AnyArray:
    """Return a pyarrow array as a numpy array; a missing number is NaN."""
    return np.asarray(column.to_numpy(zero_copy_only=False))  # type: ignore[attr-defined]


def _parquet_arrays(path: Path) -> dict[str, Array]:
    """Return the columns of a parquet file, and the matrix of those with numbers as names."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            schema, n_rows = file.schema_arrow, file.metadata.num_rows
            found: dict[str, Array] = {
                field.name: _column(path, file, field.name) for field in schema
            }
    except pa.ArrowException as error:
        raise ValueError(str(error)) from error
    numbered = [name for name in found if _is_number(name)]
    if numbered:
        dtype = np.result_type(*(found[name].dtype for name in numbered))
        found[MATRIX] = _TableColumns(path, tuple(numbered), (n_rows, len(numbered)), dtype)
        found[VALUES] = _Held(np.array([float(name) for name in numbered]))
    return found


def _column(path: Path, file: "pq.ParquetFile", name: str) -> Array:
    import pyarrow as pa

    kind, n_rows = file.schema_arrow.field(name).type, file.metadata.num_rows
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        first = next(file.iter_batches(1, columns=[name]), None)
        width = 0 if first is None else len(first.column(0)[0].as_py() or ())
        return _TableColumns(path, (name,), (n_rows, width), _dtype_of(kind.value_type))
    return _TableColumns(path, (name,), (n_rows,), _dtype_of(kind))


def _dtype_of(kind: object) -> np.dtype[np.generic]:
    try:
        return np.dtype(kind.to_pandas_dtype())  # type: ignore[attr-defined]
    except NotImplementedError:
        return np.dtype(object)


def _is_number(name: str) -> bool:
    try:
        return math.isfinite(float(name))
    except ValueError:
        return False


_READERS: Final[dict[str, Callable[[Path], Mapping[str, Array]]]] = {
    ".npz": npz_arrays,
    ".npy": lambda path: {MATRIX: npy_array(path)},
    ".safetensors": safetensors_arrays,
    ".parquet": _parquet_arrays,
}
