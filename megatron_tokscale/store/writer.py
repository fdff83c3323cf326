"""Writing a run: the one writer that a training job has.

Shapes: N watched tokens.
"""

import errno
import json
import os
import secrets
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_tokscale.errors import TokscaleError
from megatron_tokscale.files import check_schema, read_json, remove_temporaries, write_json
from megatron_tokscale.probe import ProbeSet
from megatron_tokscale.store.lock import RunLock
from megatron_tokscale.store.losses import (
    LossRecord,
    list_losses,
    losses_name,
    read_losses,
    write_losses,
)
from megatron_tokscale.store.reader import SCHEMA_VERSION


class RunWriter:
    """Writes the losses, the identity and the journal of one run into `path/tokscale`."""

    def __init__(self, path: Path):
        self.folder = path / "tokscale"
        self._losses = self.folder / "losses"
        self._journal = self.folder / "journal.jsonl"
        self._lock = RunLock(self.folder / ".lock")

    def check(self, probe_set: ProbeSet, model: Mapping[str, Any]) -> None:
        """Refuse a directory that belongs to another run.

        Raises:
            TokscaleError: it holds losses of another probe set or of another model.
        """
        path = self.folder / "run.json"
        if not path.exists():
            return
        known = read_json(path)
        check_schema(path, int(known["schema_version"]), SCHEMA_VERSION)
        if known["probe_fingerprint"] != probe_set.fingerprint:
            raise TokscaleError(
                f"{self.folder} holds losses of probe set {known['probe_fingerprint']}, this job "
                f"has {probe_set.fingerprint}; give it that probe set or another --tokscale-dir"
            )
        for name, value in model.items():
            if name in known["model"] and known["model"][name] != value:
                raise TokscaleError(
                    f"{self.folder} is of a run with {name} {known['model'][name]}, this job has "
                    f"{value}; choose another --tokscale-dir"
                )

    def open(self, probe_set: ProbeSet, info: Mapping[str, Any], resume_step: int | None) -> None:
        """Take the run's lock, make its files if it is new, and tidy up after a job before this.

        Losses of later steps than `resume_step` belong to a branch that is abandoned by resuming
        from an earlier checkpoint; a job that starts at step 0 has fresh weights and abandons all
        there is. None (a replay of checkpoints) abandons nothing.

        Raises:
            OSError: the directory cannot be written.
            TokscaleError: another job writes into it.
        """
        self._losses.mkdir(parents=True, exist_ok=True)
        is_locked = self._lock.acquire()
        for folder in (self.folder, self._losses):
            remove_temporaries(folder)
        known = self.folder / "run.json"
        if not known.exists():
            probe_set.save(self.folder / "probe.safetensors")
            write_json(
                known,
                {"schema_version": SCHEMA_VERSION, "run_id": secrets.token_hex(8), **info},
            )
        abandoned = [
            step
            for step in list_losses(self._losses)
            if resume_step is not None and (step > resume_step or resume_step == 0)
        ]
        for step in abandoned:
            self._abandon(step)
        self.journal(
            "started",
            step=resume_step,
            abandoned=abandoned,
            layout=info.get("layout"),
            locked=is_locked,
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
        folder = self._losses / "abandoned"
        folder.mkdir(exist_ok=True)
        name = losses_name(step)
        copies = sum(1 for path in folder.iterdir() if path.name.startswith(name))
        os.replace(self._losses / name, folder / f"{name}.{copies}")

    def has(self, step: int) -> bool:
        """Whether the losses of `step` are on disk."""
        return (self._losses / losses_name(step)).exists()

    def steps(self) -> list[int]:
        """The steps whose losses are on disk, ascending."""
        return list(list_losses(self._losses))

    def latest(self, step: int) -> NDArray[np.float32] | None:
        """The last losses on disk at or before `step`; None if there are none that can be read."""
        files = [path for at, path in list_losses(self._losses).items() if at <= step]
        try:
            return read_losses(files[-1]) if files else None
        except TokscaleError:
            return None

    def write(self, loss_N: NDArray[np.floating[Any]], record: LossRecord) -> None:
        """Write the losses (nats) of one probe, whole or not at all.

        Raises:
            OSError: the disk is full, or the directory is gone or cannot be written.
        """
        if not (self.folder / "run.json").exists():
            raise FileNotFoundError(errno.ENOENT, "the run directory is gone", str(self.folder))
        write_losses(self._losses / losses_name(record.step), loss_N, record)
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
        with self._journal.open("ab+") as file:
            file.seek(0, os.SEEK_END)
            if file.tell() > 0:
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":
                    line = "\n" + line
            file.write(line.encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())


def read_journal(path: Path) -> list[dict[str, Any]]:
    """Read the events of a run in `path`, skipping a torn line."""
    file = path / "tokscale" / "journal.jsonl"
    if not file.exists():
        return []
    events = []
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            events.append(json.loads(line))
        except ValueError:
            continue
    return events
