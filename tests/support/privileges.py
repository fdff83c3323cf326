"""Permissions that hold for root too, so that a file can be unreadable and a folder read-only."""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

_VERSION = 0x20080522  # of the kernel's structures: 64 capabilities in two rows
_OVERRIDES = 0b110  # CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH


def _call(name: str, rows) -> None:
    header = (ctypes.c_uint32 * 2)(_VERSION, 0)
    if getattr(ctypes.CDLL(None, use_errno=True), name)(header, rows):
        raise OSError(ctypes.get_errno(), name)


def drop_overrides() -> int:
    """Let permissions hold for this thread, and return what `restore_overrides` needs."""
    rows = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable, twice
    _call("capget", rows)
    before = int(rows[0])
    rows[0] = before & ~_OVERRIDES
    _call("capset", rows)
    return before


def restore_overrides(before: int) -> None:
    """Undo `drop_overrides`."""
    rows = (ctypes.c_uint32 * 6)()
    _call("capget", rows)
    rows[0] = before
    _call("capset", rows)


@contextmanager
def plain_permissions() -> Iterator[None]:
    """Let permissions hold, as for any other user."""
    before = drop_overrides()
    try:
        yield
    finally:
        restore_overrides(before)
