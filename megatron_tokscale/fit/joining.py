"""The rendezvous of the processes that fit a run together."""

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Final, Self

from megatron_tokscale.core.errors import TokscaleError, say

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]

_JOINED: Final = "joined"  # key that counts the processes
_QUIET_SECONDS: Final = 5.0  # wait before a message: longer than a launcher needs to start all
_WAIT: Final = timedelta(minutes=30)  # a queue of a cluster can hold some of the processes back
_PAUSE_SECONDS: Final = 0.05  # between two reads of the count


@dataclass(frozen=True)
class LaunchedProcess:
    """The number of this process among several, and the address at which they meet.

    Attributes:
        rank: its number, from 0.
        size: the number of processes.
        local_rank: its number on its node.
        host: the host of process 0.
        port: the port of process 0.
    """

    rank: int
    size: int
    local_rank: int
    host: str
    port: int

    @classmethod
    def from_environment(cls) -> Self:
        """Read RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, and LOCAL_RANK if it is set.

        Raises:
            TokscaleError: a variable is missing or has an impossible value.
        """
        size = _variable("WORLD_SIZE", 1, 2**31)
        rank = _variable("RANK", 0, size - 1)
        host = os.environ.get("MASTER_ADDR", "")
        if size > 1 and not host:
            raise _wrong_variable("MASTER_ADDR", host, "the host of process 0")
        port = _variable("MASTER_PORT", 1, 2**16 - 1) if size > 1 else 0
        local_rank = os.environ.get("LOCAL_RANK", "")
        return cls(rank, size, int(local_rank) if local_rank.isdecimal() else 0, host, port)


def is_launched() -> bool:
    """Return whether torchrun has started this process.

    RANK and WORLD_SIZE alone do not prove it: every shell in a pod of a training job has them.
    """
    return "TORCHELASTIC_RUN_ID" in os.environ


def join(process: LaunchedProcess) -> "Store":
    """Wait for all processes, and return torch.distributed's key-value store that they share.

    Raises:
        TokscaleError: some processes have not come within half an hour, or the address cannot be
            used.
    """
    from torch import distributed

    is_host = process.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    address = f"{process.host}:{process.port}"
    try:
        with _reporting_if_slow(f"waiting for process 0 of this fit at {address}"):
            tcp = distributed.TCPStore(  # type: ignore[attr-defined]
                process.host,
                process.port,
                process.size,
                is_host,
                timeout=_WAIT,
                wait_for_workers=False,
                multi_tenant=True,
            )
        store: Store = distributed.PrefixStore("tokscale-fit", tcp)  # type: ignore[attr-defined]
        store.add(_JOINED, 1)
        if process.rank == 0:
            _wait_for_all(store, process.size)
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise TokscaleError(
            f"the {process.size} processes of this fit have not met at {address} "
            f"({reason}); start WORLD_SIZE of them, or one without --distributed"
        ) from error
    return store


def _wait_for_all(store: "Store", size: int) -> None:
    started, told = time.monotonic(), 0
    while (missing := size - store.add(_JOINED, 0)) > 0:
        waited = time.monotonic() - started
        if waited > _WAIT.total_seconds():
            raise RuntimeError(f"{missing} are missing")
        if waited > _QUIET_SECONDS and missing != told:
            told = missing
            plural = "" if missing == 1 else "es"
            say(f"waiting for {missing} more process{plural} of this fit (WORLD_SIZE is {size})")
        time.sleep(_PAUSE_SECONDS)


@contextmanager
def _reporting_if_slow(line: str) -> Iterator[None]:
    """Print a line if the block takes longer than `_QUIET_SECONDS`."""
    timer = threading.Timer(_QUIET_SECONDS, say, [line])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _variable(name: str, low: int, high: int) -> int:
    text = os.environ.get(name, "")
    value = int(text) if text.isascii() and text.isdecimal() else -1
    if not low <= value <= high:
        raise _wrong_variable(name, text, f"a number from {low} to {high}")
    return value


def _wrong_variable(name: str, text: str, expected: str) -> TokscaleError:
    return TokscaleError(
        f"{name} is {text!r}; expected {expected}, as torchrun sets it for a fit in several "
        "processes; to fit in one, leave --distributed and torchrun away"
    )
