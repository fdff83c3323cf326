"""The inner loops of the fit on a CPU, compiled by numba: one pass over a token's losses.

Each computes what a function of `varpro` or `noise` computes in torch on a GPU; the tests hold the
two to each other. In torch every operation reads and writes all losses of a chunk; here a token's
rows stay in the cache nearest to the core. All numbers are float32, constants included: a float64
one would double the work.

Shapes: N tokens, K probe steps, M sigmoids per token, P = 2M searched parameters, L = 1 + M linear
ones, R = 3M + 1 rows, J = 3M + 1 tangents.
"""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from megatron_tokscale.core.arrays import Floats32
from megatron_tokscale.core.compiled import FAST, compiled

_F = np.float32


@intrinsic
def _as_float(_: Any, bits: Any) -> Any:
    """Return the float32 that has the bits of an int32. Numba and LLVM type none of their
    objects."""

    def generate(_: Any, builder: Any, __: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.int32), generate


@compiled(inline="always", **FAST)
def sigmoid(u: np.float32) -> np.float32:
    """Return 1/(1 + exp(-u)) to 2e-7, without branches: 2^i 2^f, with a polynomial for 2^f.

    The factor is -1/ln 2; within 120 in its units, 2^i is a normal float32; the coefficients are of
    a minimax polynomial of degree 6 for 2^f on [0, 1].
    """
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
    scale: np.float32 = _as_float((np.int32(whole) + np.int32(127)) << np.int32(23))
    result: np.float32 = _F(1) / (_F(1) + power * scale)
    return result


# Rows are passed by their number: numba counts the references of a view, which costs more than a
# sum over the row.
@compiled(inline="always", **FAST)
def _dot(rows: Floats32, i: int, j: int) -> np.float32:
    total = _F(0)
    for k in range(rows.shape[1]):
        total += rows[i, k] * rows[j, k]
    return total


@compiled(inline="always", **FAST)
def _sum(rows: Floats32, i: int) -> np.float32:
    total = _F(0)
    for k in range(rows.shape[1]):
        total += rows[i, k]
    return total


@compiled(inline="always", **FAST)
def _lag_one(rows: Floats32, i: int, j: int) -> np.float32:
    total = _F(0)
    for k in range(rows.shape[1] - 1):
        total += rows[i, k] * rows[j, k + 1]
    return total


@compiled(inline="always", **FAST)
def _fill(
    rows: Floats32,
    n: int,
    y: Floats32,
    x: Floats32,
    weight: Floats32,
    theta: Floats32,
    linear: Floats32,
    anchor: Floats32,
) -> None:
    """Fill `rows` with the rows of `varpro.basis` of token n."""
    n_sigmoids, n_probes = anchor.shape[0], x.shape[0]
    last = 3 * n_sigmoids
    floor = linear[0]
    for k in range(n_probes):
        rows[last, k] = y[n, k] - floor
    for m in range(n_sigmoids):
        at = anchor[m]
        narrowness = np.exp(-theta[n_sigmoids + m])
        q = (theta[m] - at) * narrowness
        drop = linear[1 + m]
        for k in range(n_probes):
            offset = (at - x[k]) * narrowness
            s = sigmoid(offset + q)
            bump = s * s - s
            rows[m, k] = s
            rows[n_sigmoids + m, k] = bump
            rows[2 * n_sigmoids + m, k] = offset * bump
            rows[last, k] -= drop * s
    if weight.shape[0]:
        for i in range(last + 1):
            for k in range(n_probes):
                rows[i, k] *= weight[n, k]


@compiled(inline="always", **FAST)
def _nearest(x: Floats32, midpoint: np.float32) -> np.float32:
    """Return the x of the probe next to a midpoint (`varpro.anchor`), by bisection."""
    low, high = 0, x.shape[0] - 1
    while low < high:
        middle = (low + high) // 2
        if (x[middle] + x[middle + 1]) * _F(0.5) < midpoint:
            low = middle + 1
        else:
            high = middle
    nearest: np.float32 = x[low]
    return nearest


