"""Interface of a training loop for a callback: its arguments, counters and forward step.

A loop calls a callback with a context. Megatron's context holds no configuration and no counters;
these are global variables of Megatron's. Megatron-Bridge's context holds all of them. Neither holds
the user's forward step, which both give to a function of theirs named `train`.
"""

import functools
import importlib
import inspect
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple, Protocol

from megatron_tokscale.training.calls import Call
from megatron_tokscale.training.config import TokscaleConfig
from megatron_tokscale.training.events import Function
from megatron_tokscale.training.replay import Load


class Place(NamedTuple):
    """Function that a loop looks up in its module at each call, and the name of an argument."""

    module: str
    name: str
    argument: str


class Counters(NamedTuple):
    """Optimizer steps that the training has completed, and training samples consumed."""

    step: int
    samples: int


class Loop(Protocol):
    """A training loop.

    Attributes:
        train: the function that trains, and its argument with the user's forward step.
        data: the function that builds the data iterators, and its argument with the user's
            datasets provider.
        is_distributed: every rank calls that provider, whatever the provider says of itself.
    """

    train: Place
    data: Place
    is_distributed: bool

    @property
    def load(self) -> Load | None:
        """The function that loads a checkpoint for a replay; None: Megatron's."""

    def arguments(self, settings: TokscaleConfig) -> Namespace:
        """Return Megatron's arguments, with the plugin's settings among them.

        Raises:
            TokscaleError: the loop has a setting under which a callback cannot work.
        """

    def counters(self, *, in_step: bool) -> Counters:
        """Return the counters: at the end of a step, those after it.

        Args:
            in_step: the loop has not counted the step yet that it has just taken.
        """

    def prepared(self, forward_step: Function) -> Function:
        """Return the forward step as Megatron's schedules call it: with an iterator and a model."""

    def before_checkpoint(self, args: Namespace, step: int) -> None:
        """Act when the run's past is among the arguments, before a checkpoint may be saved."""

    def after_checkpoint(self) -> bool:
        """Act when a checkpoint is saved; return True if the training waits for that."""

    def finish_save(self) -> None:
        """Finish an asynchronous checkpoint; all ranks call it together."""

    def undisturbed(self) -> AbstractContextManager[None]:
        """Return a block after which the loop's own counts are as before it."""


@contextmanager
def wrapped(place: Place, around: Callable[[Call], Any]) -> Iterator[None]:
    """Replace the calls of a function by calls of `around` inside the block."""
    module = importlib.import_module(place.module)
    function = getattr(module, place.name)
    names = tuple(inspect.signature(function).parameters)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return around(Call(function, names, args, kwargs))

    setattr(module, place.name, call)
    try:
        yield
    finally:
        setattr(module, place.name, function)
