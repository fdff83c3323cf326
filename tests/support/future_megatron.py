"""Functions with the signatures of a Megatron after 0.19, and a loop that calls them in its order.

The stand-ins are put in the places of the installed Megatron's functions, where the plugin wraps
them. They train nothing: they record what they are given.
"""

import sys
from argparse import Namespace
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_tokscale.training.events import JobPart

TRAINING = "megatron.training.training"


@dataclass
class TrainState:
    """The counters that left Megatron's arguments."""

    step: int = 0
    consumed_train_samples: int = 0
    consumed_valid_samples: int = 0


@dataclass
class PretrainContext:
    """The context that `train` gets in the place of its first arguments."""

    forward_step_func: Any
    model: list[Any]
    optimizer: Any
    train_data_iterator: Any
    valid_data_iterator: Any


@dataclass
class FutureMegatron:
    """The job: its state, and the calls that its functions have got."""

    args: Namespace
    takes_context: bool = True
    state: TrainState = field(default_factory=TrainState)
    calls: list[tuple[str, Any]] = field(default_factory=list)
    callbacks: list[Any] = field(default_factory=list)
    is_stopped: bool = False

    def install(self, patch: pytest.MonkeyPatch) -> None:
        """Put the functions in the places of the installed Megatron's."""
        import megatron.training
        from megatron.training import arguments, checkpointing, global_vars, training

        patch.setattr(global_vars, "_GLOBAL_ARGS", self.args)
        patch.setattr(global_vars, "get_train_state", lambda: self.state, raising=False)
        patch.setattr(arguments, "add_megatron_arguments", lambda parser: parser)
        patch.setattr(checkpointing, "_load_base_checkpoint", lambda *args, **kwargs: ({}, "", 0))
        for name in (
            "pretrain",
            "initialize_megatron",
            "setup_model_and_optimizer",
            "training_log",
            "post_training_step_callbacks",
            "save_checkpoint",
            "save_checkpoint_and_time",
            "checkpoint_and_decide_exit",
        ):
            patch.setattr(training, name, getattr(self, name))
        train = self.train_in_context if self.takes_context else self.train
        patch.setattr(training, "train", train)
        patch.setattr(megatron.training, "pretrain", training.pretrain)
        patch.setattr(training, "build_train_valid_test_data_iterators", self.build_iterators)

    def pretrain(
        self,
        cfg_container: Any,
        train_valid_test_dataset_provider: Any,
        model_type: Any,
        forward_step_func: Any,
        model_provider: Any = None,
        callbacks: Any = None,
    ) -> None:
        """Build, train, save: every function is looked up in Megatron's module, as it does."""
        from megatron.training import training

        training.initialize_megatron()
        model, optimizer, scheduler = training.setup_model_and_optimizer(model_type)
        self.callbacks = callbacks or []
        context = SimpleNamespace(model=model, optimizer=optimizer, scheduler=scheduler)
        self._fire("on_data_init_start", context)
        training.build_train_valid_test_data_iterators(train_valid_test_dataset_provider)
        self.calls.append(("callbacks", callbacks))
        if self.takes_context:
            context = PretrainContext(forward_step_func, model, optimizer, "train", "valid")
            training.train(context, scheduler, "p2p", "groups", callback_manager=callbacks)
        else:
            training.train(
                forward_step_func,
                model,
                optimizer,
                scheduler,
                *("train", "valid", None, cfg_container, {}, None),
                callback_manager=callbacks,
            )

    def build_iterators(self, build_train_valid_test_datasets_provider: Any) -> None:
        self.calls.append(("datasets", build_train_valid_test_datasets_provider([16, 0, 0])))

    def _fire(self, event: str, context: Any) -> None:
        for callback in self.callbacks:
            getattr(callback, event, lambda context: None)(context)

    def initialize_megatron(self) -> None:
        self.calls.append(("initialize_megatron", None))

    def setup_model_and_optimizer(self, model_type: Any) -> tuple[list[str], str, str]:
        return ["chunk"], "optimizer", "scheduler"

    def train_in_context(
        self,
        context: PretrainContext,
        opt_param_scheduler: Any,
        p2p_communicator: Any,
        pg_collection: Any,
        callback_manager: Any = None,
    ) -> None:
        self.calls.append(("train", (context, p2p_communicator, pg_collection, callback_manager)))
        self._loop(context.model, context.optimizer, opt_param_scheduler)

    def train(
        self,
        forward_step_func: Any,
        model: Any,
        optimizer: Any,
        opt_param_scheduler: Any,
        train_data_iterator: Any,
        valid_data_iterator: Any,
        process_non_loss_data_func: Any,
        config: Any,
        checkpointing_context: Any,
        non_loss_data_func: Any,
        callback_manager: Any = None,
    ) -> tuple[int, float]:
        self.calls.append(("train", (forward_step_func, callback_manager)))
        self._loop(model, optimizer, opt_param_scheduler)
        return self.state.step, 0.0

    def _loop(self, model: Any, optimizer: Any, scheduler: Any) -> None:
        from megatron.training import training

        context = SimpleNamespace(model=model, optimizer=optimizer, scheduler=scheduler)
        self._fire("on_train_start", context)
        for _ in range(2):
            self.args.curr_iteration = self.state.step
            context.loss_dict = {"lm loss": float(self.state.step + 1)}
            self._fire("on_train_step_end", context)
            self.state.step += 1
            self.state.consumed_train_samples += 8
            step = self.state.step
            training.training_log(context.loss_dict, {}, 0.1, step)
            training.post_training_step_callbacks(model, optimizer, scheduler, step, None, 0.0)
            training.checkpoint_and_decide_exit(model, optimizer, scheduler, step, 0.0, {}, None)
        if self.is_stopped:
            sys.exit(0)
        self._fire("on_train_end", context)

    def training_log(
        self, loss_dict: Any, total_loss_dict: Any, learning_rate: Any, iteration: int
    ) -> None: ...

    def post_training_step_callbacks(
        self,
        model: Any,
        optimizer: Any,
        opt_param_scheduler: Any,
        iteration: int,
        prof: Any,
        num_floating_point_operations_since_last_log_event: float,
    ) -> float:
        return num_floating_point_operations_since_last_log_event

    def checkpoint_and_decide_exit(
        self,
        model: Any,
        optimizer: Any,
        opt_param_scheduler: Any,
        iteration: int,
        num_floating_point_operations_so_far: float,
        checkpointing_context: Any,
        train_data_iterator: Any,
    ) -> bool:
        from megatron.training import training

        training.save_checkpoint_and_time(iteration, model, optimizer, opt_param_scheduler)
        return iteration == 2

    def save_checkpoint_and_time(
        self, iteration: int, model: Any, optimizer: Any, opt_param_scheduler: Any
    ) -> None:
        from megatron.training import training

        training.save_checkpoint(iteration, model, optimizer, opt_param_scheduler)

    def save_checkpoint(
        self, iteration: int, model: Any, optimizer: Any, opt_param_scheduler: Any
    ) -> None: ...


def container(**dataset: Any) -> SimpleNamespace:
    """A config container whose dataset config holds the data loader's settings."""
    return SimpleNamespace(dataset=SimpleNamespace(**dataset))


class Recorder(JobPart):
    """Keeps the step, samples, model, optimizer, scheduler and forward step of every event."""

    def __init__(self) -> None:
        self.heard: list[tuple[Any, ...]] = []

    def _note(self, event: str, state: Any) -> None:
        values = (state.step, state.consumed_samples, list(state.model))
        rest = (state.optimizer, state.scheduler, state.forward_step)
        self.heard.append((event, *values, *rest))

    def on_data(self, state: Any, built: Any) -> Any:
        self.heard.append(("on_data", state.step, built.train))
        return built

    def on_log(self, losses: Any) -> None:
        self.heard.append(("on_log", losses["lm loss"]))

    def __getattribute__(self, name: str) -> Any:
        if name in {
            *("on_setup", "on_train_start", "on_step", "before_checkpoint"),
            *("after_checkpoint", "on_exit", "on_train_end"),
        }:
            return lambda state: self._note(name, state)
        return super().__getattribute__(name)
