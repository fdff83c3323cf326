"""Files of training samples' losses: fixed records that a job appends while it trains.

RUN/tokscale/samples/
  rank_00003.from_00001000.bin    data-parallel rank 3 of the launch that starts at step 1000
  abandoned/                      records of steps that a resumed job has left
  replayed/step_00001234.bin      a step's batch under a saved checkpoint, by a replay

A file is a header of 512 bytes, one line of JSON, and records of 32 bytes, ascending by step. Each
record has the CRC-32 of its other bytes. A kill can leave a partial record at the end of a file:
readers leave it out. No launch appends to the file of another one.

Shapes: Q samples, T steps.
"""

import bisect
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final, Self, cast

import numpy as np
from numpy.typing import NDArray

from megatron_tokscale.core.arrays import Floats, Integers, Mask
from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.core.files import (
    check_schema,
    json_checksum,
    schema_version,
    sealed,
    sync,
    whole_or_absent,
)
from megatron_tokscale.core.records import JSON, from_json, to_json
from megatron_tokscale.core.schemas import SAMPLES_SCHEMA

RECORD: Final = np.dtype(
    [
        ("step", "<i4"),  # the optimizer step that trains on the sample; the first one is 1
        ("position", "<i4"),  # of the largest loss: token POSITION of the sample predicts the next
        ("sample", "<i8"),  # the job's k-th training sample: consumed samples before it
        ("mean", "<f4"),  # nats, over the tokens in the loss mask; NaN without one
        ("largest", "<f4"),  # nats, among these tokens
        ("n_tokens", "<i4"),  # tokens in the loss mask
        ("crc32", "<u4"),  # of the 28 bytes before it
    ]
)
"""One training sample's record, 32 bytes, little-endian."""

type Records = NDArray[np.void]
"""records_Q, an array of `RECORD`."""

_HEADER_BYTES: Final = 512
_RECORDS_AT_ONCE: Final = 2**19  # records of a file that are read at a time: 16 MB
_NAME: Final = re.compile(r"rank_(\d{5,})\.from_(\d{8,})\.bin")
_REPLAYED: Final = re.compile(r"step_(\d{8,})\.bin")
_REMEDY: Final = "restore it, or move it away to continue without it"
_DAMAGED_HEADER: Final = "its header cannot be read"


@dataclass(frozen=True, kw_only=True)
class SamplesHeader:
    """The first line of a file of sample losses.

    Attributes:
        run_id: the run's id in run.json.
        launch_id: id of the launch that wrote the file, as in run.json.
        first_step: optimizer steps completed when the launch started.
        rank: data-parallel rank whose samples the file has.
        ranks: data-parallel ranks of the launch: as many files.
        seq_length: tokens of a sample.
        checkpoint: step of the saved checkpoint whose weights gave the losses, in a replay; None
            for the losses of the training itself.
    """

    run_id: str
    launch_id: str
    first_step: int
    rank: int
    ranks: int
    seq_length: int
    checkpoint: int | None = None

    def to_bytes(self) -> bytes:
        """Return the header as it is on disk."""
        content = cast("dict[str, JSON]", to_json(self))
        about: dict[str, JSON] = {
            "kind": "tokscale-samples",
            "schema_version": SAMPLES_SCHEMA,
            "record_bytes": RECORD.itemsize,
        }
        line = json.dumps(sealed({**about, **content})).encode()
        assert len(line) < _HEADER_BYTES, "ids and whole numbers are short"
        return line.ljust(_HEADER_BYTES - 1) + b"\n"

    @classmethod
    def from_bytes(cls, path: Path, text: bytes) -> Self:
        """Read the header of the file `path`.

        Raises:
            TokscaleError: it is damaged, or of a newer schema.
        """
        try:
            content = json.loads(text)
            if content["kind"] != "tokscale-samples":
                raise ValueError(content["kind"])
        except (ValueError, KeyError, TypeError) as error:
            raise TokscaleError(f"{path} is damaged: {_DAMAGED_HEADER}; {_REMEDY}") from error
        check_schema(path, schema_version(path, content), SAMPLES_SCHEMA)
        if content.get("checksum") != json_checksum(content):
            raise TokscaleError(f"{path} is damaged: its header's checksum is wrong; {_REMEDY}")
        about = {"kind", "schema_version", "record_bytes", "checksum"}
        rest = {name: value for name, value in content.items() if name not in about}
        try:
            return from_json(cls, rest, "header")
        except ValueError as error:
            raise TokscaleError(f"{path} is damaged: {error}; {_REMEDY}") from error


