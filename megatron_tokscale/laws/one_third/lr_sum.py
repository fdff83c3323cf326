"""Checks of losses over tau, the summed learning rate, and the choice of the fitted probes.

Shapes: K probe steps.
"""

import numpy as np
from numpy.typing import ArrayLike

from megatron_tokscale.core.arrays import Floats, Mask
from megatron_tokscale.core.errors import TokscaleError, UndefinedError

_ROUNDING = 1e-8  # largest relative error of tau that counts as no error


def checked_losses(lr_sum_K: ArrayLike, loss_K: ArrayLike) -> tuple[Floats, Floats]:
    """Return tau and the losses in double precision; the last axis of the losses is the probes.

    Raises:
        TokscaleError: the shapes do not fit together.
        UndefinedError: tau does not ascend, or losses are not finite and positive.
    """
    tau_K, loss = np.asarray(lr_sum_K, dtype=np.float64), np.asarray(loss_K, dtype=np.float64)
    if tau_K.ndim != 1 or not len(tau_K) or loss.shape[-1:] != tau_K.shape:
        raise TokscaleError(
            f"summed learning rates are of shape {tau_K.shape} for losses of shape {loss.shape}; "
            "expected one sum per probe"
        )
    if not np.isfinite(tau_K).all() or tau_K[0] < 0 or (np.diff(tau_K) <= 0).any():
        raise UndefinedError(
            "summed learning rates do not ascend from 0 or later, or are not finite; sort the "
            "probes, and leave out probes after steps at a learning rate of 0"
        )
    if not (np.isfinite(loss) & (loss > 0)).all():
        raise UndefinedError(
            "losses are not finite and positive, as a power law needs them; leave out those probes"
        )
    return tau_K, loss


def probes_from(tau_K: Floats, start: float, least: int) -> Mask:
    """Return the mask of the probes from tau = `start` on; a tau of 0 is left out.

    Raises:
        UndefinedError: there are fewer than `least` such probes.
    """
    fitted_K = (tau_K > 0) & (tau_K >= start * (1 - _ROUNDING))
    if fitted_K.sum() < least:
        raise UndefinedError(
            f"{fitted_K.sum()} probes from tau {start:g} on are too few; expected {least} or more; "
            "fit from an earlier tau, take fewer blocks or probe more often"
        )
    return np.asarray(fitted_K)
