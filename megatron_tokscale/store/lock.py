"""One job per run directory."""

import errno
import fcntl
import os
import socket
from contextlib import suppress
from pathlib import Path

from megatron_tokscale.errors import TokscaleError


class RunLock:
    """A lock on a run's directory that ends with the process that holds it, however it ends.

    A POSIX record lock: it is not inherited by forked data-loader workers (which may outlive a
    killed rank by seconds) and holds between the nodes of a shared file system that has locks.
    """

    def __init__(self, path: Path):
        self._path = path
        self._descriptor: int | None = None

    def acquire(self) -> bool:
        """Take the lock; False where the file system has no locks.

        Raises:
            TokscaleError: another job has it.
            OSError: the lock's file cannot be made.
        """
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = _read_holder(descriptor)
            os.close(descriptor)
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                return False
            raise TokscaleError(
                f"{self._path.parent} is in use by another job ({holder}); wait for it to end, or "
                "give this one another --tokscale-dir"
            ) from error
        with suppress(OSError):  # the holder's name is a courtesy
            os.truncate(descriptor, 0)
            os.write(descriptor, f"host {socket.gethostname()}, process {os.getpid()}\n".encode())
        self._descriptor = descriptor
        return True

    def release(self) -> None:
        """Give the lock back, if it is held."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def _read_holder(descriptor: int) -> str:
    """Who wrote into the lock's file; CIFS lets nobody else read it."""
    with suppress(OSError):
        return os.read(descriptor, 200).decode(errors="replace").strip() or "unknown"
    return "unknown"
