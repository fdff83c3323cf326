"""The writer of a run's files; a training job has one.

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

import numpy as np

from megatron_tokscale.core.arrays import AnyFloats, Floats32
from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.core.files import remove_temporaries, sync
from megatron_tokscale.core.records import JSON
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
from megatron_tokscale.store.sample_losses import abandon_samples


class RunWriter:
    """Writes the losses, the identity and the journal of one run into the run directory `path`."""

    def __init__(self, path: Path):
        self.paths = RunPaths(path)
        self._lock = RunLock(self.paths.lock)

    def check(self, probe_set: ProbeSet, model: Mapping[str, int | None]) -> None:
        """Refuse a directory that belongs to another run.

        Raises:
            TokscaleError: the directory holds losses of another probe set or of another model, or
                imported ones.
        """
        if not self.paths.identity.exists():
            return
        known = Identity.load(self.paths.identity)
        if known.imported is not None:
            raise TokscaleError(
                f"{self.paths.folder} holds imported losses; choose another --tokscale-dir"
            )
        if known.probe_fingerprint != probe_set.fingerprint:
            raise TokscaleError(
                f"{self.paths.folder} holds losses of probe set {known.probe_fingerprint}, this "
                f"job has {probe_set.fingerprint}; give it that probe set or another --tokscale-dir"
            )
        for name, value in model.items():
            if name in known.model and known.model[name] != value:
                raise TokscaleError(
                    f"{self.paths.folder} is of a run with {name} {known.model[name]}, this job "
                    f"has {value}; choose another --tokscale-dir"
                )

    def open(
        self,
        probe_set: ProbeSet,
        model: Mapping[str, int | None],
        launches: Sequence[Launch],
        resume_step: int | None,
        *,
        size: Mapping[str, int] | None = None,
    ) -> Launch | None:
        """Take the run's lock, create the files of a new run, and tidy up after an earlier job.

        A job that resumes from `resume_step` abandons the losses of later steps, those of training
        samples too, and the launches that had taken no step by then. If the launches in the
        directory differ from those that led to the job's checkpoint, the losses after the first
        difference are abandoned too. A job that starts at step 0 has fresh weights, and a job whose
        first launch is not the directory's belongs to another run: both set aside all files of the
        run before. A replay of checkpoints abandons nothing.

        Args:
            probe_set: the watched tokens.
            model: sizes that stay the same when a run is resumed.
            launches: launches of the run, the job's own as the last; of a replay, the launches that
                the checkpoints hold.
            resume_step: step at which the job starts; None for a replay.
            size: size of the model, for a new run.

        Returns:
            The first launch in the directory that did not lead to the job's checkpoint, or the
            first that did and is not in the directory; None without one.

        Raises:
            OSError: the directory cannot be written.
            TokscaleError: another job writes into it, or its run.json cannot be read.
        """
        is_locked = self._lock_and_tidy_up()
        found = Identity.load(self.paths.identity) if self.paths.identity.exists() else None
        parted, last = _past(found, launches, resume_step)
        abandoned = self._abandon_after(last)
        replaced = found.run_id if found and last == 0 else None
        if replaced:
            self._set_aside(replaced)
        known = None if replaced else found
        new = self._write_identity(known, probe_set, model, launches, resume_step, size or {})
        self.journal(
            "started",
            step=resume_step,
            abandoned=abandoned,
            set_aside=replaced,
            abandoned_launches=[launch.to_json() for launch in _dropped(known, new)],
            layout=launches[-1].layout if launches else None,
            locked=is_locked,
        )
        return parted

    def _lock_and_tidy_up(self) -> bool:
        """Take the run's lock, then remove an earlier job's temporary files.

        The lock comes first, so that no file of a running job is removed.

        Returns:
            False if the file system cannot lock.

        Raises:
            TokscaleError: another job writes into the directory.
        """
        self.paths.losses.mkdir(parents=True, exist_ok=True)
        is_locked = self._lock.acquire()
        for folder in (self.paths.folder, self.paths.losses):
            remove_temporaries(folder)
        return is_locked

    def _abandon_after(self, last: int | None) -> list[int]:
        """Abandon the losses after step `last`, at 0 those of step 0 too; None abandons nothing.

        Returns:
            The steps of the abandoned losses, ascending.
        """
        steps = [] if last is None else list_losses(self.paths.losses)
        abandoned = [step for step in steps if step > (last or 0) or last == 0]
        for step in abandoned:
            self._abandon(step)
        if last is not None and self._is_of_training:
            abandon_samples(self.paths.samples, last)
        return abandoned

    @property
    def _is_of_training(self) -> bool:
        """True in the job's run directory, which holds the files about the training."""
        return self.paths.of_training == self.paths.folder

    def _write_identity(
        self,
        known: Identity | None,
        probe_set: ProbeSet,
        model: Mapping[str, int | None],
        launches: Sequence[Launch],
        resume_step: int | None,
        size: Mapping[str, int],
    ) -> Identity:
        """Write run.json if the run is new (`known` is None) or has changed, and return it."""
        if known is None:
            probe_set.save(self.paths.probe_set)
            new = Identity(
                secrets.token_hex(8),
                probe_set.fingerprint,
                model=model,
                size=size,
                is_replay=resume_step is None,
                launches=tuple(launches),
            )
        else:
            new = _resumed(known, launches, resume_step)
        if new != known:
            new.save(self.paths.identity)
        return new

    def _set_aside(self, run_id: str) -> None:
        """Move the files of the run before into a folder for abandoned runs.

        Its losses are abandoned already; the journal covers all runs in its directory. The losses
        of further probe sets move with their directories.
        """
        paths, folder = self.paths, self.paths.abandoned(run_id)
        folder.mkdir(parents=True, exist_ok=True)
        about_training = (paths.data_record, paths.plan, paths.decisions, paths.samples)
        own = about_training if self._is_of_training else ()
        for path in (paths.analysis, paths.further, *own, paths.identity):
            if path.exists():
                os.replace(path, folder / path.name)

    def check_launches(self, launches: Sequence[Launch], step: int) -> None:
        """Refuse a directory whose losses are not of the steps that led to a checkpoint.

        Args:
            launches: launches that led to the checkpoint; if no job with the plugin is among them,
                nothing is refused.
            step: step of the checkpoint.

        Raises:
            TokscaleError: the directory is of another run, or of another branch.
        """
        parted = parting(self.launches(), launches, step, is_whole=False)
        if parted is not None and any(launch.launch_id for launch in launches):
            raise TokscaleError(
                f"{self.paths.folder} holds losses of a run that differs from the checkpoints' "
                f"from step {parted.step}; choose another --tokscale-dir"
            )

    def check_free(self) -> bool:
        """Check that no job writes into the directory; return False if the file system cannot say.

        Raises:
            TokscaleError: another job writes into the directory.
        """
        return self._lock.check()

    def close(self) -> None:
        """Release the run's lock."""
        self._lock.release()

    def _abandon(self, step: int) -> None:
        path, folder = self.paths.losses_at(step), self.paths.abandoned_losses
        folder.mkdir(exist_ok=True)
        copies = sum(1 for copy in folder.iterdir() if copy.name.startswith(path.name))
        os.replace(path, folder / f"{path.name}.{copies}")

    def has(self, step: int) -> bool:
        """Return whether the losses of `step` are on disk."""
        return self.paths.losses_at(step).exists()

    def steps(self) -> list[int]:
        """Return the steps whose losses are on disk, ascending."""
        return list(list_losses(self.paths.losses))

    def record(self, step: int) -> LossRecord | None:
        """Return the record of the losses at `step`; None if no readable file has it."""
        try:
            return read_record(self.paths.losses_at(step))[0] if self.has(step) else None
        except TokscaleError:
            return None

    def run_id(self) -> str:
        """Return the id of the run in the directory.

        Raises:
            TokscaleError: its run.json cannot be read.
        """
        return Identity.load(self.paths.identity).run_id

    def launches(self) -> tuple[Launch, ...]:
        """Return the launches of the run in the directory; none if it holds no run.

        Raises:
            TokscaleError: its run.json cannot be read.
        """
        path = self.paths.identity
        return Identity.load(path).launches if path.exists() else ()

    def latest(self, step: int) -> Floats32 | None:
        """Return the last losses on disk at or before `step`; None if they cannot be read."""
        files = [path for at, path in list_losses(self.paths.losses).items() if at <= step]
        try:
            return read_losses(files[-1]) if files else None
        except TokscaleError:
            return None

    def write(self, loss_N: AnyFloats, record: LossRecord) -> None:
        """Write the losses (nats) of one probe, whole or not at all.

        Raises:
            OSError: the disk is full, or the directory is gone or cannot be written.
        """
        if not self.paths.identity.exists():
            raise FileNotFoundError(
                errno.ENOENT, "the run directory is gone", str(self.paths.folder)
            )
        write_losses(self.paths.losses_at(record.step), loss_N, record)
        self.journal(
            "probe",
            step=record.step,
            seconds=round(record.duration, 3),
            nonfinite=int(loss_N.size - np.isfinite(loss_N).sum()),
        )

    def journal(self, event: str, **values: JSON) -> None:
        """Append an event to the journal; a partial line left by a kill stays a separate line.

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


def _past(
    found: Identity | None, launches: Sequence[Launch], resume_step: int | None
) -> tuple[Launch | None, int | None]:
    """Return what of the directory's losses belongs to the past of a job.

    Returns:
        The launch at which the directory's past and the job's part, None without one; and the last
        step whose losses stay: 0 if none stay, None if all do, as for a replay.
    """
    if not (found and resume_step):
        return None, resume_step
    parted = parting(found.launches, launches, resume_step, is_whole=not found.is_replay)
    return parted, resume_step if parted is None else parted.step


def _dropped(known: Identity | None, new: Identity) -> list[Launch]:
    """Return the launches of the run before that are no part of it any more."""
    kept = {launch.step for launch in new.launches}
    return [launch for launch in known.launches if launch.step not in kept] if known else []


def _resumed(known: Identity, launches: Sequence[Launch], resume_step: int | None) -> Identity:
    """Return a run's identity after a replay, or after a job has resumed from `resume_step`."""
    if resume_step is None:
        is_known = not known.is_replay
        return known if is_known else replace(known, launches=merged(known.launches, launches))
    return replace(known, launches=tuple(launches), is_replay=False)
