"""The hooks in Megatron: the functions that give the events of `events.py`.

A hook is a module global of Megatron that has had one name since 0.12 and is looked up when it is
called; each is wrapped, none replaced. Its arguments are known by the names in its signature.
"""

import functools
import importlib
import inspect
from argparse import ArgumentParser
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from megatron_tokscale.core.errors import EXIT_CODE, TokscaleError
from megatron_tokscale.training.calls import Call
from megatron_tokscale.training.config import add_arguments
from megatron_tokscale.training.endings import (
    exit_rank_with_one_line,
    finish_save,
    finishing_saves,
)
from megatron_tokscale.training.events import (
    BuiltDatasets,
    Function,
    JobPart,
    TrainingState,
    closing,
)
from megatron_tokscale.training.upstream import (
    adopt_loader_settings,
    escape_percent_signs,
    samples_consumed,
    steps_taken,
)


class Plugin:
    """Installs the hooks once, holds the job's parts, and passes the events to them."""

    def __init__(self) -> None:
        self._parts: list[JobPart] = []
        self._forward_step: Function | None = None
        self._given: list[str] = []
        self._config: Any = None

    def install(self) -> None:
        """Wrap the functions of the table `HOOKS`.

        Raises:
            TokscaleError: this Megatron lacks one of them.
        """
        import megatron.training
        from megatron.training import training

        for hook in HOOKS:
            hook.install(self)
        megatron.training.pretrain = training.pretrain

    # One method for each row of HOOKS: it makes the call and returns its result.

    def add_flags(self, call: Call) -> ArgumentParser:
        """Add the --tokscale-* flags to Megatron's parser."""
        parser: ArgumentParser = call.result()
        add_arguments(parser)
        escape_percent_signs(parser)
        return parser

    def make_parts(self, call: Call) -> Any:
        """Make the parts that the flags request, before the model is built."""
        result = call.result()
        with exit_rank_with_one_line():
            from megatron.training import get_args

            from megatron_tokscale.training.parts import parts_of_job
            from megatron_tokscale.training.ranks import begin_job, together

            begin_job()
            args = get_args()
            adopt_loader_settings(args, self._config)
            self._parts[:] = together(lambda: parts_of_job(args, self._given)) or []
        return result

    def around_job(self, call: Call) -> Any:
        """Send `on_data` through the user's datasets provider, and `on_job_end`."""
        provider = "train_valid_test_dataset_provider"
        call = call.with_argument(
            provider, planned(call.arguments[provider], self._parts, lambda: self._state({}))
        )
        self._forward_step = call.arguments["forward_step_func"]
        self._given = [name for name, value in call.arguments.items() if value is not None]
        self._config = call.arguments.get("cfg_container")
        with exit_rank_with_one_line():
            try:
                result = call.result()
            except (Exception, SystemExit) as error:
                if getattr(error, "code", None) != EXIT_CODE:  # has printed its line
                    self._end_job()
                raise
            self._end_job()
            return result

    def _end_job(self) -> None:
        for part in self._parts:
            part.on_job_end()

    def after_load(self, call: Call) -> Any:
        """Send `on_load`."""
        result = call.result()
        for part in self._parts:
            part.on_load(result[0])
        return result

    def after_setup(self, call: Call) -> Any:
        """Send `on_setup`; a part may end the job there."""
        result = call.result()
        names = ("model", "optimizer", "opt_param_scheduler")
        state = self._state(dict(zip(names, result, strict=False)))
        with exit_rank_with_one_line(), closing(self._parts, on_success=False):
            for part in self._parts:
                part.on_setup(state)
        return result

    def around_training(self, call: Call) -> Any:
        """Send `on_train_start`, `on_forward` and `on_train_end`, and close the parts."""
        with exit_rank_with_one_line(), closing(self._parts), finishing_saves(finish_save):
            state = self._state(call.arguments)
            for part in self._parts:
                part.on_train_start(state)
            result = with_forward_step_of(self._parts, call, "forward_step_func").result()
            last = {"iteration": result[0]} if isinstance(result, tuple) else {}
            state = self._state(call.arguments | last)
            for part in self._parts:
                part.on_train_end(state)
            return result

    def before_log(self, call: Call) -> Any:
        """Send `on_log`."""
        for part in self._parts:
            part.on_log(call.arguments["loss_dict"])
        return call.result()

    def after_step(self, call: Call) -> Any:
        """Send `on_step`."""
        result = call.result()
        state = self._state(call.arguments)
        for part in self._parts:
            part.on_step(state)
        return result

    def before_save(self, call: Call) -> Any:
        """Send `before_checkpoint`."""
        state = self._state(call.arguments)
        for part in self._parts:
            part.before_checkpoint(state)
        return call.result()

    def after_save(self, call: Call) -> Any:
        """Send `after_checkpoint`."""
        result = call.result()
        state = self._state(call.arguments)
        for part in self._parts:
            part.after_checkpoint(state)
        return result

    def after_decision(self, call: Call) -> Any:
        """Send `on_exit`, if the job is to end."""
        is_over = call.result()
        if is_over:
            state = self._state(call.arguments)
            for part in self._parts:
                part.on_exit(state)
        return is_over

    def _state(self, arguments: dict[str, Any]) -> TrainingState:
        """Return the state of the training, from the arguments of a function of Megatron's.

        This is the only place that reads Megatron's argument names. Megatron's newest `train`
        takes one object, `context`, with several of them as attributes.
        """
        from megatron.training import get_args

        args = get_args()
        arguments = {**getattr(arguments.get("context"), "__dict__", {}), **arguments}
        step = arguments.get("iteration")
        return TrainingState(
            step=steps_taken(args) if step is None else int(step),
            consumed_samples=samples_consumed(args),
            args=args,
            model=arguments.get("model", ()),
            optimizer=arguments.get("optimizer"),
            scheduler=arguments.get("opt_param_scheduler"),
            forward_step=arguments.get("forward_step_func", self._forward_step),
        )