@compiled(inline="always", **FAST)
def _multiply(rows: Floats32, n: int, weight: Floats32, table: Floats32) -> None:
    """Fill `table` with the products of `varpro.products` of token n."""
    table[0, 0] = _sum(weight, n) if weight.shape[0] else rows.shape[1]
    for i in range(rows.shape[0]):
        table[0, 1 + i] = table[1 + i, 0] = _sum(rows, i)
        for j in range(i + 1):
            table[1 + i, 1 + j] = table[1 + j, 1 + i] = _dot(rows, i, j)


@compiled(**FAST)
def products(
    theta: Floats32,
    linear: Floats32,
    anchor: Floats32,
    y: Floats32,
    x: Floats32,
    weight: Floats32,
    table: Floats32,
) -> None:
    """Fill `table` with `varpro.products` of `varpro.basis`.

    Args:
        theta: theta_PN.
        linear: linear_LN.
        anchor: anchor_MN.
        y: y_NK.
        x: x_K.
        weight: weight_NK, or of shape (0, 1) if no loss is missing.
        table: of shape (R + 1, R + 1, N); filled.
    """
    rows = np.empty((3 * anchor.shape[0] + 1, x.shape[0]), np.float32)
    own = np.empty(table.shape[:2], np.float32)
    for n in range(y.shape[0]):
        _fill(rows, n, y, x, weight, theta[:, n], linear[:, n], anchor[:, n])
        _multiply(rows, n, weight, own)
        table[:, :, n] = own


@compiled(**FAST)
def _evaluate(
    n: int,
    y: Floats32,
    x: Floats32,
    weight: Floats32,
    theta: Floats32,
    linear: Floats32,
    anchor: Floats32,
    singular: np.float32,
    rows: Floats32,
    table: Floats32,
    curvature: Floats32,
    descent: Floats32,
) -> np.float32:
    """Return token n's SSE as `varpro.evaluate`; fill linear, anchor, curvature, descent."""
    # Rows and their products at the anchors of theta.
    n_sigmoids = anchor.shape[0]
    n_linear, last = 1 + n_sigmoids, 3 * n_sigmoids + 1
    for m in range(n_sigmoids):
        anchor[m] = _nearest(x, theta[m])
    _fill(rows, n, y, x, weight, theta, linear, anchor)
    _multiply(rows, n, weight, table)
    # Eliminate floor and drops; solve for them.
    for p in range(n_linear):
        usable = table[p, p] > singular * _F(x.shape[0])
        scale = _F(1) / table[p, p] if usable else _F(0)
        for q in range(p + 1, last + 1):
            table[p, q] *= scale
        for i in range(p + 1, last + 1):
            for q in range(p + 1, last + 1):
                table[i, q] -= table[i, p] * table[p, q]
    for p in range(n_linear - 1, -1, -1):
        for q in range(p + 1, n_linear):
            table[p, last] -= table[p, q] * table[q, last]
        linear[p] += table[p, last]
    # Curvature and descent, from the remaining products.
    for i in range(2 * n_sigmoids):
        slope = -linear[1 + i] if i < n_sigmoids else linear[1 + i - n_sigmoids]
        descent[i] = slope * table[n_linear + i, last]
        for j in range(2 * n_sigmoids):
            other = -linear[1 + j] if j < n_sigmoids else linear[1 + j - n_sigmoids]
            curvature[i, j] = slope * other * table[n_linear + i, n_linear + j]
    return max(table[last, last], _F(0))


