"""Fall of each token's last loss over the sizes, and the size at which half of it is done.

They need no fit: the losses are made to descend with size (isotonic regression), and the size at
which half of the fall is done is read off. Runs of one size are averaged.

Shapes: N tokens, I runs, S different sizes, ascending.
"""

import numpy as np

from megatron_tokscale.core.arrays import Floats, Floats32
from megatron_tokscale.core.errors import UndefinedError
from megatron_tokscale.spectrum.isotonic import isotonic


def size_thresholds(log_size_I: Floats, loss_NI: Floats32) -> tuple[Floats, Floats]:
    """Return per token the ln size at which half of its fall over sizes is done, and the fall.

    Returns:
        The ln size, interpolated between runs; NaN for a token that does not fall. The fall in
        nats.

    Raises:
        UndefinedError: all runs have one size.
    """
    size_S, of_I, count_S = np.unique(log_size_I, return_inverse=True, return_counts=True)
    if len(size_S) < 2:
        raise UndefinedError("all runs have one size; a threshold needs two or more")
    loss_NS = np.stack([loss_NI[:, of_I == s].mean(axis=1) for s in range(len(size_S))], axis=1)
    value_NS = isotonic(loss_NS, count_S.astype(np.float64))
    fall_N = value_NS[:, 0] - value_NS[:, -1]
    half_N = (value_NS[:, 0] + value_NS[:, -1]) / 2
    after_N = np.maximum((value_NS <= half_N[:, None]).argmax(axis=1), 1)
    row_N = np.arange(len(value_NS))
    above_N, below_N = value_NS[row_N, after_N - 1], value_NS[row_N, after_N]
    with np.errstate(invalid="ignore", divide="ignore"):
        share_N = (above_N - half_N) / (above_N - below_N)
    at_N = size_S[after_N - 1] + share_N * (size_S[after_N] - size_S[after_N - 1])
    return np.where(fall_N > 0, at_N, np.nan), fall_N
