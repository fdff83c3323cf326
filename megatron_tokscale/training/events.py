"""The events of a training job, and the parts of the plugin that act on them.

Every rank of a job holds the same list of parts (`parts.py` makes it), and passes each event to
each part, in the order of the list. `plugin.py` finds the events in Megatron's own functions; its
table `HOOKS` says which function gives which event. Another source of events, such as a callback of
a training loop, makes a `TrainingState` and calls the same methods.

| event | when | function of Megatron | state | ranks |
|---|---|---|---|---|
| (parts are made) | flags are parsed, no model is built | after `initialize_megatron` | - | all |
| `on_load` | a checkpoint's content is read | after `_load_base_checkpoint` | - | all |
| `on_setup` | model is built, checkpoint loaded | after `setup_model_and_optimizer` | whole | all |
| `on_data` | a chunk's datasets are built | in `pretrain`, after its provider | start | data |
| `on_train_start` | no step is taken yet | before `train` | whole | all |
| `on_forward` | no step is taken yet | before `train` | - | all |
| `on_log` | a step is taken, its losses reduced | before `training_log` | - | all |
| `on_step` | a step is taken and logged | after `post_training_step_callbacks` | whole | all |
| `before_checkpoint` | a checkpoint is not saved yet | before `save_checkpoint` | whole | all |
| `after_checkpoint` | it is saved, amid training | after `save_checkpoint_and_time` | whole | all |
| `on_exit` | the job ends after this step | after `checkpoint_and_decide_exit` | whole | all |
| `on_train_end` | the last step is taken | after `train` | whole | all |
| `close` | training is over or fails | after `train`, `setup_model_and_optimizer` | - | alive |
| `on_job_end` | the job returns or fails | after `pretrain` | - | alive |

State: "start" is the `TrainingState` without model, optimizer and scheduler; "-" is no state.
`on_load` gets the checkpoint's content in its place, `on_forward` the user's forward step, `on_log`
the losses, which the last pipeline stage has.
Ranks: "data" are those that call the datasets provider: all, if it is distributed; "alive" are
those whose process has not ended: `close` and `on_job_end` must not wait for another rank.
"""

from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from megatron_tokscale.core.errors import TokscaleError, say

type Function = Callable[..., Any]
"""A function of Megatron's or of the user's training script, which have no types."""


@dataclass(frozen=True, kw_only=True)
class TrainingState:
    """State of the training at an event. The model, optimizer and scheduler are Megatron's own.

    Attributes:
        step: optimizer steps completed.
        consumed_samples: training samples consumed by then.
        args: Megatron's arguments.
        model: the model's chunks on this rank; empty before the model is built.
        optimizer: None before the model is built, and in a job that trains nothing.
        scheduler: the learning rate's scheduler; None whenever the optimizer is.
        forward_step: the user's forward step; None before `pretrain` is called.
    """

    step: int
    consumed_samples: int
    args: Namespace
    model: Sequence[Any] = ()
    optimizer: Any = None
    scheduler: Any = None
    forward_step: Function | None = None


@dataclass(frozen=True)
class BuiltDatasets:
    """Datasets that the user's provider has built for one model chunk.

    Attributes:
        datasets: training, validation and test dataset; None for each on a rank that reads none.
            The tuple itself is empty or None where the provider returns nothing.
        n_samples: the samples that the job requests: training, validation, test.
        is_distributed: True if the provider runs on every rank.
    """

    datasets: Any
    n_samples: Sequence[int]
    is_distributed: bool

    @property
    def train(self) -> Any:
        """The training dataset; None on a rank that reads none."""
        return self.datasets[0] if self.datasets else None

    def with_train(self, train: Any) -> "BuiltDatasets":
        """Return the datasets with another training dataset."""
        _, valid, test = self.datasets
        return replace(self, datasets=(train, valid, test))


class JobPart:
    """A part of the plugin in a training job. It acts on the events that it overrides.

    An error that a part raises ends the job: on one rank as `TokscaleError`, on all ranks together
    as `AgreedError`.
    """

    def on_load(self, checkpoint: object) -> None:
        """Act on the content of a checkpoint that is being loaded, as Megatron has read it."""

    def on_setup(self, state: TrainingState) -> None:
        """Act when the model is built."""

    def on_data(self, state: TrainingState, built: BuiltDatasets) -> BuiltDatasets:
        """Return the datasets that the job is to read: by default those built by its provider."""
        return built

    def on_train_start(self, state: TrainingState) -> None:
        """Act before the job's first step."""

    def on_forward(self, forward_step: Function) -> Function:
        """Return the forward step that the training is to use: by default the user's.

        Probes use the user's in any case.
        """
        return forward_step

    def on_log(self, losses: Mapping[str, torch.Tensor]) -> None:
        """Act on the losses of a step, by name, in nats. Reading them waits for the device."""

    def on_step(self, state: TrainingState) -> None:
        """Act after a step."""

    def before_checkpoint(self, state: TrainingState) -> None:
        """Act before a checkpoint is saved."""

    def after_checkpoint(self, state: TrainingState) -> None:
        """Act after a checkpoint is saved while training."""

    def on_exit(self, state: TrainingState) -> None:
        """Act when the job has decided to end after this step: by an interval or a signal."""

    def on_train_end(self, state: TrainingState) -> None:
        """Act after the job's last step."""

    def close(self) -> None:
        """Release the part's files and processes on this rank; other ranks may have ended."""

    def on_job_end(self) -> None:
        """Act when the job returns or an error of Megatron's ends it."""


@contextmanager
def closing(parts: Sequence[JobPart], *, on_success: bool = True) -> Iterator[None]:
    """Close the parts, the last one first, when the block ends.

    An error of a part's `close` is raised, unless another error has ended the block: then it is
    printed beside that error.

    Args:
        parts: the parts of the job.
        on_success: close the parts also if the block ends without an error.
    """
    ending: BaseException | None = None
    try:
        yield
    except BaseException as error:
        ending = error
        raise
    finally:
        if on_success or ending is not None:
            is_in_order = ending is None or (isinstance(ending, SystemExit) and not ending.code)
            _close(parts, raises=is_in_order)


def _close(parts: Sequence[JobPart], *, raises: bool) -> None:
    failures: list[TokscaleError] = []
    for part in reversed(parts):
        try:
            part.close()
        except TokscaleError as error:
            failures.append(error)
    if failures and raises:
        raise failures[0]
    for failure in failures:
        say(str(failure))
