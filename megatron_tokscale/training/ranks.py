"""Agreement among the ranks of a job: on values, on decisions, and on errors that end it."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Final

import torch

from megatron_tokscale.core.errors import EXIT_CODE, AgreedError, TokscaleError, leads_node, say

_PATIENCE: Final = timedelta(days=1)
"""Time that a rank waits for the others to load a checkpoint. Our choice: longer than any load,
since the launcher ends a job that hangs."""

_GRACE: Final = timedelta(seconds=10)
"""Time that a failed rank waits for the others. Our choice: other failed ranks arrive within
seconds, and ranks in a collective with it never arrive."""


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
    found: list[str | None] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, message)
    return next((text for text in found if text), None)


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
    others waiting.

    Raises:
        AgreedError: on all ranks, if the action has failed on one with a `TokscaleError` or an
            `OSError`; its message is the first one in rank order.
    """
    value, refusal = None, None
    if where:
        try:
            value = action()
        except (TokscaleError, OSError) as error:
            refusal = str(error) or type(error).__name__
    refuse_together(refusal)
    return value


def from_rank_0[Value](action: Callable[[], Value]) -> Value:
    """Call `action` on rank 0 and return its value, which JSON keeps unchanged, on every rank.

    Raises:
        AgreedError: on all ranks, with rank 0's message.
    """
    is_first = torch.distributed.get_rank() == 0
    text = together(lambda: json.dumps(action()), where=is_first)
    value: Value = json.loads(first_of_all_ranks(text) or "null")
    return value


def is_first_to_end() -> bool:
    """Return whether this rank is the first to end with an error; only that rank prints it.

    True where the others cannot be reached: two lines are better than none.
    """
    if not torch.distributed.is_initialized():
        return leads_node()
    try:
        return bool(_store().add("tokscale/ended", 1) == 1)
    except Exception:  # a store whose host is gone may raise any error
        return True


@contextmanager
def ending_together(name: str) -> Iterator[None]:
    """End all ranks with one line and exit code 2 if one ends the block with a `TokscaleError`.

    For a block that communicates: the ranks agree through torch.distributed's key-value store,
    since a rank that did not fail may wait for ever in a collective with one that did. Its launcher
    then ends it with the job.

    Args:
        name: name of the block, the same on all ranks and not used before.
    """
    message: str | None = None
    try:
        yield
    except TokscaleError as error:
        message = str(error)
    try:
        failed = _outcome(name, message)
    except Exception:  # the host of the store has ended with its own error
        failed = True
    if failed:
        raise SystemExit(EXIT_CODE)


def _outcome(name: str, message: str | None) -> bool:
    """Send this rank's error to the others, and wait for them; return whether any has failed."""
    store = _store()
    failed, arrived, over = (f"tokscale/{name}/{key}" for key in ("failed", "arrived", "over"))
    if message is not None:
        store.set(failed, message)
        if is_first_to_end():
            say(message)
    if store.add(arrived, 1) == torch.distributed.get_world_size():
        store.set(over, "")
    try:
        store.wait([over], _PATIENCE if message is None else _GRACE)
    except RuntimeError:  # DistStoreError: a rank did not come in time
        store.set(over, "")
    return bool(store.check([failed]))


def _store() -> Any:
    return torch.distributed.distributed_c10d._get_default_store()
