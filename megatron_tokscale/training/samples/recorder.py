"""The part of a job that records the losses of its training samples.

The losses are those that the training's own loss function is given: there is no forward pass for
them. They stay on the device until the log interval, where Megatron waits for the device anyway.
Only the first tensor-parallel rank of the last pipeline stage records, a file per data-parallel
rank.

Shapes: Q samples.
"""

import functools
from argparse import Namespace
from typing import Any

import numpy as np
import torch
from megatron.core import mpu
from megatron.core.num_microbatches_calculator import get_num_microbatches

from megatron_tokscale.core.errors import TokscaleError, say
from megatron_tokscale.store import BackgroundWriter
from megatron_tokscale.store.sample_losses import (
    Records,
    SamplesFile,
    SamplesHeader,
    samples_name,
)
from megatron_tokscale.training.events import Function, JobPart, TrainingState
from megatron_tokscale.training.probe.probe_pass import has_losses
from megatron_tokscale.training.probe.prober import Prober
from megatron_tokscale.training.ranks import together
from megatron_tokscale.training.samples.measured import (
    StepValues,
    joined_over_context,
    records_of,
    values_of_samples,
)
from megatron_tokscale.training.support import check_samples
from megatron_tokscale.training.upstream import samples_consumed


class SampleRecorder(JobPart):
    """Records the mean and the largest token loss of each training sample."""

    def __init__(self, prober: Prober, args: Namespace, *, stops_on_error: bool) -> None:
        """Check the settings.

        Args:
            prober: holds the run directory, and opens it before this part acts.
            args: Megatron's arguments.
            stops_on_error: the job ends if records cannot be written.

        Raises:
            TokscaleError: it is not known which sample a loss is of.
        """
        check_samples(args)
        self._prober, self._args, self._stops_on_error = prober, args, stops_on_error
        self._records_here = has_losses()
        self._file: SamplesFile | None = None
        self._writer: BackgroundWriter[Records] | None = None
        self._current = StepValues()
        self._complete: list[StepValues] = []
        self._waiting: list[Records] = []
        self._step, self._consumed = 0, 0

    # Events.

    def on_train_start(self, state: TrainingState) -> None:
        """Make this launch's file.

        Raises:
            AgreedError: a file cannot be made, and the job is to stop in that case.
        """
        self._step, self._consumed = state.step, state.consumed_samples
        if not self._prober.is_active:  # the run directory cannot be written, as has been said
            return
        run_id = self._prober.store.run_id()
        if self._stops_on_error:
            together(lambda: self._open(run_id), where=self._writes)
        elif self._writes:
            try:
                self._open(run_id)
            except OSError as error:
                self._stop(error)

    def on_forward(self, forward_step: Function) -> Function:
        """Return the forward step, whose loss function this part sees before it is called."""

        @functools.wraps(forward_step)
        def step(*args: Any, **kwargs: Any) -> Any:
            output, loss_func = forward_step(*args, **kwargs)
            return output, self._seen(loss_func)

        return step

    def on_step(self, state: TrainingState) -> None:
        """Close the step; write the records at the log interval.

        Raises:
            TokscaleError: records could not be written, and the job is to stop in that case.
        """
        if self._current.n_taken:
            n_samples = self._current.n_samples * mpu.get_data_parallel_world_size()
            self._complete_step(state.step, state.consumed_samples - n_samples)
        self._step, self._consumed = state.step, state.consumed_samples
        if state.step % self._args.log_interval == 0:
            self._flush()

    def before_checkpoint(self, state: TrainingState) -> None:
        """Wait until all records are on disk: a resumed job cannot make them again.

        Raises:
            TokscaleError: see `on_step`.
        """
        self._flush()
        self._finish()

    def on_exit(self, state: TrainingState) -> None:
        """Write the last records of a job that ends by an interval or a signal.

        Raises:
            TokscaleError: see `on_step`.
        """
        self.before_checkpoint(state)

    def on_train_end(self, state: TrainingState) -> None:
        """Write the last records.

        Raises:
            TokscaleError: see `on_step`.
        """
        self.before_checkpoint(state)

    def close(self) -> None:
        """Write what there is of a job that fails, on this rank alone, and stop recording.

        The step that failed has its microbatches so far. With context parallelism, the samples of a
        rank are no whole ones, and other ranks may have ended: their last records are lost.

        Raises:
            TokscaleError: see `on_step`.
        """
        if mpu.get_context_parallel_world_size() == 1:
            if self._current.n_taken:
                counted = int(getattr(self._args, "curr_iteration", None) or 0)
                consumed = samples_consumed(self._args)
                self._complete_step(1 + max(self._step, counted), max(self._consumed, consumed))
            try:
                self._flush()
            except RuntimeError as error:  # a device that has failed
                say(f"the last losses of training samples are lost: {error}")
        self._finish()
        self._records_here = False

    # The losses on their way.

    def _seen(self, loss_func: Any) -> Any:
        """Return a loss function that gives its losses to this part first.

        An evaluation and a probe compute no gradients, and are not recorded.
        """
        if not self._records_here:
            return loss_func
        bound = loss_func.args if isinstance(loss_func, functools.partial) else ()
        mask = bound[0] if bound else None

        @functools.wraps(loss_func)
        def loss(output: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            if torch.is_grad_enabled():
                self._current.take(values_of_samples(output, mask), get_num_microbatches())
            return loss_func(output, *args, **kwargs)

        return loss

    def _complete_step(self, step: int, start: int) -> None:
        self._current.step, self._current.start = step, start
        self._complete.append(self._current)
        self._current = StepValues()

    def _flush(self) -> None:
        """Hand the records of the complete steps to the thread that writes them.

        Where it still writes the last ones they wait: no step waits for a disk. With context
        parallelism the ranks of a sequence act together.

        Raises:
            TokscaleError: the records before could not be written, and the job is to stop in that
                case.
        """
        steps, self._complete = self._complete, []
        if steps:
            value_QV = torch.cat([each.value_QV for each in steps])
            value_RQV = joined_over_context(value_QV, self._args.seq_length)
            sample_Q = np.concatenate([each.samples_Q() for each in steps])
            step_Q = np.repeat([s.step for s in steps], [s.n_samples for s in steps])
            if self._writer is not None:
                self._waiting.append(records_of(value_RQV, step_Q, sample_Q))
        if self._writer is not None and not self._writer.is_busy:
            self._hand_over()

    def _finish(self) -> None:
        """Wait until all records are on disk.

        Raises:
            TokscaleError: see `_flush`.
        """
        self._hand_over()
        self._check_writer()

    def _hand_over(self) -> None:
        """Hand over the records that wait, once the thread has written the last ones."""
        self._check_writer()
        waiting, self._waiting = self._waiting, []
        if waiting and self._writer is not None:
            self._writer.submit(np.concatenate(waiting))

    # The file.

    @property
    def _writes(self) -> bool:
        """True if this rank has a file: the first of its context-parallel ranks."""
        return self._records_here and mpu.get_context_parallel_rank() == 0

    def _open(self, run_id: str) -> None:
        launch, rank = self._prober.launches[-1], mpu.get_data_parallel_rank()
        header = SamplesHeader(
            run_id=run_id,
            launch_id=launch.launch_id,
            first_step=launch.step,
            rank=rank,
            ranks=mpu.get_data_parallel_world_size(),
            seq_length=int(self._args.seq_length),
        )
        name = samples_name(rank, launch.step)
        self._file = SamplesFile(self._prober.store.samples / name, header)
        self._file.create()
        self._writer = BackgroundWriter(self._file.append)

    def _check_writer(self) -> None:
        """Wait for the records handed over; follow --tokscale-on-write-error if they are lost.

        This rank acts alone: the others need not wait for its disk.

        Raises:
            TokscaleError: the job is to stop.
        """
        error = self._writer.join() if self._writer else None
        if error:
            self._stop(error)

    def _stop(self, error: OSError) -> None:
        self._writer = None
        message = f"losses of training samples cannot be written: {error}"
        if self._stops_on_error:
            raise TokscaleError(message)
        rank = mpu.get_data_parallel_rank()
        say(f"{message}; training continues WITHOUT those of data-parallel rank {rank}")
