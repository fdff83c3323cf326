"""The meeting of the processes that fit a run together."""

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final

from megatron_tokscale.core.errors import TokscaleError, say

_JOINED: Final = "joined"
_QUIET_SECONDS: Final = 5.0
_WAIT: Final = timedelta(minutes=30)


@dataclass(frozen=True)
class Place:
    """This process among several, numbered from 0, by its launcher's variables."""

    rank: int
    size: int
    local_rank: int
    host: str
    port: int

    @classmethod
    def from_environment(cls) -> "Place":
        """Read RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, and LOCAL_RANK if it is there.

        Raises:
            TokscaleError: one is missing or is not what it should be.
        """
        size = _number("WORLD_SIZE", 1, 2**31)
        rank = _number("RANK", 0, size - 1)
        host = os.environ.get("MASTER_ADDR", "")
        if size > 1 and not host:
            raise _odd("MASTER_ADDR", host, "the host of process 0")
        port = _number("MASTER_PORT", 1, 2**16 - 1) if size > 1 else 0
        local_rank = os.environ.get("LOCAL_RANK", "")
        return cls(rank, size, int(local_rank) if local_rank.isdecimal() else 0, host, port)


def is_launched() -> bool:
    """Return whether torchrun has started this process.

    RANK and WORLD_SIZE alone do not tell: every shell in a pod of a training job has them.
    """
    return "TORCHELASTIC_RUN_ID" in os.environ


def join(place: Place) -> Any:
    """Return torch.distributed's key-value store once all processes have come to it.

    Raises:
        TokscaleError: they have not come within half an hour, or the address is not to be had.
    """
    from torch import distributed

    hosts = place.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    try:
        with _told_after_a_while(f"waiting for process 0 of this fit at {place.host}:{place.port}"):
            tcp = distributed.TCPStore(  # type: ignore[attr-defined]
                place.host,
                place.port,
                place.size,
                hosts,
                timeout=_WAIT,
                wait_for_workers=False,
                multi_tenant=True,
            )
        store = distributed.PrefixStore("tokscale-fit", tcp)  # type: ignore[attr-defined]
        store.add(_JOINED, 1)
        if place.rank == 0:
            _wait_for_all(store, place.size)
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise TokscaleError(
            f"the {place.size} processes of this fit have not met at {place.host}:{place.port} "
            f"({reason}); start WORLD_SIZE of them, or one without --distributed"
        ) from error
    return store


def _wait_for_all(store: Any, size: int) -> None:
    started, told = time.monotonic(), 0
    while (missing := size - store.add(_JOINED, 0)) > 0:
        waited = time.monotonic() - started
        if waited > _WAIT.total_seconds():
            raise RuntimeError(f"{missing} are missing")
        if waited > _QUIET_SECONDS and missing != told:
            told = missing
            plural = "" if missing == 1 else "es"
            say(f"waiting for {missing} more process{plural} of this fit (WORLD_SIZE is {size})")
        time.sleep(0.05)


@contextmanager
def _told_after_a_while(line: str) -> Iterator[None]:
    timer = threading.Timer(_QUIET_SECONDS, say, [line])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _number(name: str, low: int, high: int) -> int:
    text = os.environ.get(name, "")
    value = int(text) if text.isascii() and text.isdecimal() else -1
    if not low <= value <= high:
        raise _odd(name, text, f"a number from {low} to {high}")
    return value


def _odd(name: str, text: str, expected: str) -> TokscaleError:
    return TokscaleError(
        f"{name} is {text!r}; expected {expected}, as torchrun sets it for a fit in several "
        "processes; to fit in one, leave --distributed and torchrun away"
    )
