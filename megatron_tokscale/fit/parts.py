"""A fit in parts: a file per finished block of tokens, and the processes that make them together.

Shapes: N tokens, K probe steps.
"""

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
from typing import Any, TypeVar

from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.core.files import read_json, remove_temporaries, whole_or_absent, write_json
from megatron_tokscale.fit.joining import Place, is_launched, join
from megatron_tokscale.store.lock import RunLock

Value = TypeVar("Value")
_PATIENCE = timedelta(days=30)
_FAILED = "failed"
_CRC_BYTES = 4


@dataclass(frozen=True)
class Ranks:
    """The processes that fit a run together; by default one alone. `Ranks.joined` makes several.

    An error that one of them meets ends all of them: what is done `together` or `on_first` raises
    the same `TokscaleError` on every rank.

    Attributes:
        rank: this process's number, from 0.
        size: how many there are.
        local_rank: this process's number on its node.
        store: torch.distributed's key-value store, None if alone.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    store: Any = None

    @staticmethod
    @contextmanager
    def joined(distributed: bool = False) -> "Iterator[Ranks]":
        """Join the other processes that torchrun has started, on gloo, until the block's end.

        Args:
            distributed: another launcher than torchrun has started them, and has set its variables.

        Raises:
            TokscaleError: the launcher's variables are not what they should be, or the others do
                not come.
        """
        place = Place.from_environment() if distributed or is_launched() else None
        if place is None or place.size == 1:
            yield Ranks()
            return
        from torch import distributed as torch_distributed

        store = join(place)
        torch_distributed.init_process_group(
            "gloo", store=store, rank=place.rank, world_size=place.size, timeout=_PATIENCE
        )
        try:
            yield Ranks(place.rank, place.size, place.local_rank, store)
        finally:
            torch_distributed.destroy_process_group()

    @property
    def leads(self) -> bool:
        """Whether this is rank 0, which prepares, reports and assembles."""
        return self.rank == 0

    def device(self, name: Any) -> Any:
        """The torch device to compute on: the CPU for None, this rank's GPU for a bare "cuda".

        Processes beyond a node's GPUs share these in turn.

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
            raise TokscaleError(f"cannot compute on device '{name}': {reason}") from error
        return device

    def together(
        self, action: Callable[[], Value], meanwhile: Callable[[], object] = lambda: None
    ) -> Value:
        """Do `action` on every rank; return its value once all are done.

        A rank that is done calls `meanwhile` every second until the others are, and then once.
        """
        if self.size == 1:
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

    def on_first(self, action: Callable[[], Value]) -> Value:
        """Do `action` on rank 0 and return its value, plain data, on every rank."""
        value = self.together(lambda: action() if self.leads else None)
        first: Value = self._exchange(value)[0]
        return first

    @property
    def is_lost(self) -> bool:
        """Whether another rank has failed, so that going on is in vain."""
        return self.size > 1 and bool(self.store.check([_FAILED]))

    def _exchange(self, value: Any, meanwhile: Callable[[], object] = lambda: None) -> list[Any]:
        """The value of every rank, by rank."""
        if self.size == 1:
            return [value]
        from torch import distributed

        values: list[Any] = [None] * self.size
        with ThreadPoolExecutor(max_workers=1) as thread:
            exchange = thread.submit(distributed.all_gather_object, values, value)
            while wait([exchange], timeout=1).not_done:
                meanwhile()
        meanwhile()
        try:
            exchange.result()
        except RuntimeError as error:
            raise TokscaleError(
                "another process of this fit has died; start it again to go on where it stopped"
            ) from error
        return values


class Parts:
    """The folder of finished blocks; a part's presence says that its block is finished.

    A part's name holds a digest of what it was made of, so parts made of anything else are never
    taken for it. note.json says what that is, and which losses files were checked.
    """

    def __init__(self, folder: Path, made_of: Mapping[str, Any]) -> None:
        self.folder = folder
        self._made_of = dict(made_of)
        self._note = folder / "note.json"
        self._lock = RunLock(folder / ".lock")

    @cached_property
    def digest(self) -> str:
        """SHA-256 (first 16 hex digits) of everything that decides what the fits are."""
        text = json.dumps(self._made_of, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def path(self, block: int) -> Path:
        """The part of a block."""
        return self.folder / f"part-{self.digest}-{block:06d}.arrow"

    def finished(self) -> set[int]:
        """The blocks that need not be fitted again."""
        names = self.folder.glob(f"part-{self.digest}-*.arrow")
        return {int(path.stem.rpartition("-")[2]) for path in names}

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other fits of the run out. At the end no folder is left that holds no part.

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

    def checked(self) -> dict[str, list[int]]:
        """The losses files whose checksums a fit before this one found right, and their stamps."""
        if not self._note.exists():
            return {}
        checked = read_json(self._note).get("checked")
        return checked if isinstance(checked, dict) else {}

    def prepare(self, checked: Mapping[str, list[int]]) -> None:
        """Throw away what is of another fit or half written, and write the note."""
        with self.writing():
            remove_temporaries(self.folder)
            for path in self.folder.glob("part-*.arrow"):
                if self.digest not in path.name:
                    path.unlink()
            write_json(self._note, {**self._made_of, "checked": dict(checked)})

    def write(self, block: int, table: Any) -> None:
        """Write the part of a block, a pyarrow table and its CRC-32, whole or not at all."""
        import pyarrow as pa

        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, table.schema) as file:
            file.write_table(table)
        content = sink.getvalue()
        checksum = zlib.crc32(content).to_bytes(_CRC_BYTES)
        with self.writing(), whole_or_absent(self.path(block)) as temporary:
            temporary.write_bytes(content.to_pybytes() + checksum)

    def read(self, block: int) -> Any:
        """The pyarrow table of a finished block.

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
        """Turn a full disk or a missing permission into a `TokscaleError`."""
        try:
            yield
        except OSError as error:
            reason = os.strerror(error.errno) if error.errno else error
            raise TokscaleError(
                f"cannot write {error.filename or self.folder}: {reason}; make room or get "
                "permission, and fit the run again: finished blocks are kept"
            ) from error
