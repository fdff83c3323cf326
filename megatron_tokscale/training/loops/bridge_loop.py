"""Megatron-Bridge's training loop.

Its context holds the config, the counters, the timers and the loggers. The plugin's parts read them
where Megatron keeps them: among its arguments and its global variables, which Bridge leaves empty.

Bridge saves no arguments in a checkpoint, so the run's past is kept in a file of its own in the
checkpoint's folder.
"""

import json
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import torch

from megatron_tokscale.core.errors import TokscaleError, say
from megatron_tokscale.core.files import write_text
from megatron_tokscale.training.config import TokscaleConfig
from megatron_tokscale.training.events import Function
from megatron_tokscale.training.history.past import NOTE
from megatron_tokscale.training.history.saved import NOTE_FILE
from megatron_tokscale.training.loops.bridge_arguments import megatron_arguments
from megatron_tokscale.training.loops.loop import Counters, Place

_COUNTS: Final = "_flops_"  # attributes of Bridge's state that a forward pass adds to


class BridgeLoop:
    """Bridge's loop, read through its global state.

    Attributes:
        state: Bridge's `GlobalState`.
    """

    train = Place("megatron.bridge.training.pretrain", "train", "forward_step_func")
    data = Place(
        "megatron.bridge.training.setup",
        "setup_data_iterators",
        "train_valid_test_datasets_provider",
    )
    is_distributed = True

    def __init__(self, state: Any) -> None:
        self.state = state
        self._notes: dict[int, str] = {}

    def arguments(self, settings: TokscaleConfig) -> Namespace:
        """Return Megatron's arguments, and set its global variables to Bridge's objects.

        Raises:
            TokscaleError: see `refuse`.
        """
        from megatron.training import global_vars

        config = self.state.cfg
        refuse(config)
        args = megatron_arguments(config, torch.distributed.get_world_size())
        for name, value in vars(settings).items():
            setattr(args, name, value)
        args.iteration, args.consumed_train_samples = self.counters(in_step=False)
        held = {
            "ARGS": args,
            "TOKENIZER": config.dataset.tokenizer,
            "TIMERS": self.state.timers,
            "TENSORBOARD_WRITER": self.state.tensorboard_logger,
            "WANDB_WRITER": self.state.wandb_logger,
            "ENERGY_MONITOR": self.state.energy_monitor,
        }
        for name, value in held.items():
            setattr(global_vars, f"_GLOBAL_{name}", value)
        return args

    def counters(self, *, in_step: bool) -> Counters:
        """Return the counters; Bridge counts a step after the callbacks of its end."""
        from megatron.core.num_microbatches_calculator import get_current_running_global_batch_size

        counted = self.state.train_state
        step, samples = int(counted.step), int(counted.consumed_train_samples)
        if not in_step:
            return Counters(step, samples)
        return Counters(step + 1, samples + int(get_current_running_global_batch_size()))

    def prepared(self, forward_step: Function) -> Function:
        """Return the forward step with Bridge's state bound, if it takes that."""
        from megatron.bridge.training.utils.train_utils import prepare_forward_step_func

        prepared: Function = prepare_forward_step_func(forward_step, self.state)
        return prepared

    def load(self, folder: Path, step: int, model: Sequence[Any]) -> Counters:
        """Load one checkpoint's weights, without optimizer and generators."""
        from megatron.bridge.training.checkpointing import load_checkpoint

        settings = self.state.cfg.checkpoint
        settings.load, settings.ckpt_step = str(folder), step
        settings.finetune, settings.load_optim, settings.load_rng = False, False, False
        load_checkpoint(self.state, list(model), None, None)
        return self.counters(in_step=False)

    def before_checkpoint(self, args: Namespace, step: int) -> None:
        """Remember the run's past at this step, and at the steps whose checkpoint is not written.

        Bridge may write a checkpoint while the training goes on.
        """
        interval = args.save_interval
        self._notes = {
            known: note for known, note in self._notes.items() if interval and known % interval == 0
        }
        if args.save and getattr(args, NOTE, None) is not None:
            self._notes[step] = json.dumps(getattr(args, NOTE))

    def after_checkpoint(self) -> bool:
        """Write the run's past into the folders of the checkpoints that are there, on rank 0.

        A note that cannot be written is reported: it must not end the job, and rank 0 alone.
        """
        settings = self.state.cfg.checkpoint
        for step in list(self._notes):
            folder = Path(settings.save) / f"iter_{step:07d}"
            if folder.is_dir():
                note = self._notes.pop(step)
                if torch.distributed.get_rank() == 0:
                    _write_note(folder / NOTE_FILE, note)
        return not settings.async_save

    def finish_save(self) -> None:
        """Finish an asynchronous checkpoint; all ranks call it together."""
        from megatron.bridge.training.checkpointing import maybe_finalize_async_save

        settings = self.state.cfg.checkpoint
        maybe_finalize_async_save(self.state, settings, blocking=True, terminate=True)

    @contextmanager
    def undisturbed(self) -> Iterator[None]:
        """Restore the counts of a step's FLOPs, which a checkpoint holds, after the block."""
        counts = {
            name: value.clone() if isinstance(value, torch.Tensor) else value
            for name, value in vars(self.state).items()
            if name.startswith(_COUNTS)
        }
        try:
            yield
        finally:
            for name in [name for name in vars(self.state) if name.startswith(_COUNTS)]:
                delattr(self.state, name)
            vars(self.state).update(counts)


def _write_note(path: Path, note: str) -> None:
    try:
        write_text(path, note)
    except OSError as error:
        say(f"the run's past cannot be kept in {path} ({error}); a job that resumes there lacks it")


def refuse(config: Any) -> None:
    """Refuse a config of Bridge's under which the plugin's parts cannot work.

    Raises:
        TokscaleError: the message names the first such setting.
    """
    from megatron.core.datasets.gpt_dataset import GPTDatasetConfig

    if not isinstance(config.dataset, GPTDatasetConfig):
        raise TokscaleError(
            f"the dataset config is a {type(config.dataset).__name__}; expected Bridge's "
            "GPTDatasetConfig: the probe is for pre-training on .bin/.idx data"
        )
    refused = {
        "dist.use_decentralized_pg": (
            config.dist.use_decentralized_pg,
            "the probe uses Megatron's own process groups",
        ),
        "peft": (config.peft is not None, "the probe is for pre-training"),
        "inprocess_restart.enabled": (
            bool(config.inprocess_restart and config.inprocess_restart.enabled),
            "the plugin does not restart in its process",
        ),
    }
    for name, (is_set, reason) in refused.items():
        if is_set:
            raise TokscaleError(f"the callback does not support {name}: {reason}; unset it")
