"""One losses file: the loss of every watched token at one probe step.

Shapes: N watched tokens.
"""

import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_tokscale.errors import TokscaleError
from megatron_tokscale.files import check_schema, whole_or_absent

SCHEMA_VERSION = 1
_CHECKED_AT_ONCE = 2**20
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
        "schema_version": str(SCHEMA_VERSION),
        "probe_fingerprint": record.probe_fingerprint,
        "versions": record.versions,
        "crc32": f"{zlib.crc32(array.tobytes()):08x}",
    }
    with whole_or_absent(path) as temporary:
        temporary.write_bytes(save({"loss": array}, metadata))


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            yield file
    except OSError as error:
        raise TokscaleError(f"cannot read losses {path}: {error.strerror or error}") from error
    except SafetensorError as error:
        raise TokscaleError(
            f"losses file {path} is truncated or damaged ({error}); remove it to go on without it"
        ) from error


def read_record(path: Path) -> tuple[LossRecord, int]:
    """Read a losses file's record and its number of tokens N.

    Raises:
        TokscaleError: the file is missing, truncated, newer, or no losses file.
    """
    with _opened(path) as file:
        metadata = file.metadata() or {}
        if metadata.get("kind") != "tokscale-losses":
            raise TokscaleError(f"{path} is not a losses file; remove it from the losses folder")
        check_schema(path, int(metadata["schema_version"]), SCHEMA_VERSION)
        n_tokens = int(file.get_slice("loss").get_shape()[0])
    values: dict[str, Any] = {}
    for field in fields(LossRecord):
        values[field.name] = _value(field.type, metadata[field.name])
    return LossRecord(**values), n_tokens


def _value(kind: Any, text: str) -> Any:
    """Read a record's value; the one that may be unknown is a whole number."""
    if kind == int | None:
        return None if text == repr(None) else int(text)
    return kind(text)


def read_checksum(path: Path) -> str:
    """The CRC-32 that a losses file gives for its losses, in hexadecimal; nothing is checked.

    Raises:
        TokscaleError: the file is missing, truncated or damaged.
    """
    with _opened(path) as file:
        return str((file.metadata() or {}).get("crc32"))


def check_losses(path: Path) -> None:
    """Check a losses file against its CRC-32, a few megabytes at a time.

    Raises:
        TokscaleError: the file is truncated, damaged, or its checksum is wrong.
    """
    with _opened(path) as file:
        losses, found = file.get_slice("loss"), 0
        n_tokens = losses.get_shape()[0]
        for start in range(0, n_tokens, _CHECKED_AT_ONCE):
            found = zlib.crc32(losses[start : min(start + _CHECKED_AT_ONCE, n_tokens)], found)
        expected = (file.metadata() or {}).get("crc32")
    if f"{found:08x}" != expected:
        raise TokscaleError(f"losses file {path} has a wrong checksum; remove it or restore it")


def read_losses(path: Path, start: int = 0, stop: int | None = None) -> NDArray[np.float32]:
    """Read losses of tokens `start` to `stop` as float32; the whole file is checked by its CRC.

    A part (`stop` given) is read without touching the rest, hence without the check.

    Raises:
        TokscaleError: the file is truncated, damaged, or its checksum is wrong.
    """
    if stop is None:
        check_losses(path)
    with _opened(path) as file:
        return np.asarray(file.get_slice("loss")[start:stop], dtype=np.float32)
