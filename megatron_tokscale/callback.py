"""The probe as a callback of a training loop: Megatron's own, or Megatron-Bridge's.

    from megatron_tokscale.callback import TokscaleCallback, TokscaleConfig

    settings = TokscaleConfig(tokscale_probe_set=["probe.safetensors"])
    pretrain(config, forward_step, callbacks=[TokscaleCallback(settings)])

Neither Megatron nor Megatron-Bridge is imported before the loop calls the callback.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_tokscale.training.config import TokscaleConfig

if TYPE_CHECKING:
    from argparse import Namespace

    from megatron_tokscale.training.calls import Call
    from megatron_tokscale.training.events import Function, JobPart, TrainingState
    from megatron_tokscale.training.loops.loop import Loop

__all__ = ["TokscaleCallback", "TokscaleConfig"]


class TokscaleCallback:
    """Callback that takes the probes of a job, or replays its checkpoints.

    A loop finds the methods by their names; the class needs no base class of the loop's. All ranks
    hold one, and each rank calls every method.
    """

    # Known from `on_data_init_start` on.
    _loop: "Loop"
    _args: "Namespace"
    _context: Any  # of the last event whose context has a scheduler
    # Known when the loop calls its function that trains.
    _forward_step: "Function | None" = None

    def __init__(self, settings: TokscaleConfig) -> None:
        """Keep the settings; they are checked when the loop has built its model.

        Args:
            settings: the settings that a job without a callback takes from its --tokscale-* flags.
        """
        self._settings = settings
        self._parts: list[JobPart] = []
        self._last_step = -1
        self._wraps = ExitStack()

    def on_data_init_start(self, context: Any) -> None:
        """Check the settings and make the parts of the job."""
        from megatron_tokscale.training.loops import loop_of
        from megatron_tokscale.training.loops.loop import wrapped
        from megatron_tokscale.training.ranks import begin_job, together

        self._context, self._loop = context, loop_of(context)
        with _exit_with_one_line():
            begin_job()
            self._parts = together(self._make_parts) or []
        self._wraps.enter_context(wrapped(self._loop.data, self._around_data))
        self._wraps.enter_context(wrapped(self._loop.train, self._around_training))

    def _make_parts(self) -> "list[JobPart]":
        from megatron_tokscale.training.parts import parts_of_job

        self._args = self._loop.arguments(self._settings)
        return parts_of_job(self._args, load=self._loop.load)

    def on_train_start(self, context: Any) -> None:
        """Open the run, and take the probe of the first step if it is due."""
        self._context = context
        with self._ending_in_order():
            state = self._state()
            saved = _saved(self._args, state.step)
            for part in self._parts if saved else ():
                part.on_load(saved)
            with self._loop.undisturbed():
                for part in self._parts:
                    part.on_train_start(state)

    def on_train_step_end(self, context: Any) -> None:
        """Take a probe if one is due, and make the losses safe before the next checkpoint."""
        self._context = context
        with self._ending_in_order():
            state = self._state(in_step=True)
            self._last_step = state.step
            for part in self._parts:
                part.on_log(context.loss_dict or {})
            with self._loop.undisturbed():
                for part in self._parts:
                    part.on_step(state)
            # The loop has no event before a checkpoint, so every step prepares for one.
            for part in self._parts:
                part.before_checkpoint(state)
            self._loop.before_checkpoint(self._args, state.step)

    def on_checkpoint_save(self, context: Any) -> None:
        """Write the run's past beside the checkpoint, and take its probe if one is due."""
        with self._ending_in_order():
            state = self._state()
            is_now = self._loop.after_checkpoint() and state.step == self._last_step
            with self._loop.undisturbed():
                for part in self._parts if is_now else ():
                    part.after_checkpoint(state)

    def on_train_end(self, context: Any) -> None:
        """Take a probe that is due at the end, and wait for the last losses."""
        self._context = context
        with self._ending_in_order(), self._loop.undisturbed():
            state = self._state()
            for part in self._parts:
                part.on_train_end(state)

    @contextmanager
    def _ending_in_order(self) -> Iterator[None]:
        """End the job with one line, and with no checkpoint half saved."""
        from megatron_tokscale.training.endings import finishing_saves

        with _exit_with_one_line(), finishing_saves(self._loop.finish_save):
            yield

    def _around_data(self, call: "Call") -> Any:
        """Wrap the user's datasets provider, so that the training dataset can follow a plan."""
        from megatron_tokscale.training.plugin import planned

        name, is_distributed = self._loop.data.argument, self._loop.is_distributed
        provider = planned(
            call.arguments[name], self._parts, self._state, is_distributed=is_distributed
        )
        return call.with_argument(name, provider).result()

    def _around_training(self, call: "Call") -> Any:
        """Keep the user's forward step, and close the parts when the training ends or fails.

        A replay takes its probes here, and ends the job.
        """
        from megatron_tokscale.training.events import closing
        from megatron_tokscale.training.plugin import with_forward_step_of

        name, given = self._loop.train.argument, call.arguments
        arguments = {**getattr(given.get("context"), "__dict__", {}), **given}
        self._forward_step = self._loop.prepared(arguments[name])
        with self._wraps, _exit_with_one_line(), closing(self._parts):
            for part in self._parts:
                part.on_setup(self._state())
            try:
                return with_forward_step_of(self._parts, call, name).result()
            except SystemExit as ending:
                if not ending.code and self._last_step > 0:
                    self._on_exit()
                raise

    def _on_exit(self) -> None:
        """Take the probe of a job that ends by an interval or a signal, if the settings say so."""
        with self._loop.undisturbed():
            for part in self._parts:
                part.on_exit(self._state())

    def _state(self, *, in_step: bool = False) -> "TrainingState":
        """Return the state of the training.

        Args:
            in_step: the loop has not counted the step yet that it has just taken.
        """
        from megatron_tokscale.training.events import TrainingState

        counters = self._loop.counters(in_step=in_step)
        return TrainingState(
            step=counters.step,
            consumed_samples=counters.samples,
            args=self._args,
            model=self._context.model,
            optimizer=self._context.optimizer,
            scheduler=self._context.scheduler,
            forward_step=self._forward_step,
        )


def _saved(args: "Namespace", step: int) -> object:
    """Return the content of the checkpoint that the job has loaded, read by rank 0; or None."""
    import torch

    from megatron_tokscale.training.history.saved import read_checkpoint

    if not (args.load and step):
        return None
    is_first = torch.distributed.get_rank() == 0
    found = [read_checkpoint(Path(args.load), step) if is_first else None]
    torch.distributed.broadcast_object_list(found)
    if (saved := found[0]) is None:
        return None
    return {
        "args": saved.args,
        "iteration": saved.step,
        "opt_param_scheduler": saved.scheduler,
    }


def _exit_with_one_line() -> AbstractContextManager[None]:
    from megatron_tokscale.training.endings import exit_rank_with_one_line

    return exit_rank_with_one_line()
