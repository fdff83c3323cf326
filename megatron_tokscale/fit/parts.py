"""A fit in parts: a file per finished block of tokens, and the processes that make them
together."""

import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, cast

from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.core.files import read_json, remove_temporaries, whole_or_absent, write_json
from megatron_tokscale.core.records import JSON, from_json, to_json
from megatron_tokscale.fit.joining import LaunchedProcess, is_launched, join
from megatron_tokscale.fit.summary import FitSettings
from megatron_tokscale.store.lock import RunLock

if TYPE_CHECKING:
    import pyarrow as pa
    import torch
    from torch.distributed import Store  # type: ignore[attr-defined]

    from megatron_tokscale.store.reader import Time

_PATIENCE = timedelta(days=30)
"""Longest wait of a rank for the others; our choice: it only ends a wait that has no other end."""
_FAILED = "failed"
"""Key of the store for the message of a rank that has failed."""
_CRC_BYTES = 4
"""Length of the CRC-32 at the end of a part, in bytes."""
_POLL_SECONDS = 1.0
"""Time between two reports of progress while a rank waits for the others; our choice."""

Stamp = list[int]
"""Size in bytes and time of change in nanoseconds of a file."""


@dataclass(frozen=True)
class Ranks:
    """The processes that fit a run together: one alone, or those of `Ranks.joined`.

    An error that one of them meets ends all of them: `together` and `on_first` raise the same
    `TokscaleError` on every rank.

    Attributes:
        rank: number of this process, from 0.
        size: number of processes.
        local_rank: number of this process on its node.
        store: torch.distributed's key-value store; None for one process alone.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    store: "Store | None" = None

    @staticmethod
    @contextmanager
    def joined(distributed: bool = False) -> "Iterator[Ranks]":
        """Join the other processes that torchrun has started, on gloo, until the block's end.

        Args:
            distributed: true if another launcher than torchrun has started them, and has set
                torchrun's variables.

        Raises:
            TokscaleError: the launcher's variables have impossible values, or a process does not
                come.
        """
        is_one_of_many = distributed or is_launched()
        process = LaunchedProcess.from_environment() if is_one_of_many else None
        if process is None or process.size == 1:
            yield Ranks()
            return
        from torch import distributed as torch_distributed

        store = join(process)
        torch_distributed.init_process_group(
            "gloo", store=store, rank=process.rank, world_size=process.size, timeout=_PATIENCE
        )
        try:
            yield Ranks(process.rank, process.size, process.local_rank, store)
        finally:
            torch_distributed.destroy_process_group()

    @property
    def leads(self) -> bool:
        """True for rank 0, which prepares, reports and assembles."""
        return self.rank == 0

    def device(self, name: "torch.device | str | None") -> "torch.device":
        """Return the torch device: the CPU for None, this rank's GPU for a bare "cuda".

        With more processes than GPUs on a node, several share a GPU.

        Raises:
            TokscaleError: there is no such device.
        """
        import torch

        try:
            device = torch.device(name or "cpu")
            if device.type == "cuda" and device.index is None:
                device = torch.device("cuda", self.local_rank % max(torch.cuda.device_count(), 1))
            torch.empty(1, device=device)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).partition("\n")[0]
            raise TokscaleError(
                f"cannot compute on device '{name}': {reason}; give another --device"
            ) from error
        return device

    def together[Value](
        self, action: Callable[[], Value], meanwhile: Callable[[], object] = lambda: None
    ) -> Value:
        """Call `action` on every rank; return its value once all are done.

        A rank that is done calls `meanwhile` every second until the others are done, and once more
        after that.

        Raises:
            TokscaleError: the action failed on a rank.
        """
        if self.store is None:
            return action()
        value, message = None, None
        try:
            value = action()
        except (TokscaleError, OSError) as error:
            message = str(error)
            self.store.set(_FAILED, message)
        for found in self._exchange(message, meanwhile):
            if found is not None:
                raise TokscaleError(found)
        return value  # type: ignore[return-value]

    def on_first[Value](self, action: Callable[[], Value]) -> Value:
        """Call `action` on rank 0 and return its value, which can be pickled, on every rank.

        Raises:
            TokscaleError: the action failed.
        """
        value = self.together(lambda: action() if self.leads else None)
        return cast("Value", self._exchange(value)[0])

    @property
    def is_lost(self) -> bool:
        """True if another rank has failed, so that further work is useless."""
        return self.store is not None and self.store.check([_FAILED])

    def _exchange[Value](
        self, value: Value, meanwhile: Callable[[], object] = lambda: None
    ) -> list[Value]:
        """Return the value of every rank, by rank."""
        if self.store is None:
            return [value]
        from torch import distributed

        values = [value] * self.size
        with ThreadPoolExecutor(max_workers=1) as thread:
            exchange = thread.submit(distributed.all_gather_object, values, value)
            while wait([exchange], timeout=_POLL_SECONDS).not_done:
                meanwhile()
        meanwhile()
        try:
            exchange.result()
        except RuntimeError as error:
            raise TokscaleError(
                "another process of this fit has died; start the fit again to resume it"
            ) from error
        return values


@dataclass(frozen=True)
class PartKey:
    """The inputs and settings that identify a part; a part with another key is fitted again.

    Attributes:
        version: version of megatron-tokscale.
        run_id: id of the run.
        time: unit of time.
        steps: the probe steps.
        probe_fingerprint: fingerprint of the probe set.
        x: natural logarithm of the time of each probe; None for -inf.
        block_tokens: tokens of a block.
        device: type of the device: fits on a GPU differ in their last digits.
        settings: choices of the fit.
        keeps_common_shifts: whether the common shifts were left in the losses.
        columns: names of the columns.
        crc32: CRC-32 of each losses file, by file name.
    """

    version: str
    run_id: str
    time: "Time"
    steps: tuple[int, ...]
    probe_fingerprint: str
    x: tuple[float | None, ...]
    block_tokens: int
    device: str
    settings: FitSettings
    keeps_common_shifts: bool
    columns: tuple[str, ...]
    crc32: Mapping[str, str]

    def to_json(self) -> dict[str, JSON]:
        """Return the key as plain JSON values."""
        return cast("dict[str, JSON]", to_json(self))

    @cached_property
    def digest(self) -> str:
        """SHA-256 (first 16 hex digits) of the key."""
        text = json.dumps(self.to_json(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


class Parts:
    """The folder of finished blocks; a block is finished if its part is there.

    The name of a part holds the digest of its key, so that no fit uses parts of another key.
    note.json holds the key, and the stamps of the losses files that were checked.
    """

    def __init__(self, folder: Path, key: PartKey) -> None:
        self.folder = folder
        self.digest = key.digest
        self._key = key
        self._note = folder / "note.json"
        self._lock = RunLock(folder / ".lock")

    def path(self, block: int) -> Path:
        """Return the file of a block."""
        return self.folder / f"part-{self.digest}-{block:06d}.arrow"

    def finished(self) -> set[int]:
        """Return the blocks that are fitted."""
        names = self.folder.glob(f"part-{self.digest}-*.arrow")
        return {int(path.stem.rpartition("-")[2]) for path in names}

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other fits of the run out; remove the folder at the end if it holds no part.

        Raises:
            TokscaleError: another fit is under way, or the folder cannot be written.
        """
        with self.writing():
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                self._lock.acquire()
            except TokscaleError as error:
                holder = "unknown"
                with suppress(OSError):
                    holder = (self.folder / ".lock").read_text(errors="replace").strip()
                raise TokscaleError(
                    f"another fit of {self.folder.parent.parent} is under way ({holder}); "
                    "wait for it to end"
                ) from error
        try:
            yield
        finally:
            if not any(self.folder.glob("part-*.arrow")):
                self.remove()
                with suppress(OSError):
                    self.folder.parent.rmdir()
            self._lock.release()

    def checked(self) -> dict[str, Stamp]:
        """Return the stamps of the losses files that an earlier fit compared with their checksums.

        A note that is damaged counts as no note.
        """
        if not self._note.exists():
            return {}
        try:
            return from_json(dict[str, Stamp], read_json(self._note).get("checked"))
        except ValueError:
            return {}

    def prepare(self, checked: Mapping[str, Stamp]) -> None:
        """Remove parts of other fits and temporary files, and write the note."""
        with self.writing():
            remove_temporaries(self.folder)
            for path in self.folder.glob("part-*.arrow"):
                if self.digest not in path.name:
                    path.unlink()
            write_json(self._note, {**self._key.to_json(), "checked": dict(checked)})

    def write(self, block: int, table: "pa.Table") -> None:
        """Write the part of a block, a pyarrow table and its CRC-32, whole or not at all."""
        import pyarrow as pa

        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, table.schema) as file:
            file.write_table(table)
        content = sink.getvalue()
        checksum = zlib.crc32(content).to_bytes(_CRC_BYTES)
        with self.writing(), whole_or_absent(self.path(block)) as temporary:
            temporary.write_bytes(content.to_pybytes() + checksum)

    def read(self, block: int) -> "pa.Table":
        """Return the pyarrow table of a finished block.

        Raises:
            TokscaleError: the part is damaged or gone.
        """
        import pyarrow as pa

        try:
            data = self.path(block).read_bytes()
            content = memoryview(data)[:-_CRC_BYTES]
            if zlib.crc32(content).to_bytes(_CRC_BYTES) != data[-_CRC_BYTES:]:
                raise ValueError("its checksum is wrong")
            return pa.ipc.open_file(pa.py_buffer(content)).read_all()
        except (OSError, ValueError, pa.ArrowException) as error:
            raise TokscaleError(
                f"cannot read {self.path(block)} ({error}); remove it and fit the run again"
            ) from error

    def remove(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Turn the errors of a full disk or a missing permission into a `TokscaleError`."""
        try:
            yield
        except OSError as error:
            reason = os.strerror(error.errno) if error.errno else error
            raise TokscaleError(
                f"cannot write {error.filename or self.folder}: {reason}; make room or get "
                "permission, and fit the run again: finished blocks are kept"
            ) from error
