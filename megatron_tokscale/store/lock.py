"""The lock that lets one job at a time write into a run directory."""

import errno
import fcntl
import os
import socket
import struct
import sys
from contextlib import suppress
from pathlib import Path

from megatron_tokscale.core.errors import TokscaleError


class RunLock:
    """Lock on a run's directory that is released when its process ends, by whatever cause.

    A POSIX record lock: it is not inherited by forked data-loader workers (which may outlive a
    killed rank by seconds) and holds between the nodes of a shared file system that has locks.
    """

    def __init__(self, path: Path):
        self._path = path
        self._descriptor: int | None = None

    def acquire(self) -> bool:
        """Take the lock; return False if the file system has no locks.

        Raises:
            TokscaleError: another job holds the lock.
            OSError: the lock's file cannot be created.
        """
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            refusal = self._refusal(descriptor)
            os.close(descriptor)
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                return False
            raise refusal from error
        with suppress(OSError):  # the holder's name is only for the other job's message
            os.truncate(descriptor, 0)
            os.write(descriptor, f"host {socket.gethostname()}, process {os.getpid()}\n".encode())
        self._descriptor = descriptor
        return True

    def check(self) -> bool:
        """Check that no job holds the lock, without taking it; return False if that is unknown.

        Raises:
            TokscaleError: another job holds the lock.
        """
        if not sys.platform.startswith("linux"):
            return False
        try:
            descriptor = os.open(self._path, os.O_RDONLY)
        except FileNotFoundError:
            return True
        except OSError:
            return False
        # struct flock: the exclusive lock that is wanted; Linux returns a lock that excludes it.
        wanted = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        try:
            kind = struct.unpack("hhqqi4x", fcntl.fcntl(descriptor, fcntl.F_GETLK, wanted))[0]
            if kind != fcntl.F_UNLCK:
                raise self._refusal(descriptor)
        except OSError:
            return False
        finally:
            os.close(descriptor)
        return True

    def _refusal(self, descriptor: int) -> TokscaleError:
        holder = _read_holder(descriptor)
        return TokscaleError(
            f"{self._path.parent} is in use by another job ({holder}); wait for it to end (if "
            f"its host is gone, remove {self._path.name} there), or give this one another "
            "--tokscale-dir"
        )

    def release(self) -> None:
        """Release the lock, if it is held.

        Closing reports a holder's name that could not be written: NFS says so here, if its disk is
        full. The lock is released nevertheless.
        """
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            with suppress(OSError):
                os.close(descriptor)


def _read_holder(descriptor: int) -> str:
    """Return the name that the holder wrote into the lock's file; on CIFS nobody can read it."""
    with suppress(OSError):
        return os.read(descriptor, 200).decode(errors="replace").strip() or "unknown"
    return "unknown"
