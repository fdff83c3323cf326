"""Reading a result: it is whole and of the schema that is known, or one line says what to do."""

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_tokscale.errors import TokscaleError
from megatron_tokscale.files import check_schema, read_json


def read_result(path: Path, schema: int, again: str) -> dict[str, Any]:
    """A JSON file of just this schema.

    Raises:
        TokscaleError: it is missing or damaged, or of another schema; `again` is what to do then.
    """
    content = read_json(path)
    found = int(content.get("schema_version", 0))
    check_schema(path, found, schema)
    if found < schema:
        raise TokscaleError(f"{path} is of an older schema; {again}")
    return content


def read_arrays(path: Path, again: str) -> dict[str, NDArray[Any]]:
    """The arrays of an .npz file by name.

    Raises:
        TokscaleError: it is missing or damaged; `again` is what to do then.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            return dict(file.items())
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise TokscaleError(f"{path} is missing or damaged ({error}); {again}") from error
