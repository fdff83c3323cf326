"""A run that is still being written, read again and again: only files that are new are read.

Nothing is written and no lock is taken, so the run may be watched from any machine that sees its
files. Between two looks losses may be added, moved away by a job that resumed from an earlier step,
or replaced by those of a new run.

Shapes: N watched tokens.
"""

from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.store.identity import Identity
from megatron_tokscale.store.losses import LossRecord, list_losses
from megatron_tokscale.store.paths import RunPaths
from megatron_tokscale.store.progress import (
    GroupProgress,
    Progress,
    ProgressTracker,
    by_group,
    catch_up,
)
from megatron_tokscale.store.reader import read_identity, read_record_of, read_watched_tokens
from megatron_tokscale.store.tokens import WatchedTokens

type _Stamp = tuple[int, int, int]
"""Inode, size and time of change of a file."""


@dataclass(frozen=True)
class RunView:
    """A run as it was at one look.

    Attributes:
        paths: paths of its files.
        info: the content of run.json.
        tokens: the watched tokens.
        records: one record per probe on disk that can be read, by ascending step.
        unreadable: reasons why losses files were left out, by step.
        n_abandoned: losses files of branches that the run has left.
        progress: states of the tokens at the last probe; None before they can be told.
        groups: progress of all tokens, then of each dataset; empty before it can be told.
    """

    paths: RunPaths
    info: Identity
    tokens: WatchedTokens
    records: tuple[LossRecord, ...]
    unreadable: Mapping[int, str]
    n_abandoned: int
    progress: Progress | None
    groups: tuple[GroupProgress, ...]

    def time_of(self, step: int) -> float:
        """Return the time of a probe: its step, or its value on an imported axis."""
        return _time_of(self.info, step)

    @property
    def unit(self) -> str:
        """The unit of time: "step", or that of an imported axis, "time" where it is not known."""
        imported = self.info.imported
        return "step" if imported is None else imported.unit or "time"

    @property
    def probe_seconds(self) -> float:
        """Seconds that the probes on disk took together."""
        return sum(record.duration for record in self.records)


class RunWatcher:
    """Looks at the run in directory `path`, and remembers what it has read."""

    def __init__(self, path: Path) -> None:
        self._paths = RunPaths(path)
        self._info: Identity | None = None
        self._stamps: dict[int, _Stamp] = {}
        self._tokens: WatchedTokens | None = None
        self._records: dict[int, LossRecord] = {}
        self._unreadable: dict[int, str] = {}
        self._tracker = ProgressTracker()

    def look(self) -> RunView | None:
        """Return the run as it is now; None if nothing has changed since the last look.

        A look that fails leaves the memory as it was.

        Raises:
            TokscaleError: the directory holds no run, or one whose axis is not training time; its
                probe set or its run.json cannot be read.
            OSError: the folder of the losses cannot be listed.
        """
        info = read_identity(self._paths)
        stamps = _stamps(list_losses(self._paths.losses))
        if (info, stamps) == (self._info, self._stamps):
            return None
        tokens = self._read_tokens(info)
        known = list(self._stamps.items())
        if list(stamps.items())[: len(known)] != known:  # losses were moved away or replaced
            self._stamps, self._records, self._unreadable = {}, {}, {}
            self._tracker = ProgressTracker()
        self._read(info, tokens, [step for step in stamps if step not in self._stamps])
        self._info, self._stamps, self._tokens = info, stamps, tokens
        return self._view(info, tokens)

    def _read_tokens(self, info: Identity) -> WatchedTokens:
        """Return the watched tokens, which are read once.

        Raises:
            TokscaleError: they cannot be read, or the run's axis is not training time.
        """
        if info.imported and info.imported.axis != "T":
            raise TokscaleError(
                f"{self._paths.root} holds losses along the axis {info.imported.axis}, where each "
                "column is another training; expected the course of one; name another run"
            )
        if self._tokens is None or self._tokens.fingerprint != info.probe_fingerprint:
            return read_watched_tokens(self._paths, info)
        return self._tokens

    def _read(self, info: Identity, tokens: WatchedTokens, steps: Iterable[int]) -> None:
        """Read the losses of new steps, later than those before; note what cannot be read."""
        files = {}
        for step in steps:
            path = self._paths.losses_at(step)
            try:
                self._records[step] = read_record_of(path, info, tokens)
            except TokscaleError as error:
                self._unreadable[step] = str(error)
                continue
            files[_time_of(info, step)] = step, path
        unread = catch_up(self._tracker, {time: path for time, (_, path) in files.items()})
        for time, reason in unread.items():
            step = files[time][0]
            self._unreadable[step] = reason
            del self._records[step]

    def _view(self, info: Identity, tokens: WatchedTokens) -> RunView:
        abandoned = self._paths.abandoned_losses
        progress = self._tracker.progress()
        groups = by_group(progress, tokens.dataset_N, len(tokens.datasets)) if progress else ()
        return RunView(
            paths=self._paths,
            info=info,
            tokens=tokens,
            records=tuple(self._records.values()),
            unreadable=dict(self._unreadable),
            n_abandoned=sum(1 for _ in abandoned.iterdir()) if abandoned.is_dir() else 0,
            progress=progress,
            groups=tuple(groups),
        )


def _time_of(info: Identity, step: int) -> float:
    """Return the time of a probe: its step, or its value on an imported axis."""
    imported = info.imported
    return imported.value_of[step] if imported and not imported.counts_steps else step


def _stamps(files: Mapping[int, Path]) -> dict[int, _Stamp]:
    """Return the stamps of files by step; a file that is gone by now is left out."""
    stamps = {}
    for step, path in files.items():
        with suppress(FileNotFoundError):
            found = path.stat()
            stamps[step] = found.st_ino, found.st_size, found.st_mtime_ns
    return stamps
