"""Checks whether this user could make a file, without making it."""

import errno
import os
from pathlib import Path

from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.core.files import is_there


def check_new_file(path: Path, use: str) -> None:
    """Refuse the path of a new file that exists already, or that this user could not write.

    Args:
        path: the file to make.
        use: why an existing file is not replaced, as in "a job may be following it".

    Raises:
        TokscaleError: something is at `path`, or no file can be made there.
    """
    if is_there(path):
        raise TokscaleError(f"{path} exists, and {use}; expected a new file; choose another name")
    if reason := unwritable(path.parent, path.name):
        raise TokscaleError(
            f"{path} cannot be written ({reason}); expected a path in a folder that you may write "
            "to; choose another"
        )


def unwritable(folder: Path, name: str) -> str | None:
    """Return the error with which this user would fail to make or replace a file; None for none."""
    try:
        return _obstacle(folder, name)
    except OSError as error:  # a folder that this user may not enter, a name that is too long
        return str(error)


def _obstacle(folder: Path, name: str) -> str | None:
    if not folder.exists():
        path = next(path for path in (folder, *folder.parents) if path.parent.exists())
        if not path.parent.is_dir():
            return f"[Errno {errno.ENOTDIR}] Not a directory: '{folder}'"
    elif not folder.is_dir():
        return f"[Errno {errno.EEXIST}] File exists: '{folder}'"
    else:
        path = folder / name
    place = path if path.is_file() else path.parent
    if os.access(place, os.W_OK | (os.X_OK if place.is_dir() else 0)):
        return None
    return f"[Errno {errno.EACCES}] Permission denied: '{path}'"
