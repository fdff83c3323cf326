"""Losses over the sum of the learning rates, tau: checked once, and from where on they are fitted.

Shapes: K probe steps.
"""

import numpy as np
from numpy.typing import ArrayLike

from megatron_tokscale.core.arrays import Floats, Mask
from megatron_tokscale.core.errors import TokscaleError, UndefinedError

ONE_THIRD = 1 / 3
_ROUNDING = 1e-8


def checked(lr_sum_K: ArrayLike, loss_K: ArrayLike) -> tuple[Floats, Floats]:
    """tau and losses whose last axis is that of tau.

    Raises:
        TokscaleError: the arguments do not fit together.
        UndefinedError: shapes that do not fit together, tau that does not ascend, losses that are
            not finite and positive.
    """
    tau_K, loss = np.asarray(lr_sum_K, dtype=np.float64), np.asarray(loss_K, dtype=np.float64)
    if tau_K.ndim != 1 or not len(tau_K) or loss.shape[-1:] != tau_K.shape:
        raise TokscaleError(
            f"sums of learning rates of shape {tau_K.shape} do not go with losses of shape "
            f"{loss.shape}; give one sum per probe"
        )
    if not np.isfinite(tau_K).all() or tau_K[0] < 0 or (np.diff(tau_K) <= 0).any():
        raise UndefinedError(
            "sums of learning rates must be finite and ascend from 0 or later; sort the probes and "
            "leave out those at a learning rate of 0"
        )
    if not (np.isfinite(loss) & (loss > 0)).all():
        raise UndefinedError(
            "a power law needs finite, positive losses; leave out the probes that have none"
        )
    return tau_K, loss


def from_tau(tau_K: Floats, start: float, least: int) -> Mask:
    """Mask of the probes from `start` on; tau of 0 is none of them.

    Raises:
        UndefinedError: fewer than `least`.
    """
    fitted_K = (tau_K > 0) & (tau_K >= start * (1 - _ROUNDING))
    if fitted_K.sum() < least:
        raise UndefinedError(
            f"{fitted_K.sum()} probes from tau {start:g} on are too few, {least} are needed; fit "
            "from an earlier tau, take fewer blocks or probe more often"
        )
    return np.asarray(fitted_K)
