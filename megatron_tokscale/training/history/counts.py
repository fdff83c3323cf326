"""Counts that follow the training: tokens consumed, and the sum of the learning rates."""

import math
from typing import Any

from megatron_tokscale.store import Launch
from megatron_tokscale.training.history.past import Past


class TrainingCounts:
    """Tokens consumed and learning rates summed, from a step of a run on. All ranks hold one."""

    def __init__(self, past: Past, seq_length: int, scheduler: Any = None, optimizer: Any = None):
        """Start at `past`; without a scheduler (for a saved checkpoint) the counts stay."""
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
        """Count a step, if a step was taken since the last call.

        An update that is skipped, for an overflow or by --iterations-to-skip, leaves the scheduler
        where it was: its learning rate is not applied.

        Args:
            samples: training samples consumed by now.
            scheduler: Megatron's scheduler of the learning rate, after the step.
            optimizer: Megatron's optimizer, after the step.
        """
        if self._past.tokens is not None:
            tokens = self._past.tokens + (samples - self._past.samples) * self._seq_length
            if tokens != self._tokens:
                self._tokens, self._tokens_before = tokens, self._tokens
        if int(scheduler.num_steps) != self._scheduled:
            self._sum += self._rate
            self._scheduled = int(scheduler.num_steps)
            self._rate = _rate(scheduler, optimizer)

    def past(self, step: int, samples: int, launches: tuple[Launch, ...]) -> Past:
        """Return the counts as the past of a checkpoint.

        Args:
            step: optimizer steps completed at the checkpoint.
            samples: training samples consumed by then.
            launches: launches of the run, the present one last.
        """
        return Past(
            step=step,
            samples=samples,
            tokens=self._tokens,
            tokens_before=self._tokens_before,
            lr_sum=None if math.isnan(self._sum) else self._sum,
            scheduler_samples=self._scheduled,
            launches=launches,
        )


def learning_rate(optimizer: Any) -> float:
    """Return the learning rate of the next step; NaN if this rank has none."""
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
    """Return the first parameter group with the default settings, whose rate Megatron logs."""
    groups: list[dict[str, Any]] = list(optimizer.param_groups)
    default = [group for group in groups if group.get("default_config", False)]
    return next(iter(default or groups), None)
