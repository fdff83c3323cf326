"""The past of a run that was trained without the plugin, from what its checkpoints hold.

A checkpoint holds the flags of the job that saved it, the samples consumed by then, and the state
of the learning rate's scheduler. Steps between two checkpoints are reckoned where these agree;
where they do not, or where settings have changed at a step that cannot be told, the counts are
unknown from there on.
"""

import math
import secrets
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from megatron.core import num_microbatches_calculator

from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.store import Batch, Launch, LearningRates, LossRecord
from megatron_tokscale.store.launches import parting
from megatron_tokscale.training.history.counts import Past, beginning, canonical_group, noted

RECKONED = "reckoned from the checkpoint's settings"


@dataclass(frozen=True)
class Saved:
    """Content of a checkpoint besides its weights.

    Attributes:
        step: optimizer steps completed.
        args: Megatron's arguments in the job that saved it.
        scheduler: state of the learning rate's scheduler; None if it holds none.
    """

    step: int
    args: Namespace
    scheduler: Mapping[str, Any] | None

    @staticmethod
    def from_state_dict(state: Any) -> "Saved | None":
        """Return what the checkpoint's `state` holds; None if that is not a trained model's."""
        if not isinstance(state, Mapping) or not isinstance(state.get("args"), Namespace):
            return None
        if not isinstance(state.get("iteration"), int):
            return None
        scheduler = state.get("opt_param_scheduler")
        known = scheduler if isinstance(scheduler, Mapping) else None
        return Saved(state["iteration"], state["args"], known)

    @property
    def samples(self) -> int:
        """Training samples consumed."""
        return int(getattr(self.args, "consumed_train_samples", 0))

    @property
    def skipped(self) -> int:
        """Samples of the steps that --iterations-to-skip has left out."""
        return int(getattr(self.args, "skipped_train_samples", 0) or 0)


def read_saved(folder: Path, step: int) -> Saved | None:
    """Read what the checkpoint of `step` in a --save directory holds, without its weights.

    None if it is of a format that cannot be read without them, or is damaged: loading it says so.
    """
    from megatron.core import dist_checkpointing

    path = folder / f"iter_{step:07d}"
    try:
        if dist_checkpointing.check_is_distributed_checkpoint(str(path)):
            state = dist_checkpointing.load_common_state_dict(str(path))
        else:
            file = min(path.glob("mp_rank_*/model_optim_rng.pt"))
            state = torch.load(file, map_location="cpu", mmap=True)
    except KeyboardInterrupt:
        raise
    except BaseException:  # of a damaged file: torch's CheckpointException is no Exception
        return None
    saved = Saved.from_state_dict(state)
    return saved if saved and saved.step == step else None


def past_of_job(
    step: int,
    samples: int,
    saved: Saved | None,
    record: LossRecord | None,
    known: Sequence[Launch],
) -> Past:
    """Return what a run has done when a job starts or goes on.

    Args:
        step: optimizer steps completed.
        samples: training samples consumed.
        saved: what the checkpoint holds that the job has loaded.
        record: of the losses of that very step in the job's run directory.
        known: launches in the run directory.
    """
    if step == 0:
        return beginning(samples)
    past = Past(step=step, samples=samples)
    if saved is not None and (saved.step, saved.samples) != (step, samples):
        saved = None
    if saved is not None:
        past = noted(saved.args, step, samples) or past
    if not past.launches:
        past = replace(past, launches=tuple(row for row in known if row.step < step))
    is_own = parting(known, past.launches, step) is None
    is_here = record is not None and (record.step, record.consumed_samples) == (step, samples)
    if record is not None and is_here and is_own:
        lr_sum = None if math.isnan(record.lr_sum) else record.lr_sum
        of_losses = replace(past, tokens=record.consumed_tokens, lr_sum=lr_sum)
        past = _completed(past, of_losses, "the losses on disk")
    if saved is not None and (past.tokens is None or past.lr_sum is None):
        reckoned = _reckoned(beginning(0), None, saved)
        past = past if reckoned is None else _completed(past, reckoned, RECKONED)
    return past


