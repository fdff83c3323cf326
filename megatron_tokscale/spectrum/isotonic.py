"""Isotonic regression of losses over an axis: the closest losses that never rise along it.

Along D or M every value is another run, and there are few of them. A sigmoid per token would have
as many parameters as there are losses; an isotonic regression has none to choose.

Shapes: N tokens, K columns, V distinct values of the axis, ascending, J of them from one on;
I runs, S different sizes, ascending.
"""

import numpy as np
from numpy.typing import ArrayLike

from megatron_tokscale.core.arrays import Floats, Floats32
from megatron_tokscale.core.errors import UndefinedError


def isotonic(loss_NV: Floats | Floats32, weight_V: Floats) -> Floats:
    """Return the closest losses that never rise along the axis, (N, V), by weighted least squares.

    By the formula of minima and maxima of means (Robertson, Wright and Dykstra 1988, 1.4): the
    value at k is the least over i <= k of the greatest over j >= k of the mean from i to j.
    """
    n, n_values = loss_NV.shape
    sum_NV = np.concatenate([np.zeros((n, 1)), np.cumsum(loss_NV * weight_V, axis=1)], axis=1)
    weight = np.concatenate([[0.0], np.cumsum(weight_V)])
    value_NV = np.full((n, n_values), np.inf)
    for i in range(n_values):
        mean_NJ = (sum_NV[:, i + 1 :] - sum_NV[:, i : i + 1]) / (weight[i + 1 :] - weight[i])
        greatest_NJ = np.maximum.accumulate(mean_NJ[:, ::-1], axis=1)[:, ::-1]
        value_NV[:, i:] = np.minimum(value_NV[:, i:], greatest_NJ)
    return value_NV


def threshold_times(value_K: ArrayLike, loss_NK: ArrayLike, threshold: float) -> Floats:
    """Return the smallest value at which the isotonic regression of each token is low enough.

    The regression is the least-squares fit that never rises along the axis; columns with equal
    values are pooled. It need not be computed: the values at which it is above the threshold are
    the prefix with the largest sum of (loss - threshold), and the shortest such prefix (Barlow et
    al. 1972, Statistical Inference under Order Restrictions, section 1.2).

    Args:
        value_K: value of the axis of each column, ascending; equal values are allowed.
        loss_NK: finite losses in nats.
        threshold: the highest loss that is low enough, in nats.

    Returns:
        A value of the axis per token; infinity where the regression is above the threshold at the
        largest value.
    """
    value_V, first_V = np.unique(np.asarray(value_K, np.float64), return_index=True)
    excess_NK = np.asarray(loss_NK, np.float64) - threshold
    sum_NV = np.add.reduceat(excess_NK, first_V, axis=1).cumsum(axis=1)
    # Place of the largest sum over a prefix, the empty one included.
    prefix_N = np.concatenate([np.zeros((len(sum_NV), 1)), sum_NV], axis=1).argmax(axis=1)
    return np.append(value_V, np.inf)[prefix_N]


def size_thresholds(log_size_I: Floats, loss_NI: Floats32) -> tuple[Floats, Floats]:
    """Return per token the ln size at which half of its fall over sizes is done, and the fall.

    Losses of runs of one size are averaged.

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
