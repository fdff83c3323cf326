"""Progress of a run by a step: tokens consumed, and the sum of the learning rates.

Both are counted as the steps are taken. What was before the job's first step comes from a note
that the plugin leaves in each checkpoint, or is reckoned from the settings that a checkpoint
holds (`reckon.py`), or is unknown; never from the job's own flags.
"""

import math
from argparse import Namespace
from dataclasses import dataclass, replace
from typing import Any

from megatron_tokscale.store import Launch
from megatron_tokscale.store.launches import read_launches

NOTE = "tokscale_history"
"""Attribute of Megatron's args under which a checkpoint holds the plugin's note."""


@dataclass(frozen=True, kw_only=True)
class Past:
    """Counts of a run up to a step.

    Attributes:
        step: optimizer steps completed.
        samples: training samples consumed.
        tokens: training tokens consumed; None if unknown.
        tokens_before: those consumed before the last step; None if unknown.
        lr_sum: sum of the learning rates of the steps taken; None if unknown.
        scheduler_samples: count of the learning rate's scheduler; None if unknown.
        launches: that took the steps, ascending; empty if unknown.
        source: where the counts are from, in words.
    """

    step: int
    samples: int
    tokens: int | None = None
    tokens_before: int | None = None
    lr_sum: float | None = None
    scheduler_samples: int | None = None
    launches: tuple[Launch, ...] = ()
    source: str = "unknown"

    def to_json(self) -> dict[str, Any]:
        """Return the counts and launches as plain values."""
        return {**vars(self), "launches": [launch.to_json() for launch in self.launches]}

    @staticmethod
    def from_json(content: Any) -> "Past":
        """Read counts and launches from plain values.

        Raises:
            TypeError, ValueError: they are not of this form.
        """
        row = dict(content)
        launches = read_launches(row["launches"]) if row.get("launches") else ()
        return Past(**{**row, "launches": launches})


def beginning(samples: int) -> Past:
    """Return the past of a run whose first step is still to come."""
    return Past(
        step=0,
        samples=samples,
        tokens=0,
        tokens_before=-1,
        lr_sum=0.0,
        scheduler_samples=0,
        source="the run's first job",
    )


def noted(args: Namespace, step: int, samples: int) -> Past | None:
    """Return the past that the plugin has noted in the args of a checkpoint; None without a note.

    Args:
        args: those that the checkpoint holds.
        step: which step the checkpoint is of.
        samples: consumed by then; a note of another moment is none.
    """
    try:
        past = Past.from_json(getattr(args, NOTE, None))
    except (KeyError, TypeError, ValueError):
        return None
    if (past.step, past.samples) != (step, samples):
        return None
    # A launch that starts at this very step has taken none of those before.
    launches = tuple(launch for launch in past.launches if launch.step < step)
    return replace(past, launches=launches, source="the checkpoint")


class Clock:
    """Counts tokens and learning rates from one step of a run on. All ranks hold one."""

    def __init__(self, past: Past, seq_length: int, scheduler: Any = None, optimizer: Any = None):
        """Start at `past`; without a scheduler, of a saved checkpoint, nothing goes on."""
        self._past = past
        self._seq_length = seq_length
        self._tokens = past.tokens
        self._tokens_before = past.tokens_before
        self._sum = math.nan if past.lr_sum is None else past.lr_sum
        self._scheduled = int(scheduler.num_steps) if scheduler is not None else 0
        self._rate = math.nan if scheduler is None else _rate(scheduler, optimizer)

    @property
    def tokens(self) -> int | None:
        """Training tokens consumed; None if unknown."""
        return self._tokens

    @property
    def tokens_before(self) -> int | None:
        """Training tokens consumed before the last step; None if unknown."""
        return self._tokens_before

    @property
    def lr_sum(self) -> float:
        """Sum of the learning rates of the steps taken; NaN if unknown."""
        return self._sum

    def advance(self, samples: int, scheduler: Any, optimizer: Any) -> None:
        """Count a step, if one was taken since the last call.

        An update that is skipped, for an overflow or by --iterations-to-skip, leaves the scheduler
        where it was: its learning rate is not applied.

        Args:
            samples: training samples consumed by now.
            scheduler: of the learning rate, after the step.
            optimizer: likewise.
        """
        if self._past.tokens is not None:
            tokens = self._past.tokens + (samples - self._past.samples) * self._seq_length
            if tokens != self._tokens:
                self._tokens, self._tokens_before = tokens, self._tokens
        if int(scheduler.num_steps) != self._scheduled:
            self._sum += self._rate
            self._scheduled = int(scheduler.num_steps)
            self._rate = _rate(scheduler, optimizer)

    def note(self, step: int, samples: int, launches: tuple[Launch, ...]) -> dict[str, Any]:
        """Return what a checkpoint is to hold of the past, as plain values."""
        return Past(
            step=step,
            samples=samples,
            tokens=self._tokens,
            tokens_before=self._tokens_before,
            lr_sum=None if math.isnan(self._sum) else self._sum,
            scheduler_samples=self._scheduled,
            launches=launches,
        ).to_json()


def learning_rate(optimizer: Any) -> float:
    """Learning rate of the next step; NaN if this rank knows none."""
    group = canonical_group(optimizer)
    return float("nan") if group is None else float(group["lr"])


def _rate(scheduler: Any, optimizer: Any) -> float:
    """Return the rate of the next step without a read from the device."""
    group = canonical_group(optimizer)
    if group is None:
        return math.nan
    rate = group["lr"]
    return float(rate) if isinstance(rate, float | int) else float(scheduler.get_lr(group))


def canonical_group(optimizer: Any) -> dict[str, Any] | None:
    """The first parameter group with the default settings, whose rate Megatron logs."""
    groups: list[dict[str, Any]] = list(optimizer.param_groups)
    default = [group for group in groups if group.get("default_config", False)]
    return next(iter(default or groups), None)
