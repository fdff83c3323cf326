"""One losses file: the loss of every watched token at one probe step.

Shapes: N watched tokens.
"""

import json
import re
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Final, Protocol

import numpy as np

from megatron_tokscale.core.arrays import AnyFloats, Floats32
from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.core.files import (
    check_schema,
    schema_version,
    whole_or_absent,
    why_unreadable,
)
from megatron_tokscale.core.schemas import LOSSES_SCHEMA

_CHECKED_AT_ONCE = 2**20  # losses of a file that are read at a time: 4 MB in float32
_LOOKED_AT_FIRST = 2**12  # losses searched for a finite one first: most files have one there
_DTYPES: Final = ("F16", "F32", "F64")  # safetensors' names of the types that losses may have
_REMEDY: Final = "remove it to continue without it"
_NAME = re.compile(r"step_(\d{8,})\.safetensors")


@dataclass(frozen=True)
class LossRecord:
    """The metadata of one probe: its step, the state of the training, the probe's cost.

    Attributes:
        step: optimizer steps completed.
        consumed_samples: training samples consumed; 0 in an imported run, where it is unknown.
        consumed_tokens: training tokens consumed; None if unknown.
        learning_rate: learning rate of the next step; NaN if unknown.
        lr_sum: sum of the learning rates of all steps taken; NaN if unknown.
        training_loss: mean training loss of the last step in nats; NaN before the first, or if
            unknown.
        wall_time: Unix time in seconds when the probe ended.
        duration: seconds the probe took.
        probe_fingerprint: fingerprint of the probe set that was probed.
        versions: package versions, e.g. "megatron-core 0.19.2, torch 2.13.0".
    """

    step: int
    consumed_samples: int
    consumed_tokens: int | None
    learning_rate: float
    lr_sum: float
    training_loss: float
    wall_time: float
    duration: float
    probe_fingerprint: str
    versions: str


_NAMES = {"kind", "schema_version", "crc32", "record_crc32"} | {
    field.name for field in fields(LossRecord)
}


def losses_name(step: int) -> str:
    """Return the file name of the losses at `step`."""
    return f"step_{step:08d}.safetensors"


def list_losses(folder: Path) -> dict[int, Path]:
    """Return every whole losses file in `folder` by its step, ascending."""
    if not folder.is_dir():
        return {}
    matches = ((_NAME.fullmatch(path.name), path) for path in folder.iterdir())
    return dict(sorted((int(match[1]), path) for match, path in matches if match))


def write_losses(path: Path, loss_N: AnyFloats, record: LossRecord) -> None:
    """Write the losses in nats and their record to `path`, whole or not at all.

    Raises:
        OSError: the disk is full or the directory cannot be written.
    """
    from safetensors.numpy import save

    array = np.ascontiguousarray(loss_N)
    metadata = losses_metadata(record, zlib.crc32(array.tobytes()))
    with whole_or_absent(path) as temporary:
        temporary.write_bytes(save({"loss": array}, metadata))


def losses_metadata(record: LossRecord, crc32: int) -> dict[str, str]:
    """Return the metadata of a losses file, for losses with this CRC-32."""
    metadata = {name: repr(value) for name, value in asdict(record).items()} | {
        "kind": "tokscale-losses",
        "schema_version": str(LOSSES_SCHEMA),
        "probe_fingerprint": record.probe_fingerprint,
        "versions": record.versions,
        "crc32": f"{crc32:08x}",
    }
    metadata["record_crc32"] = _record_checksum(metadata)
    return metadata


def _record_checksum(metadata: Mapping[str, str]) -> str:
    rest = {name: text for name, text in metadata.items() if name != "record_crc32"}
    return f"{zlib.crc32(json.dumps(rest, sort_keys=True).encode()):08x}"


class _Slice(Protocol):
    """An array in an opened safetensors file, as the library types it in its documentation."""

    def get_shape(self) -> list[int]: ...

    def get_dtype(self) -> str: ...

    def __getitem__(self, index: slice) -> AnyFloats: ...


class _File(Protocol):
    """An opened safetensors file, whose class the library leaves untyped."""

    def metadata(self) -> dict[str, str] | None: ...

    def get_slice(self, name: str) -> _Slice: ...


@contextmanager
def _opened(path: Path) -> Iterator[_File]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            yield file
    except OSError as error:
        raise TokscaleError(f"cannot read losses {path}: {why_unreadable(path, error)}") from error
    except SafetensorError as error:
        raise _damaged(path, error) from error


class _Losses:
    """The losses in an opened file, read by slices.

    Raises:
        TokscaleError: on construction, if they are not one row of floating-point numbers.
    """

    def __init__(self, file: _File, path: Path) -> None:
        self._slice = file.get_slice("loss")
        shape, dtype = self._slice.get_shape(), self._slice.get_dtype()
        if len(shape) != 1 or dtype not in _DTYPES:
            raise _damaged(path, f"losses of shape {tuple(shape)} and type {dtype}")
        self.n_tokens = shape[0]

    def __getitem__(self, tokens: slice) -> AnyFloats:
        return self._slice[tokens]

    def blocks(self, first: int, size: int) -> Iterator[AnyFloats]:
        """Yield all losses: `first` of them, then `size` at a time."""
        start, stop = 0, first
        while start < self.n_tokens:
            yield self[start : min(stop, self.n_tokens)]
            start, stop = stop, stop + size


def _damaged(path: Path, why: object) -> TokscaleError:
    return TokscaleError(f"losses file {path} is truncated or damaged ({why}); {_REMEDY}")


