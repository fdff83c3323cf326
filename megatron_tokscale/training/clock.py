"""Training time as the learning rate counts it."""

import copy
from argparse import Namespace
from typing import Any


class LearningRateSum:
    """The sum of the learning rates of all steps taken, from the state of the scheduler alone.

    So a resumed job has it without having stored it. NaN where the batch size changes during
    training: the scheduler counts samples, and the steps taken do not follow from them.
    """

    def __init__(self, args: Namespace):
        self._increment = args.global_batch_size
        self._is_known = not (
            getattr(args, "rampup_batch_size", None)
            or getattr(args, "step_batch_size_schedule", None)
        )
        self._steps = 0
        self._sum = 0.0

    def __call__(self, scheduler: Any, optimizer: Any) -> float:
        """Bring the sum up to the steps that `scheduler` has taken."""
        group = _canonical_group(optimizer)
        if not self._is_known or group is None:
            return float("nan")
        past = copy.copy(scheduler)
        while self._steps < scheduler.num_steps // self._increment:
            past.num_steps = self._steps * self._increment
            self._sum += float(past.get_lr(group))
            self._steps += 1
        return self._sum


def learning_rate(optimizer: Any) -> float:
    """Learning rate of the next step; NaN if this rank knows none."""
    group = _canonical_group(optimizer)
    return float("nan") if group is None else float(group["lr"])


def _canonical_group(optimizer: Any) -> dict[str, Any] | None:
    """The first parameter group with the default settings, whose rate Megatron logs."""
    groups: list[dict[str, Any]] = list(optimizer.param_groups)
    default = [group for group in groups if group.get("default_config", False)]
    return next(iter(default or groups), None)
