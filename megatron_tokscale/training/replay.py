"""The part of a job that replays a run: it probes the run's saved checkpoints.

It serves runs that were trained without the plugin.

The job is started as a training job is, with the run's model flags and any parallel layout that
can load its checkpoints. It builds the model, no optimizer and no data, and ends after the last
checkpoint.
"""

import re
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import torch
from megatron.training import checkpointing, get_args, print_rank_0

from megatron_tokscale.core.errors import AgreedError, TokscaleError
from megatron_tokscale.probe import JobPoint, ProbeSchedule
from megatron_tokscale.training.events import JobPart, TrainingState
from megatron_tokscale.training.history.past import Past
from megatron_tokscale.training.history.reckon import pasts_of
from megatron_tokscale.training.probe.prober import Prober
from megatron_tokscale.training.ranks import (
    ending_together,
    first_of_all_ranks,
    from_rank_0,
    while_others_wait,
)
from megatron_tokscale.training.samples.replayed import ReplayedStep, checkpoint_before
from megatron_tokscale.training.scalars import flush_scalars
from megatron_tokscale.training.upstream import forget_samples, samples_consumed

type Load = Callable[[Path, int, Sequence[Any]], tuple[int, int]]
"""A function that loads the weights of one checkpoint, by --save directory and step, into a model.
It returns the step that the checkpoint names, and the training samples consumed by then."""

_FOLDER: Final = re.compile(r"iter_(\d{7,})")
_SHOWN_CHARACTERS: Final = 300  # of a reason: an error of torch can hold all tensor names


def saved_steps(folder: Path) -> list[int]:
    """Return the steps of the whole checkpoints in a --save directory, ascending.

    Megatron names the last whole one in a file of its own; later ones are not whole.

    Raises:
        TokscaleError: there is no checkpoint, or the last one is missing.
    """
    tracker = folder / "latest_checkpointed_iteration.txt"
    try:
        text = tracker.read_text(errors="replace")
        latest = int(text)
    except OSError as error:
        raise TokscaleError(
            f"--tokscale-replay {folder}: no checkpoints there ({tracker.name}: {error.strerror})"
        ) from error
    except ValueError as error:
        raise TokscaleError(
            f"--tokscale-replay {folder}: no checkpoints there that have a step ({tracker.name} "
            f"names {text[:40].strip()!r}); expected the last whole iteration"
        ) from error
    matches = [_FOLDER.fullmatch(path.name) for path in folder.iterdir()]
    steps = sorted(int(match[1]) for match in matches if match and int(match[1]) <= latest)
    if latest not in steps:
        raise TokscaleError(
            f"--tokscale-replay {folder}: {tracker.name} names iteration {latest}, whose folder is "
            "not there; restore it, or write the last whole iteration into that file"
        )
    return steps


def wanted_steps(folder: Path, saved: Sequence[int], schedule: ProbeSchedule) -> list[int]:
    """Return the steps of the checkpoints that are on the schedule.

    Raises:
        AgreedError: no checkpoint is on the schedule.
    """
    wanted = [
        step
        for step in saved
        if schedule.is_due(
            JobPoint(step=step, is_checkpoint=True, is_last=step == saved[-1], tokens_before=0)
        )
    ]
    if not wanted:
        raise AgreedError(
            f"no checkpoint in {folder} is on the schedule; drop --tokscale-probe-schedule for all"
        )
    return wanted


def prepare_replay(folder: Path, args: Namespace) -> None:
    """Set Megatron's arguments for a job that trains nothing and saves nothing.

    Raises:
        TokscaleError: there is no checkpoint.
    """
    saved_steps(folder)
    args.skip_train = True
    args.save = None
    args.load = None
    args.pretrained_checkpoint = None
    args.finetune = False
    args.no_load_optim = True
    args.no_load_rng = True
    args.overlap_param_gather = False
    args.non_persistent_ckpt_type = None  # a later local checkpoint would be loaded instead


