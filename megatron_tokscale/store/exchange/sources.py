"""A source of losses that is checked and ready to be imported, and the settings that describe it.

Shapes: N tokens, K columns.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final, cast

import numpy as np

from megatron_tokscale.core.arrays import AnyFloats, Floats, Integers
from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.core.records import from_json
from megatron_tokscale.store.exchange.axes import UNITS, check_values, find_axis, read_values
from megatron_tokscale.store.exchange.files import MATRIX, VALUES, ArrayFile
from megatron_tokscale.store.exchange.manifest import FileFacts, check_manifest
from megatron_tokscale.store.exchange.token_arrays import TokenArrays
from megatron_tokscale.store.imported import Axis

AXIS_NAME: Final = "axis_name"
SAMPLE: Final = "sample_id"
POSITION: Final = "token_pos"
OWN: Final = "tokscale"
"""Name of the array, a JSON text, by which `export` says what its metadata arrays hold."""
INTERCHANGE_FILE: Final = "losses.npz"
_HASHED_AT_ONCE: Final = 2**22


@dataclass(frozen=True, kw_only=True)
class ImportSettings:
    """Settings of an import by the user; None where the file says it, or nobody does.

    Attributes:
        axis: the axis of the matrix.
        unit: unit of the axis, such as step, tokens or billion-tokens.
        array: name of the matrix in the file.
        values: values of the axis: numbers between commas, a file, or the name of an array.
        arrays: names of the arrays that say something of the tokens.
        vocab_size: size of the vocabulary.
        size: size of the model of a matrix along T, by its measure: parameters, non_embedding or
            flops_per_token.
        training_tokens: tokens that the run of a matrix along T was trained on by its last column.
        seed: seed of the training of a matrix along T.
        tokens_name: a name for the watched tokens; runs with one name watch the same tokens.
        checks_manifest: compare the file with the manifest.yaml beside it.
    """

    axis: Axis | None = None
    unit: str | None = None
    array: str | None = None
    values: str | None = None
    arrays: TokenArrays = field(default_factory=TokenArrays)
    vocab_size: int | None = None
    size: Mapping[str, int] = field(default_factory=dict)
    training_tokens: int | None = None
    seed: int | None = None
    tokens_name: str | None = None
    checks_manifest: bool = True


@dataclass(frozen=True, kw_only=True)
class OwnMetadata:
    """Metadata that `export` adds to the interchange format, so that `import` restores the run.

    Attributes:
        fingerprint: fingerprint of the watched tokens.
        datasets: names of the datasets, in their order.
        vocab_size: size of the vocabulary; None if it is not known.
        unit: unit of the axis; None if it is not known.
        consumed_tokens: training tokens consumed at each column; null where unknown.
        arrays: names of the metadata arrays.
        version: version of the package.
    """

    fingerprint: str
    datasets: tuple[str, ...]
    vocab_size: int | None
    unit: str | None
    consumed_tokens: tuple[int | None, ...]
    arrays: dict[str, str]
    version: str


@dataclass(frozen=True)
class MatrixSource:
    """A file with a matrix of losses, checked. Make one with `MatrixSource.open`.

    Attributes:
        file: the file.
        settings: its description, completed from what the file says.
        axis: the axis of the matrix.
        axis_name: name of the axis in the file; empty if it has none.
        matrix: name of the matrix.
        value_K: values of the axis, in the order of the columns.
        own: what `export` has added; None for other files.
        sha256: SHA-256 of the file.
        manifest: a sentence on the manifest; None without one.
        unused: arrays of the file that are not imported.
    """

    file: ArrayFile
    settings: ImportSettings
    axis: Axis
    axis_name: str
    matrix: str
    value_K: Floats
    own: OwnMetadata | None
    sha256: str
    manifest: str | None
    unused: tuple[str, ...]

    @classmethod
    def open(cls, path: Path, settings: ImportSettings) -> "MatrixSource":
        """Open a file and check all that can be checked without reading the losses.

        Raises:
            TokscaleError: the file is missing or damaged, its matrix or axis is not found or
                unusable, or its manifest contradicts it.
        """
        path = path / INTERCHANGE_FILE if path.is_dir() else path
        file = ArrayFile.open(path)
        own = _own_metadata(file)
        settings = _completed(file, settings, own)
        matrix = _matrix_name(file, settings.array)
        value_K = read_values(file, settings.values, file.arrays[matrix].shape)
        axis_name = _axis_name(file)
        axis = find_axis(path, settings.axis, axis_name)
        unit = settings.unit or UNITS.get(axis_name.lower())
        check_values(path, axis, unit, value_K)
        sha256 = file_sha256(path)
        manifest = None
        if settings.checks_manifest:
            manifest = check_manifest(FileFacts(path, path.stat().st_size, sha256, file.arrays))
        used = {matrix, VALUES, AXIS_NAME, OWN, *settings.arrays.named, settings.values}
        used |= {SAMPLE} if own else set()  # `export` makes it from the other arrays
        numbered = file.path.suffix == ".parquet" and matrix == MATRIX
        unused = tuple(
            name for name in file.arrays if name not in used and not (numbered and _is_float(name))
        )
        settings = replace(settings, unit=unit)
        return cls(file, settings, axis, axis_name, matrix, value_K, own, sha256, manifest, unused)

    @property
    def n_tokens(self) -> int:
        """Number of tokens N."""
        return self.file.arrays[self.matrix].shape[0]

    @property
    def dtype(self) -> np.dtype[np.floating]:
        """Type of the losses, in the byte order of the machine."""
        dtype = self.file.arrays[self.matrix].dtype.newbyteorder("=")
        return cast("np.dtype[np.floating]", dtype)

    @property
    def order_K(self) -> Integers:
        """Columns by ascending value of the axis; equal values stay in their order."""
        return np.argsort(self.value_K, kind="stable")

    def pieces(self) -> Iterator[tuple[slice, AnyFloats]]:
        """Yield slices of columns, and the next losses of these columns.

        Raises:
            TokscaleError: the file is damaged.
        """
        return cast("Iterator[tuple[slice, AnyFloats]]", self.file.pieces(self.matrix))


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal, read a few megabytes at a time."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_HASHED_AT_ONCE):
            digest.update(block)
    return digest.hexdigest()


def _own_metadata(file: ArrayFile) -> OwnMetadata | None:
    if OWN not in file.arrays:
        return None
    try:
        return from_json(OwnMetadata, json.loads(_text(file, OWN)), OWN)
    except ValueError as error:
        raise TokscaleError(
            f"{file.path} is damaged: its array '{OWN}' is not as `megatron-tokscale export` "
            f"writes it ({error}); export the run again"
        ) from error


def _text(file: ArrayFile, name: str) -> str:
    """Return the text in an array with one string."""
    array = file.arrays[name]
    if math.prod(array.shape) != 1 or array.dtype.kind not in "USO":
        raise TokscaleError(
            f"array '{name}' of {file.path} has shape {array.shape} and type {array.dtype}; "
            "expected one string; write it again"
        )
    value = file.small(name).ravel()[0]
    return value.decode() if isinstance(value, bytes) else str(value)


def _completed(
    file: ArrayFile, settings: ImportSettings, own: OwnMetadata | None
) -> ImportSettings:
    """Return the settings with the arrays that the interchange format names, if they are there."""
    standard = {"samples": SAMPLE, "positions": POSITION} if MATRIX in file.arrays else {}
    known = own.arrays if own else standard
    found = {kind: name for kind, name in known.items() if name in file.arrays}
    given = {kind: name for kind, name in vars(settings.arrays).items() if name is not None}
    arrays = TokenArrays(**(found | given))
    if own is None:
        return replace(settings, arrays=arrays)
    return replace(
        settings,
        arrays=arrays,
        unit=settings.unit or own.unit,
        vocab_size=settings.vocab_size or own.vocab_size,
    )


def _matrix_name(file: ArrayFile, name: str | None) -> str:
    """Return the name of the matrix.

    Raises:
        TokscaleError: it is not there, is not the only one, or is not a matrix of real numbers.
    """
    matrices = [each for each, array in file.arrays.items() if len(array.shape) == 2]
    if name is None:
        if MATRIX not in file.arrays and len(matrices) != 1:
            raise TokscaleError(
                f"{file.path} has {len(matrices)} matrices among its arrays "
                f"{', '.join(file.arrays)}; expected one, or one with the name {MATRIX}; name it "
                "with --array"
            )
        name = MATRIX if MATRIX in file.arrays else matrices[0]
    if name not in file.arrays:
        raise TokscaleError(
            f"{file.path} has no array '{name}'; expected one of {', '.join(file.arrays)}"
        )
    array = file.arrays[name]
    is_real = array.dtype.kind == "f" and array.dtype.itemsize in (2, 4, 8)
    if len(array.shape) != 2 or not is_real or 0 in array.shape:
        raise TokscaleError(
            f"array '{name}' of {file.path} has shape {array.shape} and type {array.dtype}; "
            "expected losses of N tokens at K values of the axis, (N, K), of float16, float32 or "
            "float64; name another array with --array"
        )
    return name


def _axis_name(file: ArrayFile) -> str:
    return _text(file, AXIS_NAME).strip() if AXIS_NAME in file.arrays else ""


def _is_float(name: str) -> bool:
    try:
        return math.isfinite(float(name))
    except ValueError:
        return False
