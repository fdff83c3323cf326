"""The plugin in a job: where it hooks into Megatron's training loop, and what it holds.

Hooks are module globals of Megatron that have had one name and one set of leading arguments since
0.12 and are looked up when they are called; each is wrapped, none replaced.
"""

import functools
import inspect
from argparse import ArgumentParser
from collections.abc import Callable
from types import ModuleType
from typing import Any

from megatron_tokscale.errors import TokscaleError, exit_with_one_line
from megatron_tokscale.training.config import add_arguments, config_from_args

Function = Callable[..., Any]
Wrapper = Callable[[Function], Function]


class Plugin:
    """Installs the hooks once, and holds the job's prober and plan from start-up on."""

    def __init__(self) -> None:
        self._prober: Any = None
        self._plan: Any = None

    def install(self) -> None:
        """Wrap the hooks.

        Raises:
            TokscaleError: this Megatron lacks one of them.
        """
        import megatron.training
        from megatron.training import arguments, training

        _wrap(arguments, "add_megatron_arguments", _adding_arguments)
        _wrap(training, "initialize_megatron", self._starting)
        _wrap(training, "train", self._training)
        _wrap(training, "training_log", self._logging)
        _wrap(training, "post_training_step_callbacks", self._stepping)
        _wrap(training, "pretrain", self._pretraining)
        megatron.training.pretrain = training.pretrain

    def _starting(self, initialize: Function) -> Function:
        def start(*args: Any, **kwargs: Any) -> Any:
            result = initialize(*args, **kwargs)
            with exit_with_one_line():
                self._read_flags()
            return result

        return start

    def _read_flags(self) -> None:
        """Check the flags and the files they name, before the model is built."""
        from megatron.training import get_args

        args = get_args()
        config = config_from_args(args)
        if config.tokscale_probe_set:
            from megatron_tokscale.training.prober import Prober

            self._prober = Prober(config, args)
        if config.tokscale_plan:
            from megatron_tokscale.training.provider import load_plan

            self._plan = load_plan(config.tokscale_plan, args)

    def _pretraining(self, pretrain: Function) -> Function:
        signature = inspect.signature(pretrain)

        def start(*args: Any, **kwargs: Any) -> Any:
            call = signature.bind(*args, **kwargs)
            name = "train_valid_test_dataset_provider"
            call.arguments[name] = self._planned(call.arguments[name])
            return pretrain(*call.args, **call.kwargs)

        return start

    def _planned(self, provider: Function) -> Function:
        """The user's datasets provider; its training dataset follows the plan, if there is one."""

        @functools.wraps(provider)
        def provide(num_samples: Any, *args: Any, **kwargs: Any) -> Any:
            datasets = provider(num_samples, *args, **kwargs)
            if self._plan is None:
                return datasets
            from megatron_tokscale.training.provider import follow_plan

            with exit_with_one_line():
                return follow_plan(self._plan, datasets, num_samples, provider)

        return provide

    def _training(self, train: Function) -> Function:
        def start(
            forward_step: Any, model: Any, optimizer: Any, scheduler: Any, *rest: Any, **kwargs: Any
        ) -> Any:
            if self._prober:
                with exit_with_one_line():
                    self._prober.on_train_start(forward_step, model, optimizer, scheduler)
            return train(forward_step, model, optimizer, scheduler, *rest, **kwargs)

        return start

    def _logging(self, training_log: Function) -> Function:
        def log(loss_dict: Any, *args: Any, **kwargs: Any) -> Any:
            if self._prober:
                self._prober.note_training_loss(loss_dict)
            return training_log(loss_dict, *args, **kwargs)

        return log

    def _stepping(self, callbacks: Function) -> Function:
        def step(
            model: Any, optimizer: Any, scheduler: Any, iteration: int, *rest: Any, **kwargs: Any
        ) -> Any:
            result = callbacks(model, optimizer, scheduler, iteration, *rest, **kwargs)
            if self._prober:
                with exit_with_one_line():
                    self._prober.on_step(iteration, model, optimizer, scheduler)
            return result

        return step


def _adding_arguments(add_megatron_arguments: Function) -> Function:
    def add(parser: ArgumentParser) -> ArgumentParser:
        result: ArgumentParser = add_megatron_arguments(parser)
        add_arguments(result)
        return result

    return add


def _wrap(module: ModuleType, name: str, wrapper: Wrapper) -> None:
    original = getattr(module, name, None)
    if original is None:
        raise TokscaleError(
            f"this Megatron has no {module.__name__}.{name}, which the plugin hooks into; "
            "megatron-core 0.17 to 0.19 are supported"
        )
    setattr(module, name, functools.wraps(original)(wrapper(original)))