def read_record(path: Path) -> tuple[LossRecord, int]:
    """Return a losses file's record and its number of tokens N.

    Raises:
        TokscaleError: the file is missing, truncated, of another schema, not a losses file, or of
            another step than its name says.
    """
    with _opened(path) as file:
        metadata = file.metadata() or {}
        if metadata.get("kind") != "tokscale-losses":
            raise TokscaleError(f"{path} is not a losses file; remove it from the losses folder")
        check_schema(path, schema_version(path, metadata), LOSSES_SCHEMA, _REMEDY)
        n_tokens = _Losses(file, path).n_tokens
    if unknown := metadata.keys() - _NAMES:  # a checksum with a damaged name is not checked
        raise _damaged(path, f"its record has a value named {min(unknown)!r}")
    if metadata.get("record_crc32", _record_checksum(metadata)) != _record_checksum(metadata):
        raise _damaged(path, "the checksum of its record is wrong")
    try:
        record = _record(metadata)
    except (KeyError, ValueError) as error:
        raise _damaged(path, f"its record: {error!r}") from error
    if path.name != losses_name(record.step):
        raise TokscaleError(
            f"losses file {path} is of step {record.step} by its record; restore its name or "
            "remove it"
        )
    if min(record.consumed_samples, record.consumed_tokens or 0) < 0:
        raise _damaged(path, "its record has negative counts")
    return record, n_tokens


def _record(metadata: Mapping[str, str]) -> LossRecord:
    """Return the record in the metadata, whose values are strings.

    Raises:
        KeyError, ValueError: a value is missing or is not a number.
    """
    tokens = metadata["consumed_tokens"]
    return LossRecord(
        step=int(metadata["step"]),
        consumed_samples=int(metadata["consumed_samples"]),
        consumed_tokens=None if tokens == repr(None) else int(tokens),
        learning_rate=float(metadata["learning_rate"]),
        lr_sum=float(metadata["lr_sum"]),
        training_loss=float(metadata["training_loss"]),
        wall_time=float(metadata["wall_time"]),
        duration=float(metadata["duration"]),
        probe_fingerprint=metadata["probe_fingerprint"],
        versions=metadata["versions"],
    )


def read_checksum(path: Path) -> str:
    """Return the CRC-32 in a losses file's metadata, in hexadecimal; the losses are not read.

    Raises:
        TokscaleError: the file is missing, truncated or damaged.
    """
    with _opened(path) as file:
        return str((file.metadata() or {}).get("crc32"))


def has_finite_losses(path: Path) -> bool:
    """Return whether any loss in a file is finite; the file is read until the first one is found.

    Raises:
        TokscaleError: the file is missing, truncated or damaged.
    """
    with _opened(path) as file:
        blocks = _Losses(file, path).blocks(_LOOKED_AT_FIRST, _CHECKED_AT_ONCE)
        return any(np.isfinite(loss_N).any() for loss_N in blocks)


_stamps_of_checked: dict[Path, tuple[int, ...]] = {}
"""Stamps (inode, size, time of change) of the losses files that this process has checked."""


def _stamp(path: Path) -> tuple[int, ...]:
    try:
        found = path.stat()
    except OSError as error:
        raise TokscaleError(f"cannot read losses {path}: {error.strerror or error}") from error
    return found.st_ino, found.st_size, found.st_mtime_ns


def mark_checked(path: Path) -> None:
    """Mark a losses file, as it is now, as checked in this process."""
    _stamps_of_checked[path.absolute()] = _stamp(path)


def is_checked(path: Path) -> bool:
    """Return whether this process has compared a losses file with its checksum already."""
    return _stamps_of_checked.get(path.absolute()) == _stamp(path)


def check_losses(path: Path) -> None:
    """Check a losses file against its CRC-32, a few megabytes at a time.

    Raises:
        TokscaleError: the file is truncated, damaged, or its checksum is wrong.
    """
    stamp = _stamp(path)
    with _opened(path) as file:
        found = 0
        for loss_N in _Losses(file, path).blocks(_CHECKED_AT_ONCE, _CHECKED_AT_ONCE):
            found = zlib.crc32(loss_N, found)
        _compare(path, found, file)
    _stamps_of_checked[path.absolute()] = stamp


def _compare(path: Path, found: int, file: _File) -> None:
    if f"{found:08x}" != (file.metadata() or {}).get("crc32"):
        raise TokscaleError(f"losses file {path} has a wrong checksum; remove it or restore it")


def read_losses(path: Path, start: int = 0, stop: int | None = None) -> Floats32:
    """Return the losses of tokens `start` to `stop` in nats, as float32; see `read_stored_losses`.

    Raises:
        TokscaleError: the file is truncated, damaged, or its checksum is wrong.
    """
    return read_stored_losses(path, start, stop).astype(np.float32, copy=False)


def read_stored_losses(path: Path, start: int = 0, stop: int | None = None) -> AnyFloats:
    """Return the losses of tokens `start` to `stop` in nats, in the type that they are stored in.

    Before the first part of a file is read, the whole file is checked against its CRC-32, once in a
    process; a whole file is checked while it is read.

    Raises:
        TokscaleError: the file is truncated, damaged, or its checksum is wrong.
    """
    is_whole = start == 0 and stop is None
    if not is_whole and not is_checked(path):
        check_losses(path)
    stamp = _stamp(path)
    with _opened(path) as file:
        array = np.ascontiguousarray(_Losses(file, path)[start:stop])
        if is_whole:
            _compare(path, zlib.crc32(array), file)
            _stamps_of_checked[path.absolute()] = stamp
    return array
