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
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.core.files import check_schema, schema_version, whole_or_absent
from megatron_tokscale.core.schemas import LOSSES_SCHEMA

_CHECKED_AT_ONCE = 2**20
_LOOKED_AT_FIRST = 2**12
_DTYPES: Final = ("F16", "F32", "F64")
_NAME = re.compile(r"step_(\d{8,})\.safetensors")


@dataclass(frozen=True)
class LossRecord:
    """What is known of a probe besides its losses.

    Attributes:
        step: optimizer steps completed.
        consumed_samples: training samples consumed.
        consumed_tokens: training tokens consumed; None if unknown.
        learning_rate: learning rate of the next step; NaN if unknown.
        lr_sum: sum of the learning rates of all steps taken; NaN if unknown.
        training_loss: mean training loss of the last step in nats; NaN before the first.
        wall_time: Unix time in seconds when the probe ended.
        duration: seconds the probe took.
        probe_fingerprint: fingerprint of the probe set.
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
    """File name of the losses at `step`."""
    return f"step_{step:08d}.safetensors"


def list_losses(folder: Path) -> dict[int, Path]:
    """Map step to losses file, ascending, for every whole file in `folder`."""
    if not folder.is_dir():
        return {}
    matches = ((_NAME.fullmatch(path.name), path) for path in folder.iterdir())
    return dict(sorted((int(match[1]), path) for match, path in matches if match))


def write_losses(path: Path, loss_N: NDArray[np.floating[Any]], record: LossRecord) -> None:
    """Write the losses in nats and their record to `path`, whole or not at all.

    Raises:
        OSError: the disk is full or the directory cannot be written.
    """
    from safetensors.numpy import save

    array = np.ascontiguousarray(loss_N)
    metadata = {name: repr(value) for name, value in asdict(record).items()} | {
        "kind": "tokscale-losses",
        "schema_version": str(LOSSES_SCHEMA),
        "probe_fingerprint": record.probe_fingerprint,
        "versions": record.versions,
        "crc32": f"{zlib.crc32(array.tobytes()):08x}",
    }
    metadata["record_crc32"] = _record_checksum(metadata)
    with whole_or_absent(path) as temporary:
        temporary.write_bytes(save({"loss": array}, metadata))


def _record_checksum(metadata: Mapping[str, str]) -> str:
    rest = {name: text for name, text in metadata.items() if name != "record_crc32"}
    return f"{zlib.crc32(json.dumps(rest, sort_keys=True).encode()):08x}"


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            yield file
    except OSError as error:
        raise TokscaleError(f"cannot read losses {path}: {error.strerror or error}") from error
    except SafetensorError as error:
        raise _damaged(path, error) from error


def _losses(file: Any, path: Path) -> Any:
    """Return the losses in an opened file, as a slice to read from, and check their type."""
    losses = file.get_slice("loss")
    shape, dtype = losses.get_shape(), losses.get_dtype()
    if len(shape) != 1 or dtype not in _DTYPES:
        raise _damaged(path, f"losses of shape {tuple(shape)} and type {dtype}")
    return losses


def _damaged(path: Path, why: object) -> TokscaleError:
    return TokscaleError(
        f"losses file {path} is truncated or damaged ({why}); remove it to go on without it"
    )


def read_record(path: Path) -> tuple[LossRecord, int]:
    """Read a losses file's record and its number of tokens N.

    Raises:
        TokscaleError: the file is missing, truncated, newer, no losses file, or of another step
            than its name says.
    """
    with _opened(path) as file:
        metadata: dict[str, str] = file.metadata() or {}
        if metadata.get("kind") != "tokscale-losses":
            raise TokscaleError(f"{path} is not a losses file; remove it from the losses folder")
        check_schema(path, schema_version(path, metadata), LOSSES_SCHEMA)
        n_tokens = int(_losses(file, path).get_shape()[0])
    if unknown := metadata.keys() - _NAMES:  # a checksum of another name would not be looked at
        raise _damaged(path, f"its record has a value named {min(unknown)!r}")
    if metadata.get("record_crc32", _record_checksum(metadata)) != _record_checksum(metadata):
        raise _damaged(path, "the checksum of its record is wrong")
    try:
        record = LossRecord(
            **{field.name: _value(field.type, metadata[field.name]) for field in fields(LossRecord)}
        )
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


def _value(kind: Any, text: str) -> Any:
    """Read a record's value; the one that may be unknown is a whole number."""
    if kind == int | None:
        return None if text == repr(None) else int(text)
    return kind(text)


def read_checksum(path: Path) -> str:
    """Return the CRC-32 that a losses file gives for its losses, in hexadecimal, unchecked.

    Raises:
        TokscaleError: the file is missing, truncated or damaged.
    """
    with _opened(path) as file:
        return str((file.metadata() or {}).get("crc32"))


def has_finite_losses(path: Path) -> bool:
    """Return whether any loss in a file is finite, reading no further than the first that is.

    Raises:
        TokscaleError: the file is missing, truncated or damaged.
    """
    with _opened(path) as file:
        losses = _losses(file, path)
        n_tokens, start, size = losses.get_shape()[0], 0, _LOOKED_AT_FIRST
        while start < n_tokens:
            if np.isfinite(losses[start : min(start + size, n_tokens)]).any():
                return True
            start, size = start + size, _CHECKED_AT_ONCE
    return False


_right: dict[Path, tuple[int, ...]] = {}
"""Stamps of the losses files whose checksums this process has found right."""


def _stamp(path: Path) -> tuple[int, ...]:
    try:
        found = path.stat()
    except OSError as error:
        raise TokscaleError(f"cannot read losses {path}: {error.strerror or error}") from error
    return found.st_ino, found.st_size, found.st_mtime_ns


def take_for_checked(path: Path) -> None:
    """Note that a losses file as it is now needs no further check in this process."""
    _right[path.absolute()] = _stamp(path)


def is_checked(path: Path) -> bool:
    """Return whether this process has found the checksum of a losses file right."""
    return _right.get(path.absolute()) == _stamp(path)


def check_losses(path: Path) -> None:
    """Check a losses file against its CRC-32, a few megabytes at a time.

    Raises:
        TokscaleError: the file is truncated, damaged, or its checksum is wrong.
    """
    stamp = _stamp(path)
    with _opened(path) as file:
        losses, found = _losses(file, path), 0
        n_tokens = losses.get_shape()[0]
        for start in range(0, n_tokens, _CHECKED_AT_ONCE):
            found = zlib.crc32(losses[start : min(start + _CHECKED_AT_ONCE, n_tokens)], found)
        _compare(path, found, file)
    _right[path.absolute()] = stamp


def _compare(path: Path, found: int, file: Any) -> None:
    if f"{found:08x}" != (file.metadata() or {}).get("crc32"):
        raise TokscaleError(f"losses file {path} has a wrong checksum; remove it or restore it")


def read_losses(path: Path, start: int = 0, stop: int | None = None) -> NDArray[np.float32]:
    """Read losses of tokens `start` to `stop` as float32.

    Before the first part of a file is read, the whole of it is checked against its CRC-32, once in
    a process; a whole file is checked as it is read.

    Raises:
        TokscaleError: the file is truncated, damaged, or its checksum is wrong.
    """
    is_whole = start == 0 and stop is None
    if not is_whole and not is_checked(path):
        check_losses(path)
    stamp = _stamp(path)
    with _opened(path) as file:
        array = np.ascontiguousarray(_losses(file, path)[start:stop])
        if is_whole:
            _compare(path, zlib.crc32(array), file)
            _right[path.absolute()] = stamp
    return array.astype(np.float32, copy=False)
