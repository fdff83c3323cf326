"""Verbs in processes of their own, forked from one that has imported everything."""

import os
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from pathlib import Path


def launched(rank: int, size: int, port: int) -> dict[str, str]:
    """Return the variables that torchrun sets for a rank."""
    return {
        "TORCHELASTIC_RUN_ID": "job",
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


class Forked:
    """A process that runs a verb, with its stdout and stderr in files of `folder`.

    Args:
        context: starts the process.
        folder: an existing folder.
        verb: a function of a module that runs the words.
        words: the words.
        variables: environment variables, RANK among them.
    """

    def __init__(
        self,
        context: ForkServerContext,
        folder: Path,
        verb: Callable[[list[str]], None],
        words: list[str],
        variables: dict[str, str],
    ) -> None:
        self.output, self.errors = (folder / f"{name}-{variables['RANK']}" for name in ("1", "2"))
        self.errors.touch()
        streams = (str(self.output), str(self.errors))
        self.process = context.Process(target=_run, args=(verb, words, variables, streams))
        self.process.start()

    def end(self) -> tuple[int | None, str, str]:
        """Wait for the end, and return the exit code, the output and the errors."""
        self.process.join()
        return self.process.exitcode, self.output.read_text(), self.errors.read_text()


def _run(
    verb: Callable[[list[str]], None],
    words: list[str],
    variables: dict[str, str],
    streams: tuple[str, str],
) -> None:
    os.environ.update(variables)
    for number, path in enumerate(streams, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    verb(words)
