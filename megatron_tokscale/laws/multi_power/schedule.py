"""Loss drop of the multi-power law: a sum over the changes of a learning rate, with derivatives.

Shapes: T steps, I steps with a loss, J changes of the learning rate (or merged ones), B steps of a
block.
"""

from dataclasses import dataclass
from typing import Self

import numpy as np

from megatron_tokscale.core.arrays import Floats, Integers

_BLOCK = 16  # losses at a time: the intermediates then fit the caches
_LOWEST_RATE = 1e-12  # stands for a rate of zero, whose ln and negative powers are infinite


@dataclass(frozen=True)
class LearningRateSchedule:
    """Changes of a learning rate at steps k, and the summed learning rate at steps with a loss.

    Attributes:
        sum_I: summed learning rate up to each step with a loss, the step included.
        fall_J: eta_{k-1} - eta_k, which is not zero; negative where the rate rises.
        log_rate_J: ln eta_k, after the change.
        before_J: summed learning rate before step k.
    """

    sum_I: Floats
    fall_J: Floats
    log_rate_J: Floats
    before_J: Floats

    @classmethod
    def from_rates(cls, rate_T: Floats, step_I: Integers, group: int = 1) -> Self:
        """Return a schedule, with all changes within `group` steps merged into one.

        A merged change lies at the mean place of its changes, weighted by their sizes, so that a
        jump among small changes keeps its place.

        Args:
            rate_T: learning rate of every step from 0 on.
            step_I: steps with a loss.
            group: number of steps; 1 merges nothing.
        """
        sum_T = np.cumsum(rate_T)
        change_J = np.flatnonzero(np.diff(rate_T)) + 1
        first_G = np.flatnonzero(np.diff(change_J // group, prepend=-1))
        fall_J = rate_T[change_J - 1] - rate_T[change_J]

        def total(value_J: Floats) -> Floats:
            return np.asarray(np.add.reduceat(value_J, first_G) if len(first_G) else value_J)

        size_G = total(np.abs(fall_J))
        log_rate_J = np.log(np.maximum(rate_T[change_J], _LOWEST_RATE))
        return cls(
            sum_I=sum_T[step_I],
            fall_J=total(fall_J),
            log_rate_J=total(np.abs(fall_J) * log_rate_J) / size_G,
            before_J=total(np.abs(fall_J) * sum_T[change_J - 1]) / size_G,
        )


def loss_drop(schedule: LearningRateSchedule, c: float, beta: float, gamma: float) -> Floats:
    """Return sum_k (eta_{k-1} - eta_k) G(eta_k^-gamma S_k(t)), and its derivatives.

    Returns:
        (I, 4): the sum, in the unit of the learning rate, and its derivatives by ln C, beta and
            gamma.
    """
    speed_J = c * np.exp(-gamma * schedule.log_rate_J)
    fall_log_rate_J = schedule.fall_J * schedule.log_rate_J
    drop_I4 = np.zeros((len(schedule.sum_I), 4))
    for i in range(0, len(drop_I4), _BLOCK):
        sum_B = schedule.sum_I[i : i + _BLOCK]
        past = int(np.searchsorted(schedule.before_J, sum_B[-1]))
        drop_I4[i : i + _BLOCK] = _drop_block(
            np.maximum(sum_B[:, None] - schedule.before_J[:past], 0) * speed_J[:past],
            schedule.fall_J[:past],
            fall_log_rate_J[:past],
            beta,
        )
    return drop_I4


def _drop_block(x_BJ: Floats, fall_J: Floats, fall_log_rate_J: Floats, beta: float) -> Floats:
    """Return the rows of `loss_drop` for a block of steps.

    x is C eta_k^-gamma S_k, and 0 at a step before k.
    """
    log_BJ = np.log1p(x_BJ)
    left_BJ = np.exp(-beta * log_BJ)
    slope_BJ = beta * left_BJ * x_BJ / (1 + x_BJ)
    return np.stack(
        [
            (1 - left_BJ) @ fall_J,
            slope_BJ @ fall_J,
            (log_BJ * left_BJ) @ fall_J,
            -slope_BJ @ fall_log_rate_J,
        ],
        axis=1,
    )
