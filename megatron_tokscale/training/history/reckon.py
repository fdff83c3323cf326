"""The past of a run, from the content of its checkpoints, for steps taken without the plugin.

A checkpoint holds the flags of the job that saved it, the samples consumed by then, and the state
of the learning rate's scheduler. Steps between two checkpoints are reckoned where these agree;
where they do not agree, or where settings changed at an unknown step, the counts are unknown from
there on.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Final

from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.store import Launch, LossRecord
from megatron_tokscale.store.launches import parting
from megatron_tokscale.training.history.launches import launch_of_saved
from megatron_tokscale.training.history.past import Past, beginning, read_note
from megatron_tokscale.training.history.saved import SavedCheckpoint, read_checkpoint

RECKONED: Final = "reckoned from the checkpoint's settings"
"""The source of a reckoned past, in words."""


def past_of_job(
    step: int,
    samples: int,
    saved: SavedCheckpoint | None,
    record: LossRecord | None,
    known: Sequence[Launch],
) -> Past:
    """Return the past of a run when a job starts or resumes.

    Args:
        step: optimizer steps completed.
        samples: training samples consumed.
        saved: content of the checkpoint that the job has loaded.
        record: record of the losses at that step in the job's run directory.
        known: launches in the run directory.
    """
    if step == 0:
        return beginning(samples)
    past = Past(step=step, samples=samples)
    if saved is not None and (saved.step, saved.samples) != (step, samples):
        saved = None
    if saved is not None:
        past = read_note(saved.args, step, samples) or past
    if not past.launches:
        past = replace(past, launches=tuple(row for row in known if row.step < step))
    is_own = parting(known, past.launches, step) is None
    is_here = record is not None and (record.step, record.consumed_samples) == (step, samples)
    if record is not None and is_here and is_own:
        lr_sum = None if math.isnan(record.lr_sum) else record.lr_sum
        of_losses = replace(past, tokens=record.consumed_tokens, lr_sum=lr_sum)
        past = _completed(past, of_losses, "the losses on disk")
    if saved is not None and (past.tokens is None or past.lr_sum is None):
        reckoned = reckon_or_none(beginning(0), None, saved)
        past = past if reckoned is None else _completed(past, reckoned, RECKONED)
    return past


def _completed(past: Past, other: Past, source: str) -> Past:
    """Fill the unknown counts of a past from another past of the same step."""
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
    """Return the past of a run at each of its checkpoints that can be read.

    Args:
        folder: the --save directory.
        steps: steps of its checkpoints, ascending.
    """
    past, previous = beginning(0), None
    found = {}
    for step in steps:
        saved = read_checkpoint(folder, step)
        if saved is None:
            continue
        new = read_note(saved.args, step, saved.samples) or reckon_or_none(past, previous, saved)
        if new is not None:
            past, previous, found[step] = new, saved, new
    return found


def reckon_or_none(
    before: Past, previous: SavedCheckpoint | None, saved: SavedCheckpoint
) -> Past | None:
    """Return the past by `reckon`; None if the checkpoint lacks some of the settings."""
    try:
        return reckon(before, previous, saved)
    except (AttributeError, TypeError, ValueError, TokscaleError):
        return None


def reckon(before: Past, previous: SavedCheckpoint | None, saved: SavedCheckpoint) -> Past:
    """Return the past at a checkpoint from the past at an earlier one, or at the beginning.

    Args:
        before: the past at the earlier checkpoint.
        previous: content of that checkpoint; None at the beginning.
        saved: content of the later checkpoint.
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
        scheduler_samples=_scheduler_count(saved),
        launches=before.launches if is_same and before.launches else (*before.launches, launch),
    )
    if n_steps <= 0 or not _fits(launch, n_steps, saved.samples):
        return past
    # If only the later settings explain the samples, they changed at the earlier checkpoint.
    is_placed = is_same or (old is not None and not _fits(old, n_steps, saved.samples))
    tokens, tokens_before = None, None
    is_known = is_placed or (old is not None and old.seq_length == launch.seq_length)
    if before.tokens is not None and is_known:
        tokens = before.tokens + (saved.samples - before.samples) * launch.seq_length
        last = _batch_sizes(launch, n_steps)[-1]
        tokens_before = tokens - last * launch.seq_length
    lr_sum = _lr_sum(before, previous, saved, launch, None if is_placed else old)
    return replace(past, tokens=tokens, tokens_before=tokens_before, lr_sum=lr_sum, source=RECKONED)


