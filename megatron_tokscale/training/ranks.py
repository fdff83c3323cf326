"""Agreement among the ranks of a job: on values, on decisions, and on errors that end it.

Ranks agree in two ways:
- By collectives, where every rank arrives within seconds. A reduction of one number finds the first
  rank that has a message, and that rank broadcasts it. So the bytes that a rank sends, receives and
  holds do not grow with the number of ranks.
- Through torch.distributed's key-value store, where one rank works for minutes or hours
  (`while_others_wait`), or may fail while the others are in a collective (`ending_together`). A
  collective that waits longer than --distributed-timeout-minutes is aborted, and the job with it; a
  rank that polls the store is in no collective.
"""

import math
import os
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Final

import torch

from megatron_tokscale.core.errors import EXIT_CODE, AgreedError, TokscaleError, leads_node, say

_PATIENCE: Final = 24 * 3600.0
"""Seconds that a rank waits for the others to load a checkpoint. Our choice: longer than any load,
since the launcher ends a job that hangs."""

_GRACE: Final = 10.0
"""Seconds that a failed rank waits for the others. Our choice: other failed ranks arrive within
seconds, and ranks in a collective with it never arrive."""

_FIRST_PAUSE: Final = 0.01
_LONGEST_PAUSE: Final = 1.0
"""Seconds between two looks into the key-value store: the first pause, and the longest. Our choice:
the end of short work is seen at once, and 2,048 ranks that wait for hours send 2,000 requests a
second, which the store answers on one core."""

_ENDED: Final = "tokscale/ended"
"""Key of the number of ranks that have ended with an error of their own."""

_MET: Final = "tokscale/met"
"""Key of the number of ranks that have met the error that ends them all."""

_DONE: Final = "done"
_FAILED: Final = "failed"
"""Values of the key of a rank's work: how the work has ended."""

_LEFT_ALONE: Final = (
    "a rank has ended while this one waited for its work; expected it to finish the work; read its "
    "own output for the reason"
)


def sum_over_ranks(*values: float) -> list[float]:
    """Sum each value over all ranks."""
    tensor = torch.tensor(values, dtype=torch.float64, device=torch.cuda.current_device())
    torch.distributed.all_reduce(tensor)
    return tensor.tolist()


def first_of_all_ranks(message: str | None) -> str | None:
    """Return the first non-empty message in rank order, on every rank; None if there is none.

    Collective, except in a process without a process group, which gets its own message.
    """
    if not torch.distributed.is_initialized():  # with --lazy-mpu-init the caller makes it
        return message
    n_ranks = torch.distributed.get_world_size()
    own = torch.distributed.get_rank() if message else n_ranks
    first = torch.tensor([own], device=torch.cuda.current_device())
    torch.distributed.all_reduce(first, torch.distributed.ReduceOp.MIN)
    sender = int(first)
    return None if sender == n_ranks else _broadcast(message, sender)


def _broadcast(value: Any, sender: int) -> Any:
    """Return the value of the rank `sender`, on every rank."""
    values = [value]
    torch.distributed.broadcast_object_list(values, src=sender)
    return values[0]


def refuse_together(refusal: str | None) -> None:
    """Wait for all ranks, and raise on each of them the first refusal that any rank has.

    Raises:
        AgreedError: its message is the first refusal in rank order.
    """
    if message := first_of_all_ranks(refusal):
        raise AgreedError(message)


def together[Value](action: Callable[[], Value], *, where: bool = True) -> Value | None:
    """Call `action` on the ranks `where`; return its value there, and None elsewhere.

    Every rank calls it. The action must not communicate: a rank that fails in it would leave the
    others waiting. It takes seconds at most, and about as long on all of these ranks, since the
    others wait in a collective; longer work of one rank is for `while_others_wait`.

    Raises:
        AgreedError: on all ranks, if the action has failed on one with a `TokscaleError` or an
            `OSError`; its message is the first one in rank order.
    """
    value, refusal = _attempt(action) if where else (None, None)
    refuse_together(refusal)
    return value


def from_rank_0[Value](action: Callable[[], Value]) -> Value:
    """Call `action` on rank 0, and return its value on every rank; the value can be pickled.

    The action takes seconds at most, as in `together`.

    Raises:
        AgreedError: on all ranks, with rank 0's message.
    """
    own = together(action, where=torch.distributed.get_rank() == 0)
    value: Value = _broadcast(own, 0)
    return value


