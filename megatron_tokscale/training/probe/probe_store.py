"""The run directory of a probed job: one rank writes it, all ranks agree on it.

Shapes: N watched tokens.
"""

import json
from argparse import Namespace
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
from megatron.training import print_rank_0
from numpy.typing import NDArray

from megatron_tokscale.core.arrays import Floats32
from megatron_tokscale.core.errors import AgreedError, TokscaleError, say
from megatron_tokscale.core.records import JSON
from megatron_tokscale.probe import ProbeSet
from megatron_tokscale.store import BackgroundWriter, Launch, LossRecord, RunWriter
from megatron_tokscale.training.probe.probe_pass import is_writer
from megatron_tokscale.training.probe.size import model_info
from megatron_tokscale.training.ranks import first_of_all_ranks, refuse_together, together


class ProbeStore:
    """Reads and writes the losses of one job. All ranks hold one and act together.

    Attributes:
        is_writer: this rank writes.
        is_active: no write has failed; after a failure no more probes are taken.
        is_open: the job holds the directory's lock.
        untraced_from: consumed samples from which on the directory held another branch, whose
            losses are set aside; None without one.
    """

    def __init__(
        self, run: Path, probe_set: ProbeSet, args: Namespace, *, stops_on_error: bool
    ) -> None:
        """Check that the directory is new, or of this probe set and model.

        Raises:
            TokscaleError: the directory is of another run.
        """
        self._probe_set, self._model = probe_set, model_info(args)
        self._stops_on_error = stops_on_error
        self._writer = RunWriter(run)
        self._writer.check(probe_set, self._model)
        self._background = BackgroundWriter(self._writer.write)
        self.is_writer = is_writer()
        self.is_active = True
        self.is_open = False
        self.untraced_from: int | None = None

    @property
    def folder(self) -> Path:
        """The folder of the losses."""
        return self._writer.paths.folder

    @property
    def samples(self) -> Path:
        """The folder of the training samples' losses."""
        return self._writer.paths.samples

    def open(
        self, launches: Sequence[Launch], resume_step: int | None, size: Mapping[str, int]
    ) -> Floats32 | None:
        """Open the directory, on the rank that writes, and agree on the outcome.

        Args:
            launches: launches of the run, the present one last.
            resume_step: the step at which training resumes; None in a replay, which abandons no
                losses.
            size: size of the model, for the record of a new run.

        Returns:
            previous_N: the last losses on disk, on the rank that writes.

        Raises:
            AgreedError: the directory is locked by another job, or is not writable and the job is
                to stop in that case.
        """
        self.is_open = True
        previous_N: Floats32 | None = None
        refusal, failure, parted = None, None, None
        if self.is_writer:
            try:
                parted = self._writer.open(
                    self._probe_set, self._model, launches, resume_step, size=size
                )
                if resume_step is not None:
                    previous_N = self._writer.latest(resume_step)
            except TokscaleError as error:
                refusal = str(error)
            except OSError as error:
                failure = str(error)
        refuse_together(refusal)
        if message := first_of_all_ranks(failure):
            self.stop_probing(message)
        if text := first_of_all_ranks(json.dumps(parted.to_json()) if parted else None):
            self._note_parting(Launch.from_json(json.loads(text)))
        return previous_N

    def _note_parting(self, launch: Launch) -> None:
        """Report the losses set aside; the record of data is invalid from that launch on."""
        self.untraced_from = launch.consumed_samples
        print_rank_0(
            f"tokscale: the losses in {self.folder} from after step {launch.step} are not of the "
            "steps that have led to this job's checkpoint, and are set aside; give each branch a "
            "--tokscale-dir of its own"
        )

    # Methods that only the writer calls.

    def record(self, step: int) -> LossRecord | None:
        """Return the record of the losses at `step`; None if there are none that can be read."""
        return self._writer.record(step)

    def launches(self) -> tuple[Launch, ...]:
        """Return the launches of the run in the directory.

        Raises:
            TokscaleError: its run.json cannot be read.
        """
        return self._writer.launches()

    def check_launches(self, launches: Sequence[Launch], step: int) -> None:
        """Refuse a directory whose run is not the run of a checkpoint.

        Raises:
            TokscaleError: see `RunWriter.check_launches`.
        """
        self._writer.check_launches(launches, step)

    # Methods that all ranks call together.

    def run_id(self) -> str:
        """Return the id of the run in the directory.

        Raises:
            AgreedError: its run.json cannot be read.
        """
        return first_of_all_ranks(together(self._writer.run_id, where=self.is_writer)) or ""

    def steps_on_disk(self) -> list[int]:
        """Return the steps whose losses are on disk, ascending; all ranks agree."""
        own = None
        with suppress(OSError):  # the directory is gone: the next probe reports it
            own = json.dumps(self._writer.steps()) if self.is_writer else None
        steps: list[int] = json.loads(first_of_all_ranks(own) or "[]")
        return steps

    def tokens_on_disk(self, step: int) -> int | None:
        """Return the tokens consumed by the probe of `step`; None if its record cannot be read."""
        record = self._writer.record(step) if self.is_writer else None
        tokens = None if record is None else record.consumed_tokens
        text = first_of_all_ranks(None if tokens is None else str(tokens))
        return int(text) if text else None

    # Methods that write.

    def note(self, event: str, **values: JSON) -> None:
        """Write an event into the run's journal, if possible."""
        if self.is_writer and self.is_active:
            with suppress(OSError):  # the next probe reports an error of the disk
                self._writer.journal(event, **values)

    def submit(self, loss_N: Floats32 | NDArray[np.float16], record: LossRecord) -> None:
        """Start writing the losses of a probe."""
        self._background.submit(loss_N, record)

    def wait(self) -> None:
        """Wait until the losses so far are on disk, or have failed to be written.

        An error is kept for the next probe, at which the ranks agree on the reaction.
        """
        self._background.wait()

    def join(self) -> OSError | None:
        """Wait for the losses so far; return this rank's error, if writing failed."""
        return self._background.join()

    def stop_probing(self, reason: str | None) -> None:
        """Follow --tokscale-on-write-error; all ranks call it together.

        Raises:
            AgreedError: the job is to stop.
        """
        message = self._unwritable(reason)
        if self._stops_on_error:
            raise AgreedError(message)
        self.is_active = False
        print_rank_0(f"tokscale: {message}; training continues WITHOUT probes")

    def finish(self) -> None:
        """Wait for the last losses, at the end of the training; all ranks call it.

        Raises:
            AgreedError: losses could not be written and the job is to stop in that case: on all
                ranks, so that none waits for another.
        """
        error = self.join()
        if error and not self._stops_on_error:
            self.is_active = False
            say(self._unwritable(str(error)))
            error = None
        refuse_together(self._unwritable(str(error)) if error else None)

    def close(self) -> None:
        """Wait for the last losses, report them if lost, and release the directory.

        It acts on this rank alone: other ranks may have ended.

        Raises:
            TokscaleError: losses could not be written and the job is to stop in that case.
        """
        error = self.join()
        self._writer.close()
        self.is_open = False
        if error:
            self.is_active = False
            message = self._unwritable(str(error))
            if self._stops_on_error:
                raise TokscaleError(message)
            say(message)

    def _unwritable(self, reason: str | None) -> str:
        return f"losses cannot be written to {self.folder}: {reason}"
