"""The part of run.json that only an imported run has, and the file of what is known of its tokens.

Shapes: N watched tokens, K columns of the imported matrix.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Final, Literal, cast

import numpy as np

from megatron_tokscale.core.arrays import AnyArray
from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.core.files import whole_or_absent
from megatron_tokscale.core.schemas import TOKENS_SCHEMA
from megatron_tokscale.core.tensors import TensorFile
from megatron_tokscale.store.tokens import ImportedTokens, TokenColumns

type Axis = Literal["T", "D", "M"]
"""The axis of a matrix: T, training time of one run; D, training tokens, and M, model size, each
over several runs, with a column per run."""

_FILE: Final = TensorFile(
    "tokscale-tokens", TOKENS_SCHEMA, "file of imported tokens", "megatron-tokscale import"
)
_DTYPES: Final[dict[str, type[np.generic]]] = {
    field.name: np.int16 if field.name == "dataset_N" else np.int32
    for field in fields(TokenColumns)
}


@dataclass(frozen=True)
class ImportedColumn:
    """One column of an imported matrix.

    Attributes:
        step: the step in the name of its losses file: a step of training, or a number from 0 where
            the axis does not count steps.
        value: its value on the axis, as it was in the source.
    """

    step: int
    value: float


@dataclass(frozen=True)
class Imported:
    """Source of the losses of an imported run, and their axis.

    Attributes:
        source: name of the file.
        sha256: its SHA-256.
        axis: the axis of the matrix.
        axis_name: name of the axis in the file; empty if it had none.
        unit: unit of the axis, such as step or tokens; None if it is not known.
        columns: the columns by ascending value; on D and M, values may be equal.
        seed: seed of the training; None if it is not known.
    """

    source: str
    sha256: str
    axis: Axis
    axis_name: str
    unit: str | None
    columns: tuple[ImportedColumn, ...]
    seed: int | None = None

    @property
    def counts_steps(self) -> bool:
        """True if the axis is training time in steps, as of a run of a job with the plugin."""
        return self.axis == "T" and self.unit == "step"

    @property
    def value_of(self) -> dict[int, float]:
        """Values on the axis by the step in the names of the losses files."""
        return {column.step: column.value for column in self.columns}

    @property
    def named(self) -> str:
        """The axis, its name in the file and its unit: "M (model_size, in parameters)"."""
        unit = f"in {self.unit}" if self.unit else "unit unknown"
        named = self.axis_name and self.axis_name.lower() not in (self.axis.lower(), self.unit)
        return f"{self.axis} ({self.axis_name}, {unit})" if named else f"{self.axis} ({unit})"


def fingerprint_of(columns: TokenColumns, *identity: str) -> str:
    """Return the SHA-256 (first 16 hex digits) of token columns and of further words."""
    digest = hashlib.sha256(json.dumps(identity).encode())
    for name, array_N in columns.known().items():
        digest.update(f"{name}{array_N.shape}".encode())
        digest.update(np.ascontiguousarray(array_N, dtype=_DTYPES[name]).data)
    return digest.hexdigest()[:16]


def save_tokens(path: Path, tokens: ImportedTokens) -> None:
    """Write what is known of imported tokens to `path` (safetensors), whole or not at all."""
    from safetensors.numpy import save

    known = {
        name: np.ascontiguousarray(array_N, dtype=_DTYPES[name])
        for name, array_N in tokens.columns.known().items()
    }
    metadata = _FILE.metadata(
        tokens.fingerprint,
        details="null",
        n_tokens=str(tokens.n_tokens),
        datasets=json.dumps(list(tokens.datasets)),
        vocab_size=json.dumps(tokens.vocab_size),
        columns=json.dumps(sorted(known)),
        content=fingerprint_of(tokens.columns),
    )
    with whole_or_absent(path) as temporary:
        temporary.write_bytes(save(cast("dict[str, AnyArray]", known), metadata))


def load_tokens(path: Path) -> ImportedTokens:
    """Read what is known of imported tokens, and check it against its checksum.

    Raises:
        TokscaleError: the file is missing, damaged, of another schema or of another kind.
    """
    _, metadata = _FILE.read(path, [])
    try:
        names = [str(name) for name in json.loads(metadata["columns"])]
        arrays, _ = _FILE.read(path, names)
        return _checked(arrays, metadata)
    except (KeyError, TypeError, ValueError) as error:
        raise TokscaleError(f"{path} is damaged ({error}); import the losses again") from error


def _checked(arrays: Mapping[str, AnyArray], metadata: Mapping[str, str]) -> ImportedTokens:
    """Return the tokens of these arrays; a ValueError names the fault if they do not fit."""
    n_tokens = int(metadata["n_tokens"])
    for name, array_N in arrays.items():
        if array_N.dtype != _DTYPES[name] or array_N.shape != (n_tokens,):
            raise ValueError(f"{name} has type {array_N.dtype}, shape {array_N.shape}")
    columns = TokenColumns(**arrays)  # type: ignore[arg-type] # types checked above
    if fingerprint_of(columns) != metadata["content"]:
        raise ValueError("its checksum is wrong")
    vocab_size = json.loads(metadata["vocab_size"])
    return ImportedTokens(
        n_tokens=n_tokens,
        fingerprint=metadata["fingerprint"],
        datasets=tuple(str(name) for name in json.loads(metadata["datasets"])),
        columns=columns,
        vocab_size=None if vocab_size is None else int(vocab_size),
    )
