"""The numeric columns of a CSV or parquet file. Shapes: K rows."""

from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from megatron_tokscale.core.arrays import Floats
from megatron_tokscale.core.errors import TokscaleError

_LARGEST_BLOCK: Final = 2**31 - 1  # bytes, of pyarrow's CSV reader
_PARQUET: Final = (".parquet", ".pq")


@dataclass(frozen=True)
class Table:
    """Columns of one file.

    Attributes:
        path: the file.
        names: names of the numeric columns, in their order.
        value_JK: their values; NaN where a cell is empty.
    """

    path: Path
    names: tuple[str, ...]
    value_JK: tuple[Floats, ...]

    def column(self, name: str) -> Floats:
        """Return the column of a name.

        Raises:
            TokscaleError: no numeric column has the name, or two have it.
        """
        if self.names.count(name) != 1:
            there = "twice" if name in self.names else "not"
            raise TokscaleError(
                f"column '{name}' of numbers is {there} in {self.path}; expected it once; its "
                f"columns of numbers are {', '.join(self.names) or 'none'}"
            )
        return self.value_JK[self.names.index(name)]


def read_table(path: Path) -> Table:
    """Read a table whose first row names the columns; a file ends in .parquet or is CSV.

    A column in which a cell is neither a number nor empty is left out. Empty cells, and those that
    say NaN, NA or null, are missing. Integers above 2^53 are rounded to float64.

    Raises:
        TokscaleError: the file cannot be read, or has no rows.
    """
    try:
        table = _read(path)
        names = table.column_names  # decoded only here
    except (OSError, pa.ArrowException, ValueError) as error:  # a NUL in `path`, names not in UTF-8
        reason = str(error).splitlines()[0] if str(error) else repr(error)
        raise TokscaleError(
            f"cannot read the table {path}: {reason}; expected CSV in UTF-8 with a row of names, "
            "or parquet"
        ) from error
    if not table.num_rows:
        raise TokscaleError(f"{path} has no rows; expected one for each logged step")
    columns = zip(names, table.columns, strict=True)
    numeric = [(name, column) for name, column in columns if _is_numeric(column.type)]
    values = tuple(_floats(column) for _, column in numeric)
    return Table(path, tuple(name for name, _ in numeric), values)


def _read(path: Path) -> pa.Table:
    if path.suffix.lower() in _PARQUET:
        return pyarrow.parquet.read_table(path)
    # Types are found in the first block, so that one block must hold the whole file.
    size = min(path.stat().st_size + 1, _LARGEST_BLOCK)
    return pyarrow.csv.read_csv(path, read_options=pyarrow.csv.ReadOptions(block_size=size))


def _is_numeric(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_null(kind))


def _floats(column: pa.ChunkedArray) -> Floats:
    # A safe cast refuses integers above 2^53, which float64 rounds.
    return np.asarray(column.cast(pa.float64(), safe=False).to_numpy(), dtype=np.float64)
