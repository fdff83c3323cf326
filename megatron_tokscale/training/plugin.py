"""The plugin in a job: where it hooks into Megatron's training loop, and what it holds.

Hooks are module globals of Megatron that have had one name and one set of leading arguments since
0.12 and are looked up when they are called; each is wrapped, none replaced.
"""

import functools
import importlib
import inspect
from argparse import ArgumentParser
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

from megatron_tokscale.core.errors import EXIT_CODE, TokscaleError, exit_with_one_line, say
from megatron_tokscale.training.config import add_arguments, config_from_args

Function = Callable[..., Any]
Wrapper = Callable[[Function], Function]


class Hook(NamedTuple):
    """A function of Megatron that the plugin wraps."""

    module: str
    name: str
    purpose: str
    required: bool = True


_TRAINING = "megatron.training.training"
HOOKS = (
    Hook("megatron.training.arguments", "add_megatron_arguments", "the --tokscale-* flags"),
    Hook(_TRAINING, "initialize_megatron", "checks before the model is built"),
    Hook(_TRAINING, "pretrain", "the training dataset that follows a plan"),
    Hook(_TRAINING, "setup_model_and_optimizer", "--tokscale-replay"),
    Hook(_TRAINING, "train", "the probe before the first step"),
    Hook(_TRAINING, "post_training_step_callbacks", "probes between steps"),
    Hook(_TRAINING, "save_checkpoint", "losses on disk before a checkpoint is"),
    Hook(
        "megatron.training.checkpointing",
        "_load_base_checkpoint",
        "tokens and learning rates of a resumed run's past",
        required=False,
    ),
    Hook(_TRAINING, "save_checkpoint_and_time", "probes at checkpoints between intervals"),
    Hook(_TRAINING, "checkpoint_and_decide_exit", "--tokscale-probe-at-exit"),
    Hook(_TRAINING, "training_log", "the training loss in each probe's record", required=False),
)