def with_forward_step_of(parts: Sequence[JobPart], call: Call, name: str) -> Call:
    """Return the call of a training loop, whose forward step the parts may wrap.

    Args:
        parts: the parts of the job.
        call: the call.
        name: name of the argument with the forward step.
    """
    for part in parts:
        if type(part).on_forward is not JobPart.on_forward:
            call = call.with_forward_step(name, part.on_forward)
    return call


def planned(
    provider: Function,
    parts: Sequence[JobPart],
    state: Callable[[], TrainingState],
    *,
    is_distributed: bool = False,
) -> Function:
    """Return the user's datasets provider, whose datasets the parts may replace.

    Args:
        provider: returns the training, validation and test dataset.
        parts: the parts of the job.
        state: returns the state of the training.
        is_distributed: every rank calls the provider, also if the provider does not say so.
    """

    @functools.wraps(provider)
    def provide(n_samples: Any, *args: Any, **kwargs: Any) -> Any:
        datasets = provider(n_samples, *args, **kwargs)
        on_all = is_distributed or bool(getattr(provider, "is_distributed", False))
        built = BuiltDatasets(datasets, n_samples, on_all)
        with exit_rank_with_one_line():
            for part in parts:
                built = part.on_data(state(), built)
        return built.datasets

    return provide


