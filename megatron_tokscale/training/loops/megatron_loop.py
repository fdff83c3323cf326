"""Megatron's own training loop, in a version that calls callbacks.

Its context holds neither configuration nor counters, and it has no event at a checkpoint. The step
is counted after the callbacks of its end.
"""

from argparse import Namespace
from contextlib import AbstractContextManager, nullcontext
from typing import Final

from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.training.config import TokscaleConfig
from megatron_tokscale.training.endings import finish_save
from megatron_tokscale.training.events import Function
from megatron_tokscale.training.loops.loop import Counters, Place
from megatron_tokscale.training.replay import Load
from megatron_tokscale.training.upstream import samples_consumed, steps_taken

_TRAINING: Final = "megatron.training.training"


class MegatronLoop:
    """Megatron's own loop, whose state is in global variables."""

    train = Place(_TRAINING, "train", "forward_step_func")
    data = Place(
        _TRAINING,
        "build_train_valid_test_data_iterators",
        "build_train_valid_test_datasets_provider",
    )
    is_distributed = False
    load: Load | None = None

    def arguments(self, settings: TokscaleConfig) -> Namespace:
        """Put the plugin's settings among Megatron's arguments, and return these.

        Raises:
            TokscaleError: the settings request a replay.
        """
        if settings.tokscale_replay is not None:
            raise TokscaleError(
                "--tokscale-replay is set in a callback of Megatron's own loop, which builds data "
                "and optimizer; expected a job that stops before; start it with "
                "-m megatron_tokscale.run"
            )
        args = _args()
        for name, value in vars(settings).items():
            setattr(args, name, value)
        return args

    def counters(self, *, in_step: bool) -> Counters:
        """Return the counters; at the end of a step, `curr_iteration` is the step's number - 1."""
        from megatron.core.num_microbatches_calculator import get_current_running_global_batch_size

        args = _args()
        step, samples = steps_taken(args), samples_consumed(args)
        if not in_step:
            return Counters(step, samples)
        step = int(getattr(args, "curr_iteration", step)) + 1
        return Counters(step, samples + int(get_current_running_global_batch_size()))

    def prepared(self, forward_step: Function) -> Function:
        """Return the forward step, which Megatron's schedules call as it is."""
        return forward_step

    def before_checkpoint(self, args: Namespace, step: int) -> None:
        """Do nothing: Megatron saves its arguments, and the run's past among them."""

    def after_checkpoint(self) -> bool:
        """Return True; Megatron's loop has no event for it."""
        return True

    def finish_save(self) -> None:
        """Finish an asynchronous checkpoint; all ranks call it together."""
        finish_save()

    def undisturbed(self) -> AbstractContextManager[None]:
        """Return an empty block: the probe's isolation covers all that Megatron counts."""
        return nullcontext()


def _args() -> Namespace:
    from megatron.training import get_args

    args: Namespace = get_args()
    return args