def _completed(past: Past, other: Past, source: str) -> Past:
    """Fill what is unknown of a past from another one of the same step."""
    new = replace(
        past,
        tokens=other.tokens if past.tokens is None else past.tokens,
        tokens_before=other.tokens_before if past.tokens_before is None else past.tokens_before,
        lr_sum=other.lr_sum if past.lr_sum is None else past.lr_sum,
    )
    if (new.tokens, new.lr_sum) == (past.tokens, past.lr_sum):
        return past
    return replace(new, source=source, launches=past.launches or other.launches)


def pasts_of(folder: Path, steps: Sequence[int]) -> dict[int, Past]:
    """Return what a run has done by each of its checkpoints that can be read.

    Args:
        folder: the --save directory.
        steps: of its checkpoints, ascending.
    """
    past, previous = beginning(0), None
    found = {}
    for step in steps:
        saved = read_saved(folder, step)
        if saved is None:
            continue
        new = noted(saved.args, step, saved.samples) or _reckoned(past, previous, saved)
        if new is not None:
            past, previous, found[step] = new, saved, new
    return found


def _reckoned(before: Past, previous: Saved | None, saved: Saved) -> Past | None:
    """Return what `reckon` does; None if the checkpoint lacks some of the settings."""
    try:
        return reckon(before, previous, saved)
    except (AttributeError, TypeError, ValueError, TokscaleError):
        return None


def reckon(before: Past, previous: Saved | None, saved: Saved) -> Past:
    """Return the past at a checkpoint from the past at an earlier one, or at the beginning.

    Args:
        before: the past at the earlier checkpoint.
        previous: what that checkpoint holds; None at the beginning.
        saved: what the later checkpoint holds.
    """
    n_steps = saved.step - before.step
    launch, *others = (
        _with_its_ramp_up(launch_of_saved(row, before), n_steps, saved.samples)
        for row in (saved, previous)
        if row is not None
    )
    old = others[0] if others else None
    is_same = old is None or old.trains_like(launch)
    past = Past(
        step=saved.step,
        samples=saved.samples,
        scheduler_samples=_count(saved),
        launches=before.launches if is_same and before.launches else (*before.launches, launch),
    )
    if n_steps <= 0 or not _fits(launch, n_steps, saved.samples):
        return past
    # Samples that only the later settings explain: the change was at the earlier checkpoint.
    is_placed = is_same or (old is not None and not _fits(old, n_steps, saved.samples))
    tokens, tokens_before = None, None
    is_known = is_placed or (old is not None and old.seq_length == launch.seq_length)
    if before.tokens is not None and is_known:
        tokens = before.tokens + (saved.samples - before.samples) * launch.seq_length
        last = _sizes(launch, n_steps)[-1]
        tokens_before = tokens - last * launch.seq_length
    lr_sum = _lr_sum(before, previous, saved, launch, None if is_placed else old)
    return replace(past, tokens=tokens, tokens_before=tokens_before, lr_sum=lr_sum, source=RECKONED)


def _sizes(launch: Launch, n_steps: int) -> list[int]:
    return list(islice(launch.batches(), n_steps))


def _fits(launch: Launch, n_steps: int, samples: int) -> bool:
    """Return whether `n_steps` of a launch end at that many consumed samples."""
    return launch.consumed_samples + sum(_sizes(launch, n_steps)) == samples


def _with_its_ramp_up(launch: Launch, n_steps: int, samples: int) -> Launch:
    """Return the launch, without its ramp-up if its Megatron is one that ignores the flag."""
    if launch.batch.rampup_batch_size is None or _fits(launch, n_steps, samples):
        return launch
    plain = replace(launch, batch=replace(launch.batch, rampup_batch_size=None))
    return plain if _fits(plain, n_steps, samples) else launch


def _count(saved: Saved) -> int | None:
    """Return the scheduler's count at a checkpoint; None if nothing tells it."""
    if saved.scheduler is not None and isinstance(saved.scheduler.get("num_steps"), int):
        return int(saved.scheduler["num_steps"])
    may_differ = any(getattr(saved.args, name, False) for name in ("fp16", "no_load_optim"))
    return None if may_differ else saved.samples - saved.skipped


