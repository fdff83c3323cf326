"""Writing a run: the one writer that a training job has.

Shapes: N watched tokens.
"""

import errno
import json
import os
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.core.files import remove_temporaries, sync
from megatron_tokscale.probe import ProbeSet
from megatron_tokscale.store.identity import Identity, merged
from megatron_tokscale.store.launches import Launch, parting
from megatron_tokscale.store.lock import RunLock
from megatron_tokscale.store.losses import (
    LossRecord,
    list_losses,
    read_losses,
    read_record,
    write_losses,
)
from megatron_tokscale.store.paths import RunPaths


class RunWriter:
    """Writes the losses, the identity and the journal of one run into the run directory `path`."""

    def __init__(self, path: Path):
        self.paths = RunPaths(path)
        self.folder = self.paths.folder
        self._lock = RunLock(self.paths.lock)

    def check(self, probe_set: ProbeSet, model: Mapping[str, Any]) -> None:
        """Refuse a directory that belongs to another run.

        Raises:
            TokscaleError: it holds losses of another probe set or of another model.
        """
        if not self.paths.identity.exists():
            return
        known = Identity.load(self.paths.identity)
        if known.probe_fingerprint != probe_set.fingerprint:
            raise TokscaleError(
                f"{self.folder} holds losses of probe set {known.probe_fingerprint}, this job "
                f"has {probe_set.fingerprint}; give it that probe set or another --tokscale-dir"
            )
        for name, value in model.items():
            if name in known.model and known.model[name] != value:
                raise TokscaleError(
                    f"{self.folder} is of a run with {name} {known.model[name]}, this job has "
                    f"{value}; choose another --tokscale-dir"
                )

    def open(
        self,
        probe_set: ProbeSet,
        model: Mapping[str, Any],
        launches: Sequence[Launch],
        resume_step: int | None,
        *,
        size: Mapping[str, Any] | None = None,
    ) -> Launch | None:
        """Take the run's lock, make its files if it is new, and tidy up after a job before this.

        Losses of later steps than `resume_step` belong to a branch that is abandoned by resuming
        from an earlier checkpoint, and launches that have taken no step by then too. So do losses
        from the step on where the directory's launches part from those that have led to the job's
        checkpoint. A job that starts at step 0 has fresh weights, and one whose first launch is
        another than the directory's is of another run: both set aside all there is of the run
        before. None (a replay of checkpoints) abandons nothing.

        Args:
            probe_set: the watched tokens.
            model: sizes that stay the same when a run is resumed.
            launches: of the run, the job's own as the last; of a replay, those that the
                checkpoints tell.
            resume_step: where the job goes on.
            size: of the model, for a new run.

        Returns:
            The first launch of a branch or a run whose losses were in the directory in place of
            the job's own; None without one.

        Raises:
            OSError: the directory cannot be written.
            TokscaleError: another job writes into it, or its run.json cannot be read.
        """
        self.paths.losses.mkdir(parents=True, exist_ok=True)
        is_locked = self._lock.acquire()
        for folder in (self.folder, self.paths.losses):
            remove_temporaries(folder)
        path = self.paths.identity
        known = Identity.load(path) if path.exists() else None
        parted, last = None, resume_step
        if known and resume_step:
            is_whole = not known.is_replay
            parted = parting(known.launches, launches, resume_step, is_whole=is_whole)
            last = resume_step if parted is None else parted.step
        steps = [] if last is None else list_losses(self.paths.losses)
        abandoned = [step for step in steps if step > (last or 0) or last == 0]
        for step in abandoned:
            self._abandon(step)
        replaced = known.run_id if known and last == 0 else None
        if replaced:
            self._set_aside(replaced)
            known = None
        if known is None:
            probe_set.save(self.paths.probe_set)
            new = Identity(
                secrets.token_hex(8),
                probe_set.fingerprint,
                model=model,
                size=size or {},
                is_replay=resume_step is None,
                launches=tuple(launches),
            )
        else:
            new = _resumed(known, launches, resume_step)
        if new != known:
            new.save(path)
        kept = {launch.step for launch in new.launches}
        dropped = [launch for launch in known.launches if launch.step not in kept] if known else []
        self.journal(
            "started",
            step=resume_step,
            abandoned=abandoned,
            set_aside=replaced,
            abandoned_launches=[launch.to_json() for launch in dropped],
            layout=launches[-1].layout if launches else None,
            locked=is_locked,
        )
        return parted

    def _set_aside(self, run_id: str) -> None:
        """Move the files of the run before out of the way of the one that starts.

        Its losses are abandoned already; the journal tells of all runs in its directory.
        """
        paths, folder = self.paths, self.paths.abandoned(run_id)
        folder.mkdir(parents=True, exist_ok=True)
        trained_on = (paths.data_record, paths.plan, paths.decisions)
        for path in (paths.analysis, *trained_on, paths.identity):
            if path.exists():
                os.replace(path, folder / path.name)

    def check_launches(self, launches: Sequence[Launch], step: int) -> None:
        """Refuse a directory whose losses are of other steps than those up to a checkpoint.

        Args:
            launches: that have led to the checkpoint; without any of the plugin they tell nothing.
            step: which step the checkpoint is of.

        Raises:
            TokscaleError: the directory is of another run, or of another branch.
        """
        parted = parting(self.launches(), launches, step, is_whole=False)
        if parted is not None and any(launch.launch_id for launch in launches):
            raise TokscaleError(
                f"{self.folder} holds losses of a run that parts from the checkpoints' at step "
                f"{parted.step}; choose another --tokscale-dir"
            )

    def check_free(self) -> bool:
        """Look at the run's lock and do not take it; False where this machine cannot tell.

        Raises:
            TokscaleError: another job writes into the directory.
        """
        return self._lock.check()

    def close(self) -> None:
        """Give the run's lock back."""
        self._lock.release()

    def _abandon(self, step: int) -> None:
        path, folder = self.paths.losses_at(step), self.paths.abandoned_losses
        folder.mkdir(exist_ok=True)
        copies = sum(1 for copy in folder.iterdir() if copy.name.startswith(path.name))
        os.replace(path, folder / f"{path.name}.{copies}")

    def has(self, step: int) -> bool:
        """Whether the losses of `step` are on disk."""
        return self.paths.losses_at(step).exists()

    def steps(self) -> list[int]:
        """The steps whose losses are on disk, ascending."""
        return list(list_losses(self.paths.losses))

    def record(self, step: int) -> LossRecord | None:
        """The record of the losses at `step`; None if there are none that can be read."""
        try:
            return read_record(self.paths.losses_at(step))[0] if self.has(step) else None
        except TokscaleError:
            return None

    def launches(self) -> tuple[Launch, ...]:
        """The launches of the run in the directory; none if there is no run.

        Raises:
            TokscaleError: its run.json cannot be read.
        """
        path = self.paths.identity
        return Identity.load(path).launches if path.exists() else ()

    def latest(self, step: int) -> NDArray[np.float32] | None:
        """The last losses on disk at or before `step`; None if there are none that can be read."""
        files = [path for at, path in list_losses(self.paths.losses).items() if at <= step]
        try:
            return read_losses(files[-1]) if files else None
        except TokscaleError:
            return None

    def write(self, loss_N: NDArray[np.floating[Any]], record: LossRecord) -> None:
        """Write the losses (nats) of one probe, whole or not at all.

        Raises:
            OSError: the disk is full, or the directory is gone or cannot be written.
        """
        if not self.paths.identity.exists():
            raise FileNotFoundError(errno.ENOENT, "the run directory is gone", str(self.folder))
        write_losses(self.paths.losses_at(record.step), loss_N, record)
        self.journal(
            "probe",
            step=record.step,
            seconds=round(record.duration, 3),
            nonfinite=int(loss_N.size - np.isfinite(loss_N).sum()),
        )

    def journal(self, event: str, **values: Any) -> None:
        """Append one event; a line torn by a kill stays a line of its own.

        Raises:
            OSError: the journal cannot be written.
        """
        line = json.dumps({"event": event, "time": round(time.time(), 3), **values})
        with self.paths.journal.open("ab+") as file:
            file.seek(0, os.SEEK_END)
            if file.tell() > 0:
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":
                    line = "\n" + line
            file.write(line.encode() + b"\n")
            file.flush()
            sync(file.fileno())


def _resumed(known: Identity, launches: Sequence[Launch], resume_step: int | None) -> Identity:
    """Return a run's identity after a replay, or after a job has resumed from `resume_step`."""
    if resume_step is None:
        is_known = not known.is_replay
        return known if is_known else replace(known, launches=merged(known.launches, launches))
    return replace(known, launches=tuple(launches), is_replay=False)
