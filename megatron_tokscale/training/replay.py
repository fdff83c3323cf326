"""Probe the saved checkpoints of a run that is over: for a run that was trained without the plugin.

The job is started as a training job is, with the run's model flags and any parallel layout that
can load its checkpoints. It builds the model, no optimizer and no data, and ends after the last
checkpoint.
"""

import re
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from megatron.training import checkpointing, get_args, print_rank_0, training

from megatron_tokscale.errors import TokscaleError
from megatron_tokscale.training.prober import Prober
from megatron_tokscale.training.ranks import first_of_all_ranks

_FOLDER = re.compile(r"iter_(\d{7,})")
# What the learning rate's schedule was: taken from the checkpoint, not from this job's flags.
_SCHEDULE_ARGUMENTS = (
    *("lr", "min_lr", "train_iters", "train_samples", "global_batch_size", "rampup_batch_size"),
    *("step_batch_size_schedule", "start_weight_decay", "end_weight_decay"),
    *("weight_decay_incr_style", "override_opt_param_scheduler"),
)


def saved_steps(folder: Path) -> list[int]:
    """Steps of the whole checkpoints in a --save directory, ascending.

    Megatron names the last whole one in a file of its own; what is later is not whole.

    Raises:
        TokscaleError: there is no checkpoint.
    """
    tracker = folder / "latest_checkpointed_iteration.txt"
    try:
        latest = int(tracker.read_text())
    except (OSError, ValueError) as error:
        raise TokscaleError(
            f"--tokscale-replay {folder}: no checkpoints there ({tracker.name} names no iteration)"
        ) from error
    matches = [_FOLDER.fullmatch(path.name) for path in folder.iterdir()]
    return sorted(int(match[1]) for match in matches if match and int(match[1]) <= latest)


def check_schedule(
    folder: str | Path, saved: Sequence[int], is_on_schedule: Callable[..., bool]
) -> list[int]:
    """Return the checkpoints that are on the schedule.

    Raises:
        TokscaleError: there is none.
    """
    wanted = [step for step in saved if is_on_schedule(step, is_last=step == saved[-1])]
    if not wanted:
        raise TokscaleError(
            f"no checkpoint in {folder} is on the schedule; drop --tokscale-schedule for all"
        )
    return wanted


def prepare_replay(folder: str, args: Namespace) -> None:
    """Set Megatron's arguments for a job that trains nothing and saves nothing.

    Raises:
        TokscaleError: there is no checkpoint.
    """
    saved_steps(Path(folder))
    args.skip_train = True
    args.save = None
    args.load = None
    args.pretrained_checkpoint = None
    args.finetune = False
    args.no_load_optim = True
    args.no_load_rng = True
    args.overlap_param_gather = False


def replay(
    folder: str, prober: Prober, forward_step: Callable[..., Any], model: Sequence[Any]
) -> None:
    """Take the probe of every checkpoint in `folder` that the run directory does not have yet.

    Raises:
        TokscaleError: no checkpoint is on the schedule, one does not hold all weights, or see
            `Prober.take`.
    """
    saved = saved_steps(Path(folder))
    wanted = check_schedule(folder, saved, prober.is_on_schedule)
    todo = [step for step in wanted if not prober.is_on_disk(step)]
    print_rank_0(f"tokscale: replay of {len(todo)} of the {len(saved)} checkpoints in {folder}")
    for step in todo:
        optimizer, scheduler = _load(folder, step, model)
        if step == todo[0]:
            prober.open(forward_step, model, optimizer, None)
        prober.take(step, model, optimizer, scheduler)
    torch.distributed.barrier()


def _load(folder: str, step: int, model: Sequence[Any]) -> tuple[Any, Any]:
    """Load one checkpoint's weights.

    Returns:
        What stands for the optimizer and the scheduler that the checkpoint was saved with, as far
        as the learning rate goes.
    """
    args = get_args()
    args.load, args.ckpt_step = folder, step
    args.consumed_train_samples = args.consumed_valid_samples = 0
    _spoil(model)
    checkpoint_args: list[Namespace] = []
    check = checkpointing.check_checkpoint_args

    def note_and_check(saved: Namespace, *rest: Any, **kwargs: Any) -> Any:
        checkpoint_args.append(saved)
        return check(saved, *rest, **kwargs)

    checkpointing.check_checkpoint_args = note_and_check
    try:
        loaded, _ = checkpointing.load_checkpoint(model, None, None)
    finally:
        checkpointing.check_checkpoint_args = check
    if loaded != step:
        raise TokscaleError(
            f"the checkpoint of step {step} in {folder} says it is of step {loaded}"
        )
    if message := first_of_all_ranks(_unloaded(model)):
        raise TokscaleError(f"checkpoint {step} in {folder} does not hold {message}")
    if not checkpoint_args:
        return SimpleNamespace(param_groups=[]), None
    return _learning_rate_of(checkpoint_args[0])


def _spoil(model: Sequence[Any]) -> None:
    """Fill the parameters with NaN: Megatron leaves out in silence what it does not find."""
    for chunk in model:
        for parameter in chunk.parameters():
            if type(parameter.data) is torch.Tensor:
                parameter.data.fill_(torch.nan)


def _unloaded(model: Sequence[Any]) -> str | None:
    """Name a parameter that is still spoilt."""
    for chunk in model:
        for name, parameter in chunk.named_parameters():
            if type(parameter.data) is torch.Tensor and bool(parameter.isnan().any()):
                return f"(whole) the parameter {name}; is --ckpt-format that of the checkpoint?"
    return None


def _learning_rate_of(saved: Namespace) -> tuple[Any, Any]:
    args = get_args()
    for name, value in vars(saved).items():
        if name in _SCHEDULE_ARGUMENTS or name.startswith("lr_"):
            setattr(args, name, value)
    group = {"max_lr": args.lr, "min_lr": args.min_lr, "default_config": True}
    optimizer = SimpleNamespace(param_groups=[group])
    scheduler = training.get_optimizer_param_scheduler(optimizer)
    scheduler.step(int(args.consumed_train_samples))
    return optimizer, scheduler