def _lr_sum(
    before: Past, previous: Saved | None, saved: Saved, launch: Launch, other: Launch | None
) -> float | None:
    """Return the summed learning rate at a checkpoint; None if its settings do not tell.

    Args:
        before: the past at the checkpoint before.
        previous: what that one holds.
        saved: what this one holds.
        launch: its settings.
        other: settings that may have held for some of the steps, if they cannot be told apart.
    """
    rates = launch.learning_rate
    overrides = rates.overrides_checkpoint
    if before.lr_sum is None or (overrides and previous is None):
        return None
    if overrides and previous is not None:
        # Some versions of Megatron keep the rates of the checkpoint's optimizer all the same.
        known = launch_of_saved(previous, before).learning_rate
        if (known.peak, known.minimum) != (rates.peak, rates.minimum):
            return None
    counts = _counts(before, previous, saved, launch)
    if counts is None:
        return None
    total = before.lr_sum
    for count in counts:
        rate = rates.at(count)
        if other is not None and other.learning_rate.at(count) != rate:
            return None
        total += rate
    return total


def _counts(
    before: Past, previous: Saved | None, saved: Saved, launch: Launch
) -> Iterator[int] | None:
    """Yield the scheduler's count at each step that it has taken between two checkpoints."""
    start, end = before.scheduler_samples, _count(saved)
    consumed = saved.samples - before.samples
    expected = consumed - saved.skipped + (previous.skipped if previous else 0)
    if start is None or end is None:
        return None
    args = saved.args
    if end - start != expected:
        may_overflow = getattr(args, "fp16", False) and not getattr(args, "no_load_optim", False)
        if end == expected:
            start = 0  # the optimizer's state was left behind at the earlier checkpoint
        elif not (may_overflow and 0 <= end - start < expected):
            return None
    if launch.batch.is_constant:
        size = launch.batch.size(before.samples, launch.seq_length)
        return None if (end - start) % size else iter(range(start, end, size))
    return _varied(start, launch, saved.step - before.step) if end - start == consumed else None


def _varied(start: int, launch: Launch, n_steps: int) -> Iterator[int]:
    for size in islice(launch.batches(), n_steps):
        yield start
        start += size


def launch_of_saved(saved: Saved, past: Past) -> Launch:
    """Return the launch that saved a checkpoint, as if it had started at `past`."""
    launch = launch_of_args(saved.args, saved.scheduler or {}, past)
    return replace(launch, past="read in a checkpoint")


def launch_of_job(
    args: Namespace,
    scheduler: Any,
    optimizer: Any,
    past: Past,
    *,
    schedule: str,
    versions: Mapping[str, str],
) -> Launch:
    """Return this job's launch, at its start.

    Args:
        args: Megatron's.
        scheduler: of the learning rate, after a checkpoint has been loaded.
        optimizer: likewise; its first group with the default settings has the rates that count.
        past: of the run.
        schedule: of the probes.
        versions: of the packages.
    """
    group = canonical_group(optimizer) or {}
    state = {name: value for name, value in vars(scheduler).items() if name != "optimizer"}
    state |= {name: group[name] for name in ("max_lr", "min_lr") if group.get(name) is not None}
    launch = launch_of_args(args, state, replace(past, scheduler_samples=int(scheduler.num_steps)))
    if not hasattr(num_microbatches_calculator, "RampupBatchsizeNumMicroBatchesCalculator"):
        # Megatron-core from 0.18 on takes --rampup-batch-size and ignores it.
        launch = replace(launch, batch=replace(launch.batch, rampup_batch_size=None))
    own = secrets.token_hex(8)
    return replace(launch, schedule=schedule, versions=dict(versions), launch_id=own)


def launch_of_args(args: Namespace, scheduler: Mapping[str, Any], past: Past) -> Launch:
    """Return a launch from a job's arguments and what is known of its scheduler."""
    return Launch(
        step=past.step,
        consumed_samples=past.samples,
        consumed_tokens=past.tokens,
        lr_sum=past.lr_sum,
        scheduler_samples=past.scheduler_samples,
        past=past.source,
        seq_length=int(args.seq_length),
        batch=_batch(args),
        learning_rate=_learning_rates(args, scheduler),
        seed=getattr(args, "seed", None),
        layout=_layout(args),
    )


