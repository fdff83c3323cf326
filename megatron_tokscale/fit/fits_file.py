"""The parquet file of a table of fits: written block by block, read by its row groups.

The file's metadata has the key "tokscale", whose value is JSON: the schema version, the probes' x,
and the run and the losses that were fitted.

Shapes: K probe steps.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_tokscale.core.arrays import Floats
from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.core.files import check_schema, schema_version, whole_or_absent
from megatron_tokscale.core.records import JSON, from_json
from megatron_tokscale.core.schemas import FITS_SCHEMA
from megatron_tokscale.fit.probe_axis import x_as_metadata

if TYPE_CHECKING:
    import pyarrow as pa

_KIND = "tokscale-fits"
"""Kind of the file in its metadata, which other parquet files lack."""


class FitsWriter:
    """A parquet file of fits that is written block by block, whole or absent.

    Use it as a context manager: the file appears when the context ends without an error.
    """

    def __init__(self, path: Path, x_K: Floats, metadata: Mapping[str, JSON]) -> None:
        self._path = path
        self._open = ExitStack()
        self._metadata = {
            **metadata,
            "kind": _KIND,
            "schema_version": FITS_SCHEMA,
            "x": x_as_metadata(x_K),
        }
        self._writer: pa.parquet.ParquetWriter | None = None

    def __enter__(self) -> "FitsWriter":
        self._temporary = self._open.enter_context(whole_or_absent(self._path))
        return self

    def append(self, table: "pa.Table") -> None:
        """Add the rows of a pyarrow table (`SigmoidFits.to_arrow`) as one row group."""
        import pyarrow.parquet as pq

        if self._writer is None:
            schema = table.schema.with_metadata({"tokscale": json.dumps(self._metadata)})
            self._writer = self._open.enter_context(
                pq.ParquetWriter(self._temporary, schema, compression="zstd")
            )
        self._writer.write_table(table)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._open.__exit__(kind, error, traceback)


def read_metadata(path: Path) -> dict[str, JSON]:
    """Return the metadata of a table of fits: its run, its losses, and its probes' x.

    Raises:
        TokscaleError: the file is missing, damaged, of another schema, or not a table of fits.
    """
    import pyarrow.parquet as pq

    with _damage_named(path):
        metadata: dict[str, JSON] = dict(
            json.loads((pq.read_schema(path).metadata or {}).get(b"tokscale", b"{}"))
        )
    if metadata.get("kind") != _KIND:
        raise TokscaleError(f"{path} is not a table of fits; make one with `megatron-tokscale fit`")
    check_schema(path, schema_version(path, metadata), FITS_SCHEMA, "fit the run again")
    return metadata


def read_rows(path: Path, names: Sequence[str]) -> tuple[Floats, Iterator[list[Any]]]:
    """Return the probes' x, and an iterator over the row groups: their columns `names`, in order.

    The columns are arrays of the types that pyarrow gives them.

    Raises:
        TokscaleError: as `read_metadata`; the iterator raises it too.
    """
    import pyarrow.parquet as pq

    metadata = read_metadata(path)
    with _damage_named(path):
        x_row = from_json(list[float | None], metadata["x"], "x")
        x_K = np.array([-np.inf if x is None else x for x in x_row], dtype=np.float64)

    def groups() -> Iterator[list[Any]]:
        with _damage_named(path):
            file = pq.ParquetFile(path)
        with file:
            for group in range(file.num_row_groups):
                with _damage_named(path):
                    table = file.read_row_group(group, columns=names)
                    columns = [table[name].to_numpy() for name in names]
                yield columns

    return x_K, groups()


@contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    """Turn the errors of reading a damaged table of fits into a `TokscaleError`."""
    import pyarrow as pa

    try:
        yield
    except OSError as error:
        raise TokscaleError(f"cannot read fits {path}: {error.strerror or error}") from error
    except (pa.ArrowException, KeyError, TypeError, ValueError) as error:
        raise TokscaleError(f"fits {path} are damaged ({error}); fit the run again") from error
