"""The inner loops of the fit on a CPU, compiled by numba: one pass over a token's losses.

Each is what `varpro` and `noise` say in torch, which does the same on a GPU; the tests hold the two
to each other. In torch every operation reads and writes all losses of a chunk; here a token's rows
stay in the cache nearest to the core.

Shapes: N tokens, K probe steps, M sigmoids per token, P = 2M searched parameters, L = 1 + M linear
ones, R = 3M + 1 rows, J = 3M + 1 tangents.
"""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic
from numpy.typing import NDArray

Array = NDArray[np.float32]

_F = np.float32
_FAST: dict[str, Any] = {"nogil": True, "fastmath": True, "error_model": "numpy", "cache": True}


@intrinsic
def _as_float(_: Any, bits: Any) -> Any:
    """The float32 whose bits an int32 has."""

    def generate(_: Any, builder: Any, __: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.int32), generate


@njit(inline="always", **_FAST)
def _sigmoid(u: Any) -> Any:
    """1/(1 + exp(-u)) to 2e-7, without branches: 2^i 2^f, with a polynomial for 2^f."""
    t = min(max(u * _F(-1.4426950408889634), _F(-120)), _F(120))
    whole = np.floor(t)
    f = t - whole
    power = _F(2.1866950e-4)
    power = power * f + _F(1.2383843e-3)
    power = power * f + _F(9.6847779e-3)
    power = power * f + _F(5.5480863e-2)
    power = power * f + _F(2.4022984e-1)
    power = power * f + _F(6.9314698e-1)
    power = power * f + _F(1)
    scale = _as_float((np.int32(whole) + np.int32(127)) << np.int32(23))
    return _F(1) / (_F(1) + power * scale)


@njit(inline="always", **_FAST)
def _dot(a: Any, b: Any) -> Any:
    total = _F(0)
    for k in range(a.shape[0]):
        total += a[k] * b[k]
    return total


@njit(inline="always", **_FAST)
def _sum(a: Any) -> Any:
    total = _F(0)
    for k in range(a.shape[0]):
        total += a[k]
    return total


@njit(inline="always", **_FAST)
def _lag_one(a: Any, b: Any) -> Any:
    total = _F(0)
    for k in range(a.shape[0] - 1):
        total += a[k] * b[k + 1]
    return total


@njit(inline="always", **_FAST)
def _fill(
    rows: Any, n: Any, theta: Any, linear: Any, anchor: Any, y: Any, x: Any, weight: Any
) -> None:
    """The rows of `varpro.basis` of token n."""
    n_sigmoids = anchor.shape[0]
    n_probes = x.shape[0]
    residual = rows[3 * n_sigmoids]
    floor = linear[0, n]
    for k in range(n_probes):
        residual[k] = y[n, k] - floor
    for m in range(n_sigmoids):
        at = anchor[m, n]
        narrowness = np.exp(-theta[n_sigmoids + m, n])
        q = (theta[m, n] - at) * narrowness
        drop = linear[1 + m, n]
        s_row, bump_row, width_row = rows[m], rows[n_sigmoids + m], rows[2 * n_sigmoids + m]
        for k in range(n_probes):
            offset = (at - x[k]) * narrowness
            s = _sigmoid(offset + q)
            bump = s * s - s
            s_row[k] = s
            bump_row[k] = bump
            width_row[k] = offset * bump
            residual[k] -= drop * s
    if weight.shape[0]:
        for row in rows:
            for k in range(n_probes):
                row[k] *= weight[n, k]


@njit(**_FAST)
def products(
    theta: Array, linear: Array, anchor: Array, y: Array, x: Array, weight: Array, table: Array
) -> None:
    """`varpro.products` of `varpro.basis`.

    Args:
        theta: theta_PN. linear: linear_LN. anchor: anchor_MN. y: y_NK. x: x_K.
        weight: weight_NK, or of shape (0, 0) if no loss is missing.
        table: filled; of shape (R + 1, R + 1, N).
    """
    n_rows, n_probes = 3 * anchor.shape[0] + 1, x.shape[0]
    rows = np.empty((n_rows, n_probes), np.float32)
    for n in range(y.shape[0]):
        _fill(rows, n, theta, linear, anchor, y, x, weight)
        table[0, 0, n] = _sum(weight[n]) if weight.shape[0] else n_probes
        for i in range(n_rows):
            table[0, 1 + i, n] = table[1 + i, 0, n] = _sum(rows[i])
            for j in range(i + 1):
                table[1 + i, 1 + j, n] = table[1 + j, 1 + i, n] = _dot(rows[i], rows[j])


@njit(inline="always", **_FAST)
def _add_tangent(
    i: Any, n: Any, left: Any, skip: Any, singular: Any, tangent: Any, made_of: Any
) -> None:
    """Token n's i-th tangent, from the row `left`, which it overwrites, and the tangents before."""
    for j in range(made_of.shape[0]):
        made_of[i, j, n] = _F(1) if i == j else _F(0)
    before = _dot(left, left)
    for j in range(i):
        other = tangent[j]
        along = _dot(left, other)
        for k in range(left.shape[0]):
            left[k] -= along * other[k]
        for p in range(j + 1):
            made_of[i, p, n] -= along * made_of[j, p, n]
    after = _dot(left, left)
    length = _F(0)
    if after > singular * singular * before and not skip:
        length = _F(1) / np.sqrt(after)
    for k in range(left.shape[0]):
        tangent[i, k] = left[k] * length
    for p in range(i + 1):
        made_of[i, p, n] *= length


@njit(**_FAST)
def tangents(
    theta: Array,
    linear: Array,
    anchor: Array,
    y: Array,
    x: Array,
    weight: Array,
    skip: NDArray[np.bool_],
    singular: float,
    residual: Array,
    s: Array,
    tangent: Array,
    made_of: Array,
    lag_one: Array,
    residual_lag_one: Array,
) -> None:
    """`noise.Residuals`' residuals and tangents.

    Args:
        theta, linear, anchor, y, x, weight: as in `products`.
        skip: for each of the J rows whether it is left out.
        singular: a row that earlier ones span to this share becomes zero.
        residual: filled, residual_NK. s: filled, the first sigmoid s_NK.
        tangent: filled, tangent_NJK. made_of: filled, weight_JJN. lag_one: filled, lag_one_JJN.
        residual_lag_one: filled, the residuals' sum of lag-one products, of shape (N,).
    """
    n_rows, n_probes = 3 * anchor.shape[0] + 1, x.shape[0]
    rows = np.empty((n_rows, n_probes), np.float32)
    for n in range(y.shape[0]):
        _fill(rows, n, theta, linear, anchor, y, x, weight)
        for k in range(n_probes):
            residual[n, k] = rows[n_rows - 1, k]
            s[n, k] = rows[0, k]
        residual_lag_one[n] = _lag_one(residual[n], residual[n])
        for j in range(n_rows - 1, 0, -1):
            rows[j] = rows[j - 1]
        for k in range(n_probes):
            rows[0, k] = weight[n, k] if weight.shape[0] else _F(1)
        for i in range(n_rows):
            _add_tangent(i, n, rows[i], skip[i], singular, tangent[n], made_of)
            for j in range(i + 1):
                both = _lag_one(tangent[n, i], tangent[n, j])
                both += _lag_one(tangent[n, j], tangent[n, i])
                lag_one[i, j, n] = lag_one[j, i, n] = both * _F(0.5)