def _batch_sizes(launch: Launch, n_steps: int) -> list[int]:
    """Return the samples of each of the first `n_steps` steps of a launch."""
    return list(islice(launch.batches(), n_steps))


def _fits(launch: Launch, n_steps: int, samples: int) -> bool:
    """Return whether `n_steps` steps of a launch end at `samples` consumed samples."""
    return launch.consumed_samples + sum(_batch_sizes(launch, n_steps)) == samples


def _with_its_ramp_up(launch: Launch, n_steps: int, samples: int) -> Launch:
    """Return the launch, without its ramp-up if its Megatron version ignores the flag."""
    if launch.batch.rampup_batch_size is None or _fits(launch, n_steps, samples):
        return launch
    plain = replace(launch, batch=replace(launch.batch, rampup_batch_size=None))
    return plain if _fits(plain, n_steps, samples) else launch


def _scheduler_count(saved: SavedCheckpoint) -> int | None:
    """Return the scheduler's count at a checkpoint; None if it is unknown."""
    if saved.scheduler is not None and isinstance(saved.scheduler.get("num_steps"), int):
        return int(saved.scheduler["num_steps"])
    may_differ = any(getattr(saved.args, name, False) for name in ("fp16", "no_load_optim"))
    return None if may_differ else saved.samples - saved.skipped


def _lr_sum(
    before: Past,
    previous: SavedCheckpoint | None,
    saved: SavedCheckpoint,
    launch: Launch,
    other: Launch | None,
) -> float | None:
    """Return the summed learning rate at a checkpoint; None if its settings do not determine it.

    Args:
        before: the past at the previous checkpoint.
        previous: content of the previous checkpoint.
        saved: content of this checkpoint.
        launch: settings that this checkpoint holds.
        other: settings that may have held for an unknown part of the steps.
    """
    rates = launch.learning_rate
    overrides = rates.overrides_checkpoint
    if before.lr_sum is None or (overrides and previous is None):
        return None
    if overrides and previous is not None:
        # Some versions of Megatron keep the rates of the checkpoint's optimizer nevertheless.
        known = launch_of_saved(previous, before).learning_rate
        if (known.peak, known.minimum) != (rates.peak, rates.minimum):
            return None
    counts = _scheduler_counts(before, previous, saved, launch)
    if counts is None:
        return None
    total = before.lr_sum
    for count in counts:
        rate = rates.at(count)
        if other is not None and other.learning_rate.at(count) != rate:
            return None
        total += rate
    return total


def _scheduler_counts(
    before: Past, previous: SavedCheckpoint | None, saved: SavedCheckpoint, launch: Launch
) -> Iterator[int] | None:
    """Return the scheduler's count at each step between two checkpoints; None if unknown."""
    start, end = before.scheduler_samples, _scheduler_count(saved)
    consumed = saved.samples - before.samples
    expected = consumed - saved.skipped + (previous.skipped if previous else 0)
    if start is None or end is None:
        return None
    args = saved.args
    if end - start != expected:
        may_overflow = getattr(args, "fp16", False) and not getattr(args, "no_load_optim", False)
        if end == expected:
            start = 0  # the job did not load the optimizer's state of the earlier checkpoint
        elif not (may_overflow and 0 <= end - start < expected):
            return None
    if launch.batch.is_constant:
        size = launch.batch.size(before.samples, launch.seq_length)
        return None if (end - start) % size else iter(range(start, end, size))
    return (
        _varied_counts(start, launch, saved.step - before.step) if end - start == consumed else None
    )


def _varied_counts(start: int, launch: Launch, n_steps: int) -> Iterator[int]:
    """Yield the scheduler's count at each step of a launch whose batches vary."""
    for size in islice(launch.batches(), n_steps):
        yield start
        start += size
