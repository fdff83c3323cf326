"""Rows over the probes of one token, for the compiled loops of the fit.

The loops take a token's rows through all steps of a computation before they turn to the next token.
So the rows stay in the cache nearest to the core, where torch would read and write the losses of
all tokens in every operation. All numbers are float32, constants too: a single float64 constant
would turn the arithmetic around it into float64, at half the speed.

rows_RK are the rows of `varpro.basis` of one token, of M sigmoids s(u) with u = (c - x)/w
(docs/references.md 1.4):

    rows 0 to M-1      the sigmoids s(u)
    rows M to 2M-1     s^2 - s = -s'(u)
    rows 2M to 3M-1    the derivatives of the sigmoids by ln w at a fixed q
    row 3M             the residuals: losses less floor, and less drop times sigmoid

q = (c - a)/w is the distance of the midpoint c from its anchor a, in widths. The anchor is the
probe next to the midpoint.

Shapes: N tokens, K probe steps, M sigmoids per token, P = 2M searched parameters, L = 1 + M linear
parameters, R = 3M + 1 rows.
"""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from megatron_tokscale.core.arrays import Floats32
from megatron_tokscale.core.compiled import FAST, compiled

F32 = np.float32


@intrinsic
def _as_float(_: Any, bits: Any) -> Any:
    """Return the float32 that has the bits of an int32.

    The annotations are `Any`, since neither numba nor LLVM has types for these objects.
    """

    def generate(_: Any, builder: Any, __: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.int32), generate


@compiled(inline="always", **FAST)
def sigmoid(u: np.float32) -> np.float32:
    """Return s(u) = 1/(1 + exp(-u)) with an error of at most 2e-7, without branches.

    exp(-u) is 2^t with t = -u/ln 2, computed as 2^i 2^f from the whole part i and the fraction f of
    t. The bits of 2^i come from i alone. 2^f comes from its minimax polynomial of degree 6 on
    [0, 1]. Beyond |t| = 120, where s is 0 or 1 to float32, t is cut off, so that 2^i stays a normal
    float32.
    """
    t = min(max(u * F32(-1.4426950408889634), F32(-120)), F32(120))
    whole = np.floor(t)
    f = t - whole
    power = F32(2.1866950e-4)
    power = power * f + F32(1.2383843e-3)
    power = power * f + F32(9.6847779e-3)
    power = power * f + F32(5.5480863e-2)
    power = power * f + F32(2.4022984e-1)
    power = power * f + F32(6.9314698e-1)
    power = power * f + F32(1)
    scale: np.float32 = _as_float((np.int32(whole) + np.int32(127)) << np.int32(23))
    result: np.float32 = F32(1) / (F32(1) + power * scale)
    return result


# The next functions take a table and the number of a row, not the row itself: numba counts the
# references to a view, which costs more than a sum over the row.


@compiled(inline="always", **FAST)
def dot(rows_RK: Floats32, i: int, j: int) -> np.float32:
    """Return the sum over the probes of row i times row j."""
    total = F32(0)
    for k in range(rows_RK.shape[1]):
        total += rows_RK[i, k] * rows_RK[j, k]
    return total


@compiled(inline="always", **FAST)
def total_of(rows_RK: Floats32, i: int) -> np.float32:
    """Return the sum of row i over the probes."""
    total = F32(0)
    for k in range(rows_RK.shape[1]):
        total += rows_RK[i, k]
    return total


@compiled(inline="always", **FAST)
def lag_one(rows_RK: Floats32, i: int, j: int) -> np.float32:
    """Return the sum over the probes of row i times row j one probe later."""
    total = F32(0)
    for k in range(rows_RK.shape[1] - 1):
        total += rows_RK[i, k] * rows_RK[j, k + 1]
    return total


@compiled(inline="always", **FAST)
def nearest_probe(x_K: Floats32, midpoint: np.float32) -> np.float32:
    """Return the x of the probe next to a midpoint, by bisection, as `varpro.anchor`."""
    low, high = 0, x_K.shape[0] - 1
    while low < high:
        middle = (low + high) // 2
        if (x_K[middle] + x_K[middle + 1]) * F32(0.5) < midpoint:
            low = middle + 1
        else:
            high = middle
    nearest: np.float32 = x_K[low]
    return nearest


@compiled(inline="always", **FAST)
def fill_rows(
    rows_RK: Floats32,
    n: int,
    y_NK: Floats32,
    x_K: Floats32,
    weight_NK: Floats32,
    theta_P: Floats32,
    linear_L: Floats32,
    anchor_M: Floats32,
) -> None:
    """Fill `rows_RK` with the rows of token n; they are zero where a loss is missing."""
    n_sigmoids, n_probes = anchor_M.shape[0], x_K.shape[0]
    last = 3 * n_sigmoids
    floor = linear_L[0]
    for k in range(n_probes):
        rows_RK[last, k] = y_NK[n, k] - floor
    for m in range(n_sigmoids):
        anchor = anchor_M[m]
        narrowness = np.exp(-theta_P[n_sigmoids + m])
        q = (theta_P[m] - anchor) * narrowness
        drop = linear_L[1 + m]
        for k in range(n_probes):
            offset = (anchor - x_K[k]) * narrowness
            s = sigmoid(offset + q)
            bump = s * s - s
            rows_RK[m, k] = s
            rows_RK[n_sigmoids + m, k] = bump
            rows_RK[2 * n_sigmoids + m, k] = offset * bump
            rows_RK[last, k] -= drop * s
    if weight_NK.shape[0]:
        for i in range(last + 1):
            for k in range(n_probes):
                rows_RK[i, k] *= weight_NK[n, k]


@compiled(inline="always", **FAST)
def multiply_rows(rows_RK: Floats32, n: int, weight_NK: Floats32, table: Floats32) -> None:
    """Fill `table`, of shape (R + 1, R + 1), with the `varpro.products` of token n's rows.

    Its first row and column are of a row of ones, which `rows_RK` does not hold.
    """
    table[0, 0] = total_of(weight_NK, n) if weight_NK.shape[0] else rows_RK.shape[1]
    for i in range(rows_RK.shape[0]):
        table[0, 1 + i] = table[1 + i, 0] = total_of(rows_RK, i)
        for j in range(i + 1):
            table[1 + i, 1 + j] = table[1 + j, 1 + i] = dot(rows_RK, i, j)