def samples_name(rank: int, first_step: int) -> str:
    """Return the file name of a data-parallel rank of the launch that starts at a step."""
    return f"rank_{rank:05d}.from_{first_step:08d}.bin"


def replayed_name(step: int) -> str:
    """Return the file name, in the folder `replayed`, of the losses of a step's batch."""
    return f"step_{step:08d}.bin"


def make_records(
    step: int | Integers,
    sample_Q: Integers,
    mean_Q: NDArray[Any],
    largest_Q: NDArray[Any],
    position_Q: NDArray[Any],
    n_tokens_Q: NDArray[Any],
) -> Records:
    """Return records_Q with their checksums; the arguments are the fields of `RECORD`."""
    records_Q = np.empty(len(sample_Q), RECORD)
    records_Q["step"], records_Q["sample"] = step, sample_Q
    records_Q["mean"], records_Q["largest"] = mean_Q, largest_Q
    records_Q["position"], records_Q["n_tokens"] = position_Q, n_tokens_Q
    records_Q["crc32"] = _checksums(records_Q)
    return records_Q


class SamplesFile:
    """A file of sample losses that this job appends to."""

    def __init__(self, path: Path, header: SamplesHeader) -> None:
        """Name the file; nothing is written yet."""
        self.path, self._header = path, header

    def create(self) -> None:
        """Write the header of a new file, and wait until it is on the disk.

        Raises:
            OSError: the file exists, or cannot be written.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("xb") as file:
            file.write(self._header.to_bytes())
            file.flush()
            sync(file.fileno())

    def append(self, records_Q: Records) -> None:
        """Append records, and wait until they are on the disk.

        Raises:
            OSError: they cannot be written, or the file is gone.
        """
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND)
        with os.fdopen(descriptor, "ab") as file:
            file.write(records_Q.tobytes())
            file.flush()
            sync(file.fileno())


def write_replayed(path: Path, header: SamplesHeader, records_Q: Records) -> None:
    """Write the losses of a step's batch under a saved checkpoint, whole or not at all.

    Raises:
        OSError: the file cannot be written.
    """
    with whole_or_absent(path) as temporary:
        temporary.write_bytes(header.to_bytes() + records_Q.tobytes())


def abandon_samples(folder: Path, last: int) -> None:
    """Move the records of steps after `last` to the folder `abandoned`; nobody may be writing.

    A partial record at the end of a file, which a kill has left, moves with them. Only the files
    of the latest launch are read: those of an earlier one were cut when the next one started.

    Args:
        folder: the folder of a run's sample losses, which need not exist.
        last: the last step whose records stay.

    Raises:
        OSError: a file cannot be written.
    """
    files = _files(folder)
    latest = max((first_step for _, first_step in files if first_step < last), default=None)
    for path, first_step in files:
        if first_step >= last:
            _move_whole(path)
        elif first_step == latest:
            _cut(path, last)
    for path in _replayed_files(folder).values():
        if _checkpoint(path) > last:
            _move_whole(path)


def _move_whole(path: Path) -> None:
    target = _abandoned(path)
    target.parent.mkdir(exist_ok=True)
    os.replace(path, target)


def _cut(path: Path, last: int) -> None:
    """Copy what follows the records up to step `last` to `abandoned`, and then cut it off.

    A kill between the two leaves a second copy there, and no record is lost.
    """
    try:
        place = _StoredSamples(path).place_after(last)
    except TokscaleError:  # a kill before the header was whole, or damage that readers report
        return
    end = _HEADER_BYTES + place * RECORD.itemsize
    with path.open("r+b") as file:
        header = file.read(_HEADER_BYTES)
        file.seek(end)
        if not (tail := file.read()):
            return
        with whole_or_absent(_abandoned(path)) as temporary:
            temporary.write_bytes(header + tail)
        file.truncate(end)
        sync(file.fileno())


def _checkpoint(path: Path) -> int:
    """Return the step of the checkpoint that a replayed file is of; 0 if it cannot be read."""
    try:
        return _StoredSamples(path).header.checkpoint or 0
    except TokscaleError:  # readers report it
        return 0


def _abandoned(path: Path) -> Path:
    """Return a free name for records of the file in the folder `abandoned`."""
    folder = path.parent / "abandoned"
    count = sum(1 for copy in _entries(folder) if copy.name.startswith(path.name))
    return folder / f"{path.name}.{count}"


def training_files(folder: Path) -> list[Path]:
    """Return the files of the training's sample losses, ascending by launch and rank.

    A file without a whole header, as a kill at the start of a launch leaves it, is none of them.
    """
    return [path for path, _ in _files(folder) if path.stat().st_size >= _HEADER_BYTES]


def _files(folder: Path) -> list[tuple[Path, int]]:
    """Return the files of the training's sample losses, with the steps at which they start."""
    matches = [(_NAME.fullmatch(path.name), path) for path in _entries(folder)]
    found = sorted((int(match[2]), int(match[1]), path) for match, path in matches if match)
    return [(path, first_step) for first_step, _, path in found]