class Plugin:
    """Installs the hooks once, and holds the job's prober and plan from start-up on."""

    def __init__(self) -> None:
        self._prober: Any = None
        self._follower: Any = None
        self._blend: Any = None
        self._trained: Any = None
        self._replanner: Any = None
        self._monitor: Any = None
        self._replay: str | None = None
        self._forward_step: Any = None
        self._has_trained = False

    def install(self) -> None:
        """Wrap the hooks.

        Raises:
            TokscaleError: this Megatron lacks one of them.
        """
        import megatron.training
        from megatron.training import training

        wrappers: dict[str, Wrapper] = {
            "add_megatron_arguments": _adding_arguments,
            "initialize_megatron": self._starting,
            "pretrain": self._pretraining,
            "setup_model_and_optimizer": self._setting_up,
            "train": self._training,
            "post_training_step_callbacks": self._stepping,
            "save_checkpoint": self._saving,
            "_load_base_checkpoint": self._loading,
            "save_checkpoint_and_time": self._having_saved,
            "checkpoint_and_decide_exit": self._exiting,
            "training_log": self._logging,
        }
        for hook in HOOKS:
            _wrap(hook, wrappers[hook.name])
        megatron.training.pretrain = training.pretrain

    def _starting(self, initialize: Function) -> Function:
        def start(*args: Any, **kwargs: Any) -> Any:
            result = initialize(*args, **kwargs)
            with _exit_with_one_line():
                from megatron_tokscale.training.ranks import together

                together(self._read_flags)
            return result

        return start

    def _read_flags(self) -> None:
        """Check the flags and the files they name, before the model is built."""
        from megatron.training import get_args

        args = get_args()
        config = config_from_args(args)
        if args.skip_train and not config.tokscale_replay:
            if config.tokscale_probe_set or config.tokscale_plan:
                from megatron_tokscale.training.support import SKIP_TRAIN

                _print_once(SKIP_TRAIN)
            return
        if config.tokscale_probe_set:
            from megatron_tokscale.training.probe.prober import Prober

            self._prober = Prober(config, args)
        if config.tokscale_plan:
            from megatron_tokscale.training.data.plan_monitor import PlanMonitor
            from megatron_tokscale.training.data.provider import Follower

            self._follower = Follower(config, args)
            self._monitor = PlanMonitor(self._follower, args)
        if config.tokscale_replan_interval:
            from megatron_tokscale.training.config import run_directory
            from megatron_tokscale.training.data.replan import Replanner, check_interval

            interval = check_interval(config.tokscale_replan_interval)
            self._replanner = Replanner(
                interval, run_directory(config, args), self._follower, self._prober, args
            )
        if config.tokscale_replay:
            from megatron_tokscale.training.replay import prepare_replay

            self._replay = config.tokscale_replay
            prepare_replay(self._replay, args)

    def _pretraining(self, pretrain: Function) -> Function:
        signature = inspect.signature(pretrain)

        def start(*args: Any, **kwargs: Any) -> Any:
            call = signature.bind(*args, **kwargs)
            name = "train_valid_test_dataset_provider"
            call.arguments[name] = self._planned(call.arguments[name])
            self._forward_step = call.arguments["forward_step_func"]
            with _exit_with_one_line():
                try:
                    result = pretrain(*call.args, **call.kwargs)
                except (Exception, SystemExit) as error:
                    if getattr(error, "code", None) != EXIT_CODE:  # which has a line of its own
                        self._say_if_untrained()
                    raise
                self._say_if_untrained()
                return result

        return start

    def _say_if_untrained(self) -> None:
        if self._prober and not (self._has_trained or self._replay):
            _print_once("the job has ended before its first training step, so no probe was taken")

    def _planned(self, provider: Function) -> Function:
        """The user's datasets provider; its training dataset follows the plan, if there is one."""

        @functools.wraps(provider)
        def provide(num_samples: Any, *args: Any, **kwargs: Any) -> Any:
            datasets = provider(num_samples, *args, **kwargs)
            if self._trained is None and datasets:
                self._trained = datasets[0]
            if self._follower is None:
                if datasets and datasets[0] is not None:  # on the model chunks that read data
                    self._blend = datasets[0]
                return datasets
            with _exit_with_one_line():
                return self._follower.follow(datasets, num_samples, provider)

        return provide

    def _setting_up(self, setup_model_and_optimizer: Function) -> Function:
        def setup(*args: Any, **kwargs: Any) -> Any:
            result = setup_model_and_optimizer(*args, **kwargs)
            if self._replay:
                from megatron_tokscale.training.replay import replay

                with _exit_with_one_line(), self._closing_prober():
                    replay(self._replay, self._prober, self._forward_step, result[0])
                raise SystemExit(0)
            return result

        return setup

    def _training(self, train: Function) -> Function:
        def start(
            forward_step: Any, model: Any, optimizer: Any, scheduler: Any, *rest: Any, **kwargs: Any
        ) -> Any:
            self._has_trained = True
            with _exit_with_one_line(), self._closing_prober():
                if self._prober:
                    self._prober.on_train_start(forward_step, model, optimizer, scheduler)
                self._note_data()
                if self._replanner:
                    self._replanner.on_train_start()
                result = train(forward_step, model, optimizer, scheduler, *rest, **kwargs)
                if self._prober:
                    step, *_ = result
                    self._prober.on_train_end(step, model, optimizer, scheduler)
                return result

        return start

    def _note_data(self) -> None:
        """Write down what the job trains on, now that the run's directory is its own."""
        if self._prober:
            self._say_what_is_held_out()
        if self._follower:
            self._follower.keep()
        elif self._prober:
            from megatron.training import get_args

            from megatron_tokscale.training.data.provider import record_blend

            args = get_args()
            untraced_from = self._prober.untraced_from
            record_blend(self._blend, config_from_args(args), args, untraced_from)

    def _say_what_is_held_out(self) -> None:
        import torch
        from megatron.training import print_rank_0

        from megatron_tokscale.training.data.held_out import held_out
        from megatron_tokscale.training.data.provider import trained_parts

        if torch.distributed.get_rank() == 0:
            found = held_out(self._prober.probe_set, trained_parts(self._trained))
            print_rank_0(f"tokscale: {found.line}")

    @contextmanager
    def _closing_prober(self) -> Iterator[None]:
        """Close what the job holds; an error that has ended the block is not hidden by another."""
        ending: BaseException | None = None
        try:
            yield
        except BaseException as error:
            ending = error
            raise
        finally:
            if self._replanner:
                self._replanner.close()
            if self._prober:
                try:
                    self._prober.close()
                except TokscaleError as error:
                    if ending is None or (isinstance(ending, SystemExit) and not ending.code):
                        raise
                    say(str(error))

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
                self._prober.on_step(iteration, model, optimizer, scheduler)
            if self._replanner:
                self._replanner.on_step(iteration)
            if self._monitor:
                self._monitor.on_step(iteration)
            return result

        return step

    def _saving(self, save_checkpoint: Function) -> Function:
        signature = inspect.signature(save_checkpoint)

        def save(*args: Any, **kwargs: Any) -> Any:
            if self._prober:
                self._prober.before_checkpoint()
                given = signature.bind(*args, **kwargs).arguments
                self._prober.note_history(
                    given["iteration"], given["optimizer"], given["opt_param_scheduler"]
                )
            return save_checkpoint(*args, **kwargs)

        return save

    def _loading(self, load_base_checkpoint: Function) -> Function:
        def load(*args: Any, **kwargs: Any) -> Any:
            result = load_base_checkpoint(*args, **kwargs)
            if self._prober:
                self._prober.note_checkpoint(result[0])
            return result

        return load

    def _having_saved(self, save_checkpoint_and_time: Function) -> Function:
        def save(
            iteration: int, model: Any, optimizer: Any, scheduler: Any, *rest: Any, **kwargs: Any
        ) -> Any:
            result = save_checkpoint_and_time(
                iteration, model, optimizer, scheduler, *rest, **kwargs
            )
            if self._prober and self._prober.is_open:  # not the save after the training
                self._prober.after_checkpoint(iteration, model, optimizer, scheduler)
                if self._replanner:
                    self._replanner.after_probe(iteration)
            return result

        return save

    def _exiting(self, checkpoint_and_decide_exit: Function) -> Function:
        def decide(
            model: Any, optimizer: Any, scheduler: Any, iteration: int, *rest: Any, **kwargs: Any
        ) -> Any:
            is_over = checkpoint_and_decide_exit(
                model, optimizer, scheduler, iteration, *rest, **kwargs
            )
            if is_over and self._prober:
                self._prober.on_exit(iteration, model, optimizer, scheduler)
            return is_over

        return decide


def _exit_with_one_line() -> AbstractContextManager[None]:
    """End this rank as `exit_with_one_line` does; one rank says what it may have met alone."""
    from megatron_tokscale.training.ranks import is_first_to_end

    return exit_with_one_line(is_first_to_end)


def _print_once(message: str) -> None:
    from megatron.training import print_rank_0

    print_rank_0(f"tokscale: {message}")


def _adding_arguments(add_megatron_arguments: Function) -> Function:
    def add(parser: ArgumentParser) -> ArgumentParser:
        result: ArgumentParser = add_megatron_arguments(parser)
        add_arguments(result)
        return result

    return add


def _wrap(hook: Hook, wrapper: Wrapper) -> None:
    module = importlib.import_module(hook.module)
    original = getattr(module, hook.name, None)
    if original is not None:
        setattr(module, hook.name, functools.wraps(original)(wrapper(original)))
    elif hook.required:
        raise TokscaleError(
            f"this Megatron has no {hook.module}.{hook.name}, which the plugin hooks into for "
            f"{hook.purpose}; megatron-core 0.17 to 0.19 are supported"
        )