def _batch(args: Namespace) -> Batch:
    rampup = getattr(args, "rampup_batch_size", None)
    ranks = int(args.data_parallel_size) * int(getattr(args, "gtp_weight_remat_size", 1) or 1)
    return Batch(
        global_batch_size=int(args.global_batch_size),
        micro_batch_size=int(args.micro_batch_size),
        data_parallel_size=ranks,
        rampup_batch_size=[int(word) for word in rampup] if rampup else None,
        step_batch_size_schedule=getattr(args, "step_batch_size_schedule", None),
        decrease_batch_size_if_needed=bool(getattr(args, "decrease_batch_size_if_needed", False)),
        # A job that counts in samples has a number of steps too, made from them.
        train_iters=None
        if getattr(args, "train_samples", None)
        else _whole(getattr(args, "train_iters", None)),
        train_samples=_whole(getattr(args, "train_samples", None)),
    )


def _learning_rates(args: Namespace, scheduler: Mapping[str, Any]) -> LearningRates:
    """Return the schedule that Megatron makes of its flags, or that its scheduler is known to have.

    Flags in iterations count in steps of the global batch size.
    """
    in_samples = bool(getattr(args, "train_samples", None))
    unit = "samples" if in_samples else "iters"
    scale = 1 if in_samples else int(args.global_batch_size)
    length = getattr(args, f"lr_decay_{unit}", None) or getattr(args, f"train_{unit}", None) or 0
    fraction = getattr(args, "lr_warmup_fraction", None)
    warmup = getattr(args, f"lr_warmup_{unit}", None) or 0
    wsd = getattr(args, f"lr_wsd_decay_{unit}", None)
    made: dict[str, Any] = {
        "max_lr": args.lr,
        "min_lr": getattr(args, "min_lr", 0.0),
        "init_lr": getattr(args, "lr_warmup_init", 0.0),
        "lr_decay_style": getattr(args, "lr_decay_style", "linear"),
        "lr_warmup_steps": (warmup if fraction is None else fraction * length) * scale,
        "lr_decay_steps": length * scale,
        "wsd_decay_steps": None if wsd is None else wsd * scale,
        "lr_wsd_decay_style": getattr(args, "lr_wsd_decay_style", None),
    }
    held = made | {name: scheduler[name] for name in made if scheduler.get(name) is not None}
    return LearningRates(
        peak=float(held["max_lr"]),
        minimum=float(held["min_lr"] or 0.0),
        initial=float(held["init_lr"] or 0.0),
        decay_style=str(held["lr_decay_style"]),
        warmup_samples=float(held["lr_warmup_steps"]),
        decay_samples=float(held["lr_decay_steps"]),
        wsd_decay_style=held["lr_wsd_decay_style"],
        wsd_decay_samples=_number(held["wsd_decay_steps"]),
        warmup_iters=None if in_samples or fraction is not None else _whole(warmup),
        warmup_fraction=_number(fraction),
        decay_iters=None if in_samples else _whole(length),
        wsd_decay_iters=None if in_samples else _whole(wsd),
        overrides_checkpoint=bool(getattr(args, "override_opt_param_scheduler", False)),
        uses_checkpoint=bool(getattr(args, "use_checkpoint_opt_param_scheduler", False)),
    )


def _whole(value: Any) -> int | None:
    return None if value is None else int(value)


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


_LAYOUT = {
    "world_size": "world_size",
    "tensor": "tensor_model_parallel_size",
    "pipeline": "pipeline_model_parallel_size",
    "virtual_pipeline": "virtual_pipeline_model_parallel_size",
    "context": "context_parallel_size",
    "expert": "expert_model_parallel_size",
    "data": "data_parallel_size",
    "padded_vocab_size": "padded_vocab_size",
}


def _layout(args: Namespace) -> dict[str, int | None]:
    return {name: _whole(getattr(args, flag, None)) for name, flag in _LAYOUT.items()}