def _replayed_files(folder: Path) -> dict[int, Path]:
    """Return the files of the replayed steps' batches, by step."""
    inside = folder / "replayed"
    matches = [(_REPLAYED.fullmatch(path.name), path) for path in _entries(inside)]
    return dict(sorted((int(match[1]), path) for match, path in matches if match))


def _entries(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.is_dir() else []


@dataclass(frozen=True)
class StepSums:
    """Sums over the samples of each step, by steps ascending.

    Attributes:
        step_T: the steps that have records.
        nats_T: sum of the losses of all tokens in the loss mask, in nats.
        n_tokens_T: these tokens.
        n_samples_T: samples.
    """

    step_T: Integers
    nats_T: Floats
    n_tokens_T: Integers
    n_samples_T: Integers

    @property
    def mean_T(self) -> Floats:
        """The mean loss per token in nats, as Megatron logs it; NaN without a token."""
        with np.errstate(invalid="ignore"):
            return self.nats_T / self.n_tokens_T


class SampleLosses:
    """The sample losses of a run, over all of its launches and ranks.

    They are read in blocks: the memory does not grow with the number of samples.

    Attributes:
        headers: the headers of the files, ascending by launch and rank.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        """Read the headers of the files.

        Raises:
            TokscaleError: a file cannot be read, or is of a newer schema.
        """
        self._files = [_StoredSamples(path) for path in paths]
        self.headers = [file.header for file in self._files]

    @classmethod
    def of_training(cls, folder: Path) -> Self:
        """Return the losses that the training recorded, from a run's folder of sample losses.

        Raises:
            TokscaleError: there is no such file, one is of another run, rank or launch than its
                name says, or see `__init__`.
        """
        if not (found := training_files(folder)):
            raise TokscaleError(
                f"{folder} holds no losses of samples; expected a run that was trained with "
                "--tokscale-sample-losses; for one step, replay a checkpoint with "
                "--tokscale-replay-step"
            )
        losses = cls(found)
        losses._check_own()
        return losses

    @classmethod
    def replayed(cls, folder: Path) -> dict[int, Self]:
        """Return the losses of each replayed step, from a run's folder of sample losses.

        The header of each names its checkpoint.

        Raises:
            TokscaleError: see `__init__`.
        """
        return {step: cls([path]) for step, path in _replayed_files(folder).items()}

    def _check_own(self) -> None:
        """Refuse a file of another run, or of another rank or launch than its name says."""
        first = self._files[0]
        for file in self._files:
            header, path = file.header, file.path
            if header.run_id != first.header.run_id:
                raise TokscaleError(
                    f"{path} is of run {header.run_id}, {first.path.name} of run "
                    f"{first.header.run_id}; expected files of one run; move the other run's away"
                )
            if path.name != (name := samples_name(header.rank, header.first_step)):
                raise TokscaleError(
                    f"{path} has the losses of {name} under another name; move it away"
                )

    @property
    def n_samples(self) -> int:
        """Number of records."""
        return sum(file.n_records for file in self._files)

    @property
    def missing_ranks(self) -> list[tuple[int, int]]:
        """The launches' first steps and the ranks whose files are missing."""
        found = {(header.first_step, header.rank) for header in self.headers}
        wanted = {
            (header.first_step, rank) for header in self.headers for rank in range(header.ranks)
        }
        return sorted(wanted - found)

    def read(self, first: int, last: int) -> Records:
        """Return records_Q of the steps from `first` to `last`, ascending by sample.

        Raises:
            TokscaleError: a file is damaged.
        """
        found = list(self.blocks(first, last))
        records_Q = np.concatenate(found) if found else np.empty(0, RECORD)
        return records_Q[np.argsort(records_Q["sample"], kind="stable")]

    def blocks(self, first: int = 0, last: int | None = None) -> Iterator[Records]:
        """Yield the records of the steps from `first` to `last`, at most 16 MB at a time.

        The steps ascend within a launch and rank, and not over its ranks.

        Raises:
            TokscaleError: a file is damaged.
        """
        for file in self._files:
            start = file.place_after(first - 1)
            end = file.n_records if last is None else file.place_after(last)
            yield from file.blocks(start, end)

    def step_sums(self) -> StepSums:
        """Return the sums of each step: one pass over all records, and 32 bytes per step.

        Raises:
            TokscaleError: a file is damaged.
        """
        n_steps = 1 + max((file.last_step for file in self._files), default=0)
        nats_T, count_2T = np.zeros(n_steps), np.zeros((2, n_steps), np.int64)
        for records_Q in self.blocks():
            step_Q, n_tokens_Q = records_Q["step"], records_Q["n_tokens"]
            nats_Q = np.where(n_tokens_Q > 0, records_Q["mean"].astype(float) * n_tokens_Q, 0.0)
            first, width = int(step_Q[0]), int(step_Q[-1] - step_Q[0]) + 1
            place = slice(first, first + width)
            nats_T[place] += np.bincount(step_Q - first, nats_Q, width)
            count_2T[0, place] += np.bincount(step_Q - first, n_tokens_Q, width).astype(np.int64)
            count_2T[1, place] += np.bincount(step_Q - first, minlength=width)
        step_T = np.flatnonzero(count_2T[1])
        return StepSums(step_T, nats_T[step_T], count_2T[0, step_T], count_2T[1, step_T])


class _StoredSamples:
    """One file of sample losses, read through a memory map.

    Raises:
        TokscaleError: on construction, if it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                self.header = SamplesHeader.from_bytes(path, file.read(_HEADER_BYTES))
                size = os.fstat(file.fileno()).st_size
            n_whole = (size - _HEADER_BYTES) // RECORD.itemsize
            self._records: Records = (
                np.memmap(path, RECORD, "r", _HEADER_BYTES, (n_whole,))
                if n_whole
                else np.empty(0, RECORD)
            )
        except OSError as error:
            raise TokscaleError(f"cannot read {path}: {error.strerror}; {_REMEDY}") from error

    @cached_property
    def n_records(self) -> int:
        """The records up to the last whole one: of all but a file that a kill has torn, all."""
        end, at_once = len(self._records), 1
        while end:
            start, at_once = max(0, end - at_once), _RECORDS_AT_ONCE
            is_good_Q = _are_good(self._records[start:end])
            if is_good_Q.any():
                return start + int(np.flatnonzero(is_good_Q)[-1]) + 1
            end = start
        return 0

    @property
    def last_step(self) -> int:
        """The step of the last record; 0 without one."""
        return int(self._records[self.n_records - 1]["step"]) if self.n_records else 0

    def place_after(self, step: int) -> int:
        """Return the number of records of steps up to `step`."""
        places = range(self.n_records)
        return bisect.bisect_right(places, step, key=lambda place: self._records[place]["step"])

    def blocks(self, start: int, end: int) -> Iterator[Records]:
        """Yield records from `start` to `end`, checked.

        Raises:
            TokscaleError: a record has a wrong checksum.
        """
        for at in range(start, end, _RECORDS_AT_ONCE):
            records_Q: Records = np.array(self._records[at : min(at + _RECORDS_AT_ONCE, end)])
            is_good_Q = _are_good(records_Q)
            if not is_good_Q.all():
                place = at + int(np.argmin(is_good_Q))
                raise TokscaleError(
                    f"{self.path} is damaged: record {place} has a wrong checksum; {_REMEDY}"
                )
            yield records_Q


def _are_good(records_Q: Records) -> Mask:
    is_good_Q: Mask = records_Q["crc32"] == _checksums(records_Q)
    return is_good_Q


def _crc_table() -> NDArray[np.uint32]:
    """Return the CRC-32 (IEEE 802.3, reflected polynomial 0xEDB88320) of every two bytes."""
    table = np.arange(2**16, dtype=np.uint32)
    for _ in range(16):
        table = np.where(table & 1, (table >> 1) ^ np.uint32(0xEDB88320), table >> 1)
    return table.astype(np.uint32)


_CRC: Final = _crc_table()


def _checksums(records_Q: Records) -> NDArray[np.uint32]:
    """Return the CRC-32 of each record's bytes before its last four, all records at a time."""
    words_QX = np.ascontiguousarray(records_Q).view("<u2").reshape(-1, RECORD.itemsize // 2)
    crc_Q = np.full(len(words_QX), 0xFFFFFFFF, np.uint32)
    for word_Q in words_QX[:, :-2].T:
        crc_Q = _CRC[(crc_Q ^ word_Q) & 0xFFFF] ^ (crc_Q >> 16)
    return ~crc_Q
