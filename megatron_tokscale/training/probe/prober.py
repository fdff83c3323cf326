"""The part of a job that probes: it takes a probe at each event at which a probe is due."""

import gc
from argparse import Namespace
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
from megatron.training import get_timers, global_vars, print_rank_0

from megatron_tokscale.core.records import JSON
from megatron_tokscale.probe import ProbeSet
from megatron_tokscale.store import Launch
from megatron_tokscale.training.events import JobPart, TrainingState
from megatron_tokscale.training.history.agree import agree_on_past
from megatron_tokscale.training.history.counts import TrainingCounts
from megatron_tokscale.training.history.past import Past, read_note, write_note
from megatron_tokscale.training.history.saved import SavedCheckpoint
from megatron_tokscale.training.probe.due import DueProbes
from megatron_tokscale.training.probe.probe_store import ProbeStore
from megatron_tokscale.training.probe.size import model_size
from megatron_tokscale.training.probe.take import ProbeTaker
from megatron_tokscale.training.probe.watched_set import WatchedSet
from megatron_tokscale.training.ranks import together
from megatron_tokscale.training.settings import JobProbeSettings
from megatron_tokscale.training.support import (
    check_probe,
    probe_set_misfits,
    raise_first,
    repeated_probe_sets,
)


class Prober(JobPart):
    """Takes the probes of one job. All ranks hold one and act together.

    Attributes:
        sets: the probe sets that the job watches; the first set's run directory is the job's.
    """

    def __init__(self, settings: JobProbeSettings, run: Path, args: Namespace) -> None:
        """Make all checks that need no model.

        Raises:
            TokscaleError: the probe set does not fit the job, or a setting is not supported.
        """
        check_probe(args)
        self._settings = settings
        self._seq_length = int(args.seq_length)
        vocab_size = args.vocab_size or global_vars.get_tokenizer().vocab_size
        loaded = {file: ProbeSet.load(file.path) for file in settings.probe_sets}
        for file, probe_set in loaded.items():
            raise_first(probe_set_misfits(probe_set, str(file.path), args.seq_length, vocab_size))
        raise_first(repeated_probe_sets({str(file.path): each for file, each in loaded.items()}))
        self.sets = [WatchedSet(*given, settings, run, args) for given in loaded.items()]
        self._taker = ProbeTaker(settings)
        self._due = DueProbes(settings, args)
        self._counts = TrainingCounts(Past(step=0, samples=0), self._seq_length)
        self._launches: tuple[Launch, ...] = ()
        self._saved: SavedCheckpoint | None = None
        self._losses: Mapping[str, torch.Tensor] = {}
        self._has_trained = False

    # Methods for the parts that depend on the probes.

    @property
    def probe_set(self) -> ProbeSet:
        """The watched tokens of the first set."""
        return self.sets[0].probe_set

    @property
    def store(self) -> ProbeStore:
        """The run directory of the job."""
        return self.sets[0].store

    @property
    def is_writer(self) -> bool:
        """True if this rank writes the losses."""
        return self.store.is_writer

    @property
    def is_open(self) -> bool:
        """True if the job holds the run directory: from the start to the end of its training."""
        return self.store.is_open

    @property
    def is_active(self) -> bool:
        """True while no write has failed: after a failure no set is probed any more."""
        return all(each.store.is_active for each in self.sets)

    @property
    def launches(self) -> tuple[Launch, ...]:
        """The launches of the run, this job's as the last, once the training starts."""
        return self._launches

    @property
    def untraced_from(self) -> int | None:
        """First sample of another branch in the run directory; None without one."""
        return self.store.untraced_from

    @property
    def last_step(self) -> int:
        """The step of the last probe that was taken; -1 before the first."""
        return self._taker.last_step

    def steps_on_disk(self) -> list[int]:
        """Return the steps of the first set's losses on disk, ascending; all ranks agree."""
        return self.store.steps_on_disk()

    def lacks(self, step: int) -> bool:
        """Return whether a set has no losses of `step` on disk; all ranks agree."""
        return bool(self._lacking(step))

    def check_launches(self, launches: Sequence[Launch], step: int) -> None:
        """Refuse a directory whose run is not the run of a checkpoint; all ranks call it.

        Raises:
            AgreedError: see `ProbeStore.check_launches`.
        """
        for each in self.sets:
            check = partial(each.store.check_launches, launches, step)
            together(check, where=self.is_writer)

    def wait_for_losses(self) -> None:
        """Wait until the losses so far are on disk, or have failed to be written."""
        for each in self.sets:
            each.store.wait()

    def note(self, event: str, **values: JSON) -> None:
        """Write an event into the run's journal, if possible."""
        self.store.note(event, **values)

    # Events.

    def on_load(self, checkpoint: object) -> None:
        """Remember the content of the checkpoint, which holds the run's past."""
        saved = SavedCheckpoint.from_state_dict(checkpoint)
        known = self._saved
        if saved and not (known and known.step == saved.step and saved.scheduler is None):
            self._saved = saved

    def on_log(self, losses: Mapping[str, torch.Tensor]) -> None:
        """Remember the losses of the step; their values are read only when a probe is due."""
        self._losses = losses

    def on_train_start(self, state: TrainingState) -> None:
        """Open the run, and take the probe of the first step if it is due and not on disk.

        A probe that the run has missed since its last one is due too.

        Raises:
            TokscaleError: see `ProbeStore.open`; or the schedule counts tokens, and the run's
                consumed tokens are unknown.
        """
        self._has_trained = True
        step = state.step
        past = agree_on_past(state, self._saved, self.store, self._settings.schedule)
        self._launches = past.launches
        self._counts = TrainingCounts(past, self._seq_length, state.scheduler, state.optimizer)
        self.open(state, self._launches, step)
        if step and self.is_active and not self._has_note(state) and self.steps_on_disk():
            print_rank_0(
                f"tokscale: a job without the plugin saved the checkpoint of step {step}, which "
                f"does not name its run; the losses in {self.store.folder} are taken for this "
                "run's; if they are not, give another --tokscale-dir"
            )
        before = self._tokens if past.tokens_before is None else past.tokens_before
        is_checkpoint = step > 0 and bool(state.args.save)
        due = [
            each
            for each in self.sets
            if self._is_due_at_start(each.store, step, before, is_checkpoint=is_checkpoint)
        ]
        if due:
            self._take(state, due, before_first_step=True)
        self._due.step = step

    def on_step(self, state: TrainingState) -> None:
        """Take a probe if one is due after this step."""
        if self._is_now_due(state, is_checkpoint=self._due.saves_at(state.step)):
            self._take_between_steps(state, self.sets)

    def before_checkpoint(self, state: TrainingState) -> None:
        """Wait for the losses so far, and put the run's past on the args that are saved.

        A resumed job must not miss the losses from before its checkpoint.
        """
        self.wait_for_losses()
        if self._launches:
            samples = state.consumed_samples
            self._counts.advance(samples, state.scheduler, state.optimizer)
            write_note(state.args, self._counts.past(state.step, samples, self._launches))

    def after_checkpoint(self, state: TrainingState) -> None:
        """Take the probe of a checkpoint outside the intervals, such as one before an exit."""
        if not self.is_open:  # the checkpoint after the training
            return
        is_wanted = self._settings.schedule.checkpoints and self.is_active
        if not is_wanted or state.step in (0, self.last_step):
            return
        if lacking := self._lacking(state.step):
            self._take_between_steps(state, lacking)

    def on_exit(self, state: TrainingState) -> None:
        """Take the probe of a job that ends after this step, if the flags request it."""
        is_wanted = self._settings.takes_probe_at_exit and self.is_active
        if is_wanted and state.step != self.last_step:
            self._take_between_steps(state, self.sets)

    def on_train_end(self, state: TrainingState) -> None:
        """Take a probe that is due at the end, if the job has skipped its last steps.

        Raises:
            AgreedError: see `ProbeStore.finish`.
        """
        has_skipped, is_saved = state.step > self._due.step, self._due.saves_at_end(state.step)
        if has_skipped and self._is_now_due(state, is_checkpoint=is_saved):
            self.take(state)
        for each in self.sets:
            each.store.finish()

    def close(self) -> None:
        """Wait for the last losses and release the run directories.

        Raises:
            TokscaleError: see `ProbeStore.close`.
        """
        with ExitStack() as stack:
            for each in self.sets:
                stack.callback(each.store.close)

    def on_job_end(self) -> None:
        """Report a job that has ended before it trained."""
        if not self._has_trained and not self._settings.is_replay:
            print_rank_0(
                "tokscale: the job has ended before its first training step, so no probe was taken"
            )

    # Probes.

    def open(
        self, state: TrainingState, launches: Sequence[Launch], resume_step: int | None
    ) -> None:
        """Open the run directories.

        Args:
            state: state of the training; the size of its model goes into the record.
            launches: launches of the run, the present one last.
            resume_step: the step at which training resumes; None in a replay.

        Raises:
            AgreedError: see `ProbeStore.open`.
        """
        size = model_size(state.model, state.args)
        for each in self.sets:
            each.previous_N = each.store.open(launches, resume_step, size)

    def take(self, state: TrainingState) -> None:
        """Take the probe of the present step, of all sets.

        Raises:
            TokscaleError: see `ProbeTaker.take`.
        """
        self._take(state, self.sets)

    def take_saved(self, past: Past, state: TrainingState) -> None:
        """Take the probe of a loaded checkpoint, whose past is known, of the sets that lack it.

        Args:
            past: past of the run at the checkpoint.
            state: state of the job, which trains nothing and has no optimizer.
        """
        rate = float("nan")
        if past.launches and past.scheduler_samples is not None:
            rate = past.launches[-1].learning_rate.at(past.scheduler_samples)
        self._counts = TrainingCounts(past, self._seq_length)
        optimizer = SimpleNamespace(param_groups=[{"lr": rate}])
        self._take(replace(state, step=past.step, optimizer=optimizer), self._lacking(past.step))

    def _take(
        self, state: TrainingState, sets: Sequence[WatchedSet], *, before_first_step: bool = False
    ) -> None:
        self._taker.take(
            state, self._counts, self._losses, sets, before_first_step=before_first_step
        )

    def _take_between_steps(self, state: TrainingState, sets: Sequence[WatchedSet]) -> None:
        """Take a probe that does not count in Megatron's time per step and energy per step."""
        interval = get_timers()("interval-time", log_level=0)
        interval.stop()
        counts_energy = getattr(state.args, "log_energy", False)
        energy = global_vars.get_energy_monitor() if counts_energy else None
        if energy:
            energy.pause()
        self._take(state, sets)
        if state.args.manual_gc and getattr(state.args, "manual_gc_eval", False):
            gc.collect(generation=0)
        if energy:
            energy.resume()
        interval.start(barrier=True)

    def _is_now_due(self, state: TrainingState, *, is_checkpoint: bool) -> bool:
        """Count the tokens of the steps taken; return whether a probe is due since the last one."""
        tokens_before = self._tokens
        self._counts.advance(state.consumed_samples, state.scheduler, state.optimizer)
        is_due = self._is_due(state.step, tokens_before, is_checkpoint=is_checkpoint)
        self._due.step = state.step
        return is_due

    def _is_due(self, step: int, tokens_before: int, *, is_checkpoint: bool) -> bool:
        return self.is_active and self._due.is_due(
            step, self._tokens, tokens_before, is_checkpoint=is_checkpoint
        )

    def _is_due_at_start(
        self, store: ProbeStore, step: int, tokens_before: int, *, is_checkpoint: bool
    ) -> bool:
        """Return whether the probe of the job's first step is due in a set and not on disk.

        Args:
            store: the run directory of the set.
            step: step at which the job starts.
            tokens_before: training tokens consumed before the last step.
            is_checkpoint: the step has a checkpoint.
        """
        self._due.step, before = self._last_point(store, step, tokens_before)
        is_due = self._is_due(step, before, is_checkpoint=is_checkpoint)
        return is_due and step not in store.steps_on_disk()

    def _lacking(self, step: int) -> list[WatchedSet]:
        """Return the sets without losses of `step` on disk; all ranks agree."""
        return [each for each in self.sets if step not in each.store.steps_on_disk()]

    @property
    def _tokens(self) -> int:
        """The training tokens consumed; 0 if unknown, where no schedule counts them."""
        return self._counts.tokens or 0

    def _has_note(self, state: TrainingState) -> bool:
        """Return whether the loaded checkpoint holds the launches before it."""
        past = (
            read_note(self._saved.args, state.step, state.consumed_samples) if self._saved else None
        )
        return bool(past and past.launches)

    def _last_point(self, store: ProbeStore, step: int, tokens_before: int) -> tuple[int, int]:
        """Return the step and the tokens up to which a run at `step` has the probes of a set.

        Args:
            store: the run directory of the set.
            step: step at which the job starts.
            tokens_before: training tokens consumed before the last step.
        """
        if step == 0 or not self.is_active:
            return step - 1, -1
        on_disk = [known for known in store.steps_on_disk() if known <= step]
        point = step - 1, tokens_before
        if not on_disk:
            if self._due.was_due_by(*point):
                print_rank_0(
                    f"tokscale: no probe from before step {step} is in {store.folder}, and "
                    "those that were due can no longer be taken; --tokscale-replay probes saved "
                    "checkpoints"
                )
            return point
        tokens = store.tokens_on_disk(on_disk[-1])
        return min(on_disk[-1], point[0]), point[1] if tokens is None else min(tokens, point[1])