@dataclass(frozen=True)
class Hook:
    """A function of Megatron that the plugin wraps.

    Attributes:
        module: the module in which Megatron looks the function up.
        name: name of the function.
        event: name of the event in the table of `events.py`.
        wrap: calls the function and sends the event.
        purpose: purpose of the hook, for a user whose Megatron lacks it.
        arguments: names of the function's leading arguments, for one whose signature names none.
        is_required: a Megatron without the function is refused.
    """

    module: str
    name: str
    event: str
    wrap: Callable[[Plugin, Call], Any]
    purpose: str
    arguments: tuple[str, ...] = ()
    is_required: bool = True

    def way(self, function: Function) -> str:
        """Return in words how the arguments of the function are known."""
        named = inspect.signature(function).parameters
        if "context" in named:
            return "arguments in its context"
        return "arguments by name" if set(self.arguments) <= set(named) else "arguments by place"

    def install(self, plugin: Plugin) -> None:
        """Wrap the function.

        Raises:
            TokscaleError: this Megatron lacks it, and it is required.
        """
        module = importlib.import_module(self.module)
        function = getattr(module, self.name, None)
        if function is not None:
            setattr(module, self.name, self._wrapped(plugin, function))
        elif self.is_required:
            raise TokscaleError(
                f"{self.module}.{self.name} is missing in this Megatron; expected the hook for "
                f"{self.purpose}; install megatron-core 0.17 to 0.19"
            )

    def _wrapped(self, plugin: Plugin, function: Function) -> Function:
        parameters = inspect.signature(function).parameters.values()
        unnamed = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD
        named = tuple(each.name for each in parameters if each.kind not in unnamed)
        names = named or self.arguments

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            return self.wrap(plugin, Call(function, names, args, kwargs))

        return call


_ARGUMENTS: Final = "megatron.training.arguments"
_CHECKPOINTING: Final = "megatron.training.checkpointing"
_TRAINING: Final = "megatron.training.training"
_MODEL_FIRST: Final = ("model", "optimizer", "opt_param_scheduler", "iteration")
_STEP_FIRST: Final = ("iteration", "model", "optimizer", "opt_param_scheduler")
_OF_TRAIN: Final = ("forward_step_func", "model", "optimizer", "opt_param_scheduler")

HOOKS: Final = (
    Hook(_ARGUMENTS, "add_megatron_arguments", "flags", Plugin.add_flags, "the --tokscale-* flags"),
    Hook(
        _TRAINING,
        "initialize_megatron",
        "parts are made",
        Plugin.make_parts,
        "checks before the model is built",
    ),
    Hook(
        _TRAINING,
        "pretrain",
        "on_data, on_job_end",
        Plugin.around_job,
        "the training dataset that follows a plan",
    ),
    Hook(
        _CHECKPOINTING,
        "_load_base_checkpoint",
        "on_load",
        Plugin.after_load,
        "tokens and learning rates of a resumed run's past",
        is_required=False,
    ),
    Hook(
        _TRAINING,
        "setup_model_and_optimizer",
        "on_setup, close",
        Plugin.after_setup,
        "--tokscale-replay",
    ),
    Hook(
        _TRAINING,
        "train",
        "on_train_start, on_forward, on_train_end, close",
        Plugin.around_training,
        "the probe before the first step",
        _OF_TRAIN,
    ),
    Hook(
        _TRAINING,
        "training_log",
        "on_log",
        Plugin.before_log,
        "the training loss in each probe's record",
        ("loss_dict",),
        is_required=False,
    ),
    Hook(
        _TRAINING,
        "post_training_step_callbacks",
        "on_step",
        Plugin.after_step,
        "probes between steps",
        _MODEL_FIRST,
    ),
    Hook(
        _TRAINING,
        "save_checkpoint",
        "before_checkpoint",
        Plugin.before_save,
        "losses on disk before a checkpoint is",
        _STEP_FIRST,
    ),
    Hook(
        _TRAINING,
        "save_checkpoint_and_time",
        "after_checkpoint",
        Plugin.after_save,
        "probes at checkpoints between intervals",
        _STEP_FIRST,
    ),
    Hook(
        _TRAINING,
        "checkpoint_and_decide_exit",
        "on_exit",
        Plugin.after_decision,
        "--tokscale-probe-at-exit",
        _MODEL_FIRST,
    ),
)