@compiled(**FAST)
def _step(
    theta: Floats32,
    curvature: Floats32,
    descent: Floats32,
    sse: np.float32,
    damping: np.float32,
    flat: np.float32,
    box: Floats32,
    system: Floats32,
    step: Floats32,
) -> np.float32:
    """Fill `step` with the Marquardt step of one token; return the decrease of the SSE it
    promises."""
    # A parameter at a bound that the descent would cross stays fixed; the others are free.
    size = theta.shape[0]
    for i in range(size):
        low, high = (box[0], box[1]) if i < size // 2 else (box[2], box[3])
        held = (theta[i] <= low and descent[i] < 0) or (theta[i] >= high and descent[i] > 0)
        step[i] = _F(0) if held else _F(1)
    # Curvature, damped; solved by Gauss-Jordan elimination.
    for i in range(size):
        for j in range(size):
            system[i, j] = curvature[i, j] * step[i] * step[j]
        system[i, i] += system[i, i] * damping + flat * sse + (_F(1) - step[i])
        system[i, size] = descent[i] * step[i]
    for p in range(size):
        scale = _F(1) / max(system[p, p], _F(1e-30))
        for q in range(p, size + 1):
            system[p, q] *= scale
        for i in range(size):
            if i != p:
                factor = system[i, p]
                for q in range(p, size + 1):
                    system[i, q] -= factor * system[p, q]
    promised = _F(0)
    for i in range(size):
        promised += system[i, size] * descent[i] * step[i]
        step[i] = system[i, size]
    return promised


@compiled(**FAST)
def descend(
    theta: Floats32,
    linear: Floats32,
    y: Floats32,
    x: Floats32,
    weight: Floats32,
    box: Floats32,
    settings: Floats32,
    steps: int,
    anchor: Floats32,
    sse: Floats32,
    curvature: Floats32,
    descent: Floats32,
) -> int:
    """Descend as `varpro.descend`, until each token has converged or has taken `steps` steps.

    Args:
        theta: theta_PN, the start; replaced by the end of the descent.
        linear: linear_LN, a guess; replaced by the best floor and drops.
        y: y_NK.
        x: x_K.
        weight: as in `products`.
        box: bounds of a midpoint, then of a log-width.
        settings: `varpro.KERNEL_SETTINGS`.
        steps: most steps of a token.
        anchor: filled; this and the next are fields of `varpro.Search`.
        sse: filled.
        curvature: filled.
        descent: filled.

    Returns:
        The number of evaluations of all tokens.
    """
    n_parameters, n_sigmoids, evaluations = theta.shape[0], theta.shape[0] // 2, y.shape[0]
    singular, flat, longest, enough = settings[:4]
    least_damping, most_damping, fall, rise, least_raised, longest_stretch = settings[4:]
    size = 3 * n_sigmoids + 2
    rows = np.empty((size - 1, x.shape[0]), np.float32)
    table = np.empty((size, size), np.float32)
    system = np.empty((n_parameters, n_parameters + 1), np.float32)
    step, at, to, slope, new_slope = np.empty((5, n_parameters), np.float32)
    best, guess = np.empty((2, 1 + n_sigmoids), np.float32)
    by, near = np.empty((2, n_sigmoids), np.float32)
    has_moved: bool | np.bool_
    bend, new_bend = np.empty((2, n_parameters, n_parameters), np.float32)
    for n in range(y.shape[0]):
        for i in range(n_parameters):
            at[i] = theta[i, n]
        for i in range(1 + n_sigmoids):
            best[i] = linear[i, n]
        cost = _evaluate(n, y, x, weight, at, best, by, singular, rows, table, bend, slope)
        damping, stretch, has_moved = least_damping, _F(1), True
        for _ in range(steps):
            # Stop where an undamped step would lower the SSE too little.
            if has_moved and (
                _step(at, bend, slope, cost, _F(0), flat, box, system, step) <= enough * cost
            ):
                break
            # The damped step, stretched and bounded, as midpoints and log-widths within the box.
            _step(at, bend, slope, cost, damping, flat, box, system, step)
            along, curved = _F(0), _F(0)
            for i in range(n_parameters):
                step[i] = min(max(step[i] * stretch, -longest), longest)
                along += step[i] * slope[i]
            for i in range(n_parameters):
                for j in range(n_parameters):
                    curved += step[i] * bend[i, j] * step[j]
            for m in range(n_sigmoids):
                log_width = at[n_sigmoids + m]
                q = (at[m] - by[m]) * np.exp(-log_width) + step[m]
                log_width = min(max(log_width + step[n_sigmoids + m], box[2]), box[3])
                to[n_sigmoids + m] = log_width
                to[m] = min(max(by[m] + q * np.exp(log_width), box[0]), box[1])
            guess[:] = best
            new_cost = _evaluate(
                n, y, x, weight, to, guess, near, singular, rows, table, new_bend, new_slope
            )
            evaluations += 1
            # Take it if the SSE falls; set damping and stretch by the ratio of the curvatures.
            gain = cost - new_cost
            has_moved = gain > 0
            if has_moved:
                ratio = (_F(2) * along - gain) / max(curved, _F(1e-30))
                damping = max(damping / fall, min(max(ratio - _F(1), least_damping), most_damping))
                stretch = min(max(_F(1) / max(ratio, _F(1e-30)), _F(1)), longest_stretch)
                at[:], best[:], by[:], cost = to, guess, near, new_cost
                bend[:], slope[:] = new_bend, new_slope
            else:
                damping, stretch = rise * max(damping, least_raised), _F(1)
        theta[:, n], linear[:, n], anchor[:, n], sse[n] = at, best, by, cost
        curvature[:, :, n], descent[:, n] = bend, slope
    return int(evaluations)