def while_others_wait[Value](action: Callable[[], Value], *, where: bool) -> Value | None:
    """Call `action` on the one rank `where`; return its value there, and None elsewhere.

    Every rank calls it. The others wait without a time limit, whatever the time limit of a
    collective is. If that rank is killed, and does not host the store, its launcher must end them.

    Args:
        action: work that may take hours; it must not communicate.
        where: True on one rank.

    Raises:
        AgreedError: on all ranks, if the action has failed with a `TokscaleError` or an `OSError`,
            with its message; or, on the others, if the host of the store has ended.
        TokscaleError: on the others, if the action has failed with another error, which ends its
            rank alone.
    """
    store, key = _store(), _new_key()
    value, refusal = None, None
    if where:
        try:
            value, refusal = _attempt(action)
        except BaseException:
            store.set(key, _FAILED)
            raise
        store.set(key, _DONE)
    elif _value_when_set(store, key) == _FAILED:
        raise TokscaleError(_LEFT_ALONE)
    refuse_together(refusal)
    return value


def _attempt[Value](action: Callable[[], Value]) -> tuple[Value | None, str | None]:
    """Return the action's value, or the message of its error."""
    try:
        return action(), None
    except (TokscaleError, OSError) as error:
        return None, str(error) or type(error).__name__


def _value_when_set(store: Any, key: str) -> str:
    """Wait until another rank has set a key, however long that takes; return its value.

    Raises:
        AgreedError: the store is gone, since the process that hosts it has ended.
    """
    try:
        _poll(lambda: bool(store.check([key])), math.inf)
        return str(store.get(key).decode())
    except RuntimeError as error:  # torch's DistError
        raise AgreedError(_LEFT_ALONE) from error


def _poll(is_over: Callable[[], bool], seconds: float) -> None:
    """Call `is_over`, which asks the store, with pauses until it is true, or for `seconds`.

    A single request that waits would keep torch's own threads, which use the same connection, from
    the store.
    """
    pause, deadline = _FIRST_PAUSE, time.monotonic() + seconds
    while not is_over() and time.monotonic() < deadline:
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE)


def begin_job() -> None:
    """Forget the errors of an earlier attempt at this job; every rank calls it before a collective.

    A launcher that restarts ranks may keep the key-value store, with all that they wrote into it.
    """
    if torch.distributed.is_initialized() and torch.distributed.get_rank() == 0:
        with suppress(RuntimeError):  # the store of --fake-process-group holds no keys
            for key in (_ENDED, _MET):
                _store().delete_key(key)


def is_first_to_end() -> bool:
    """Return whether this rank is the first to end with an error; only that rank prints it.

    True where the others cannot be reached: two lines are better than none.
    """
    if not torch.distributed.is_initialized():
        return leads_node()
    try:
        return bool(_store().add(_ENDED, 1) == 1)
    except Exception:  # a store whose host is gone may raise any error
        return True


def meet_to_end() -> None:
    """Wait up to 10 s until every rank has met the error that ends all ranks.

    A rank that prints the error calls this after it has. Rank 0 leaves last if it hosts the store.
    """
    if not torch.distributed.is_initialized():
        return
    n_ranks = torch.distributed.get_world_size()
    with suppress(RuntimeError):  # torch's DistError: the host of the store has ended
        store = _store()
        store.add(_MET, 1)
        _poll(lambda: bool(store.add(_MET, 0) >= n_ranks), _GRACE)
    is_host = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    if is_host and torch.distributed.get_rank() == 0:
        time.sleep(_LONGEST_PAUSE)


@contextmanager
def ending_together() -> Iterator[None]:
    """End all ranks with one line and exit code 2 if one ends the block with a `TokscaleError`.

    For a block that communicates: the ranks agree through torch.distributed's key-value store,
    since a rank that did not fail may wait for ever in a collective with one that did. Its launcher
    then ends it with the job.
    """
    key = _new_key()
    message: str | None = None
    try:
        yield
    except TokscaleError as error:
        message = str(error)
    try:
        failed = _outcome(key, message)
    except Exception:  # the host of the store has ended with its own error
        failed = True
    if failed:
        raise SystemExit(EXIT_CODE)


def _outcome(key: str, message: str | None) -> bool:
    """Send this rank's error to the others, and wait for them; return whether any has failed."""
    store = _store()
    failed, arrived, over = (f"{key}/{word}" for word in ("failed", "arrived", "over"))
    if message is not None:
        store.set(failed, message)
        if is_first_to_end():
            say(message)
    if store.add(arrived, 1) == torch.distributed.get_world_size():
        store.set(over, "")
    _poll(lambda: bool(store.check([over])), _PATIENCE if message is None else _GRACE)
    store.set(over, "")  # also for ranks that arrive after this one has stopped waiting
    return bool(store.check([failed]))


def _new_key() -> str:
    """Return a key that the store has not held before, the same on every rank; all ranks call it.

    A counter would not do: a launcher that restarts ranks may keep the store of those before.
    """
    return f"tokscale/{_broadcast(secrets.token_hex(8), 0)}"


def _store() -> Any:
    return torch.distributed.distributed_c10d._get_default_store()
