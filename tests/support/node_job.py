"""Megatron jobs of which each rank notes the files that it changes, beside its microbatches.

    node_job.py FOLDER RUN <flags of megatron_tokscale.pretrain>

The paths that a rank writes, moves or removes in the run directory RUN/tokscale are lines of
FOLDER/changed/RANK; the microbatches are in FOLDER/seen, as `recorded_job.py` writes them.
"""

import os
import sys
from pathlib import Path

import recorded_job

from megatron_tokscale import cpu

_CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link"}


def note_changes(log: Path, folder: str) -> None:
    """Note every change of a file in `folder` that Python makes in this process."""
    descriptor = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            paths = [path] if isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR) else []
        else:
            paths = list(arguments[:2]) if event in _CHANGES else []
        for path in paths:
            if isinstance(path, str | os.PathLike) and os.fspath(path).startswith(folder):
                os.write(descriptor, f"{os.fspath(path)}\n".encode())

    sys.addaudithook(hook)


def main() -> None:
    folder, run = Path(sys.argv[1]), Path(sys.argv.pop(2))
    for name in ("changed", "seen"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    note_changes(folder / "changed" / os.environ["RANK"], str(run / "tokscale"))
    sys.argv[1:2] = [str(folder / "seen"), "0"]
    cpu.enable()  # before anything of Megatron's is imported
    recorded_job.main()


if __name__ == "__main__":
    main()