@compiled(inline="always", **FAST)
def _add_tangent(
    i: int, n: int, rows: Floats32, singular: np.float32, tangent_weight: Floats32
) -> None:
    """Replace row i by token n's i-th tangent, from the row and the tangents before it."""
    n_probes = rows.shape[1]
    for j in range(tangent_weight.shape[0]):
        tangent_weight[i, j, n] = _F(1) if i == j else _F(0)
    before = _dot(rows, i, i)
    for j in range(i):
        along = _dot(rows, i, j)
        for k in range(n_probes):
            rows[i, k] -= along * rows[j, k]
        for p in range(j + 1):
            tangent_weight[i, p, n] -= along * tangent_weight[j, p, n]
    after = _dot(rows, i, i)
    length = _F(0)
    # The second condition keeps the order of the compiled sums, on which the last digits depend.
    if after > singular * singular * before and after > _F(0):
        length = _F(1) / np.sqrt(after)
    for k in range(n_probes):
        rows[i, k] *= length
    for p in range(i + 1):
        tangent_weight[i, p, n] *= length


@compiled(**FAST)
def tangents(
    theta: Floats32,
    linear: Floats32,
    anchor: Floats32,
    y: Floats32,
    x: Floats32,
    weight: Floats32,
    singular: float,
    residual: Floats32,
    s: Floats32,
    tangent: Floats32,
    tangent_weight: Floats32,
    lag_one: Floats32,
    residual_lag_one: Floats32,
) -> None:
    """Fill in the residuals and tangents of `noise.Residuals`.

    Args:
        theta: theta_PN.
        linear: linear_LN.
        anchor: anchor_MN.
        y: y_NK.
        x: x_K.
        weight: as in `products`.
        singular: a row that earlier ones span to this share becomes zero.
        residual: residual_NK; filled.
        s: the first sigmoid s_NK; filled.
        tangent: tangent_NJK; filled.
        tangent_weight: weight_JJN; filled.
        lag_one: lag_one_JJN; filled.
        residual_lag_one: the residuals' sum of lag-one products, of shape (N,); filled.
    """
    n_rows, n_probes = 3 * anchor.shape[0] + 1, x.shape[0]
    rows = np.empty((n_rows, n_probes), np.float32)
    for n in range(y.shape[0]):
        _fill(rows, n, y, x, weight, theta[:, n], linear[:, n], anchor[:, n])
        for k in range(n_probes):
            residual[n, k] = rows[n_rows - 1, k]
            s[n, k] = rows[0, k]
        residual_lag_one[n] = _lag_one(residual, n, n)
        for j in range(n_rows - 1, 0, -1):
            for k in range(n_probes):
                rows[j, k] = rows[j - 1, k]
        for k in range(n_probes):
            rows[0, k] = weight[n, k] if weight.shape[0] else _F(1)
        for i in range(n_rows):
            _add_tangent(i, n, rows, singular, tangent_weight)
            for k in range(n_probes):
                tangent[n, i, k] = rows[i, k]
            for j in range(i + 1):
                both = _lag_one(rows, i, j) + _lag_one(rows, j, i)
                lag_one[i, j, n] = lag_one[j, i, n] = both * _F(0.5)