class Replay(JobPart):
    """Probes the checkpoints of a run in the place of the training, and ends the job."""

    def __init__(
        self,
        folder: Path,
        schedule: ProbeSchedule,
        prober: Prober,
        args: Namespace,
        load: Load | None = None,
        replayed: ReplayedStep | None = None,
    ) -> None:
        """Set Megatron's arguments for a job that trains nothing.

        Args:
            folder: the --save directory of the run.
            schedule: the probe schedule.
            prober: takes the probes.
            args: Megatron's arguments.
            load: loads a checkpoint; None: as Megatron does.
            replayed: the step whose samples' losses are computed; None for none.

        Raises:
            TokscaleError: there is no checkpoint, or none from before the replayed step.
        """
        self._replayed = replayed
        if replayed is not None:
            checkpoint_before(saved_steps(folder), replayed.step)
        self._folder, self._schedule, self._prober = folder, schedule, prober
        self._load = load or load_by_megatron
        prepare_replay(folder, args)

    def on_setup(self, state: TrainingState) -> None:
        """Take the probe of every checkpoint that the run directory does not have yet.

        Raises:
            TokscaleError: no checkpoint is on the schedule, one does not hold all weights, or see
                `Prober.take`.
            SystemExit: with code 0, when all probes are taken.
        """
        folder, prober = self._folder, self._prober
        saved = from_rank_0(lambda: saved_steps(folder))
        wanted = wanted_steps(folder, saved, self._schedule)
        todo = [step for step in wanted if prober.lacks(step)]
        print_rank_0(f"tokscale: replay of {len(todo)} of the {len(saved)} checkpoints in {folder}")
        # Use all checkpoints: settings may change between two that are on the schedule.
        pasts = while_others_wait(lambda: pasts_of(folder, saved), where=prober.is_writer) or {}
        launches = pasts[max(pasts)].launches if pasts else ()
        prober.check_launches(launches, max(pasts, default=0))
        if self._replayed is not None:
            self._replayed.read(launches)
        for step in todo:
            samples = _load(self._load, folder, step, state.model)
            if step == todo[0]:
                prober.open(state, launches, None)
            past = pasts.get(step) or Past(step=step, samples=samples)
            prober.take_saved(past, replace(state, consumed_samples=samples))
        if self._replayed is not None:
            checkpoint = checkpoint_before(saved, self._replayed.step)
            _load(self._load, folder, checkpoint, state.model)
            self._replayed.take(state, checkpoint)
        flush_scalars()
        torch.distributed.barrier()
        raise SystemExit(0)


def load_by_megatron(folder: Path, step: int, model: Sequence[Any]) -> tuple[int, int]:
    """Load one checkpoint's weights as Megatron's own loop does: see `Load`."""
    args = get_args()
    args.load, args.ckpt_step = str(folder), step
    forget_samples(args)
    loaded, _ = checkpointing.load_checkpoint(model, None, None)
    return loaded, samples_consumed(args)


def _load(load: Load, folder: Path, step: int, model: Sequence[Any]) -> int:
    """Load one checkpoint's weights, and return the training samples consumed by then."""
    _mark_parameters(model)
    samples = 0
    with ending_together():
        samples = _load_weights(load, folder, step, model)
    if message := first_of_all_ranks(_unloaded_parameter(model)):
        raise AgreedError(f"checkpoint {step} in {folder} does not hold {message}")
    return samples


def _load_weights(load: Load, folder: Path, step: int, model: Sequence[Any]) -> int:
    """Call the loading, which ends in an error of any kind, or the process with code 0.

    Returns:
        The training samples consumed by the step.

    Raises:
        TokscaleError: the checkpoint cannot be loaded on this rank, or is of another step.
    """
    try:
        loaded, samples = load(folder, step, model)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # torch's CheckpointException and SystemExit are no Exception
        raise TokscaleError(
            f"the checkpoint {folder / f'iter_{step:07d}'} cannot be loaded "
            f"({_reason(error)}); restore it, or give the flags that it was saved with"
        ) from error
    if loaded != step:
        raise TokscaleError(
            f"the checkpoint of step {step} in {folder} says it is of step {loaded}; expected the "
            "step that its folder is named after; restore it"
        )
    return samples


def _reason(error: BaseException) -> str:
    """Return the reason, in a few words, why a checkpoint was not loaded."""
    if isinstance(error, SystemExit) and error.__context__ is not None:
        error = error.__context__  # Megatron has printed the reason before it exited
    failures = getattr(error, "failures", None)  # by rank, of a distributed checkpoint
    if isinstance(failures, dict) and failures:
        found = next(iter(failures.values()))
        error = found[0] if isinstance(found, tuple) else error
    words = " ".join(str(error).split())
    return f"{type(error).__name__}: {words[:_SHOWN_CHARACTERS]}" if words else type(error).__name__


# Bits of a NaN that no arithmetic makes: a diverged run's checkpoint holds NaN of other bits.
_MARKS: Final = {
    torch.float32: (torch.int32, 0x7FC0DEAD),
    torch.bfloat16: (torch.int16, 0x7FDE),
    torch.float16: (torch.int16, 0x7EDE),
    torch.float64: (torch.int64, 0x7FF8DEADDEADDEAD),
}


def _mark_parameters(model: Sequence[Any]) -> None:
    """Mark each element of the parameters, to detect weights that Megatron skipped."""
    for _, bits, mark in _parameters_as_bits(model):
        bits.fill_(mark)


def _unloaded_parameter(model: Sequence[Any]) -> str | None:
    """Return the name of a parameter that still has a mark; None if all are loaded."""
    for name, bits, mark in _parameters_as_bits(model):
        if bool((bits == mark).any()):
            return f"(whole) the parameter {name}; is --ckpt-format that of the checkpoint?"
    return None


def _parameters_as_bits(model: Sequence[Any]) -> Iterator[tuple[str, torch.Tensor, int]]:
    """Yield each plain parameter's name, its elements as integers, and the mark for them."""
    for chunk in model:
        for name, parameter in chunk.named_parameters():
            if type(parameter.data) is torch.Tensor and parameter.dtype in _MARKS:
                kind, mark = _MARKS[parameter.dtype]
                yield name, parameter.data.view(kind), mark
