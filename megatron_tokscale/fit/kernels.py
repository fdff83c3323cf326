"""The inner loops of the fit on a CPU, compiled by numba: one pass over a token's losses.

`products`, `descend` and `tangents` fill in what functions of `varpro` and `noise` compute in torch
on a GPU; tests compare the two. `kernel_rows` describes the rows that they work on.

Shapes: N tokens, K probe steps, M sigmoids per token, P = 2M searched parameters (M midpoints, then
M log-widths), L = 1 + M linear parameters (floor, then M drops), R = 3M + 1 rows, J = 3M + 1
tangents.
"""

import numpy as np

from megatron_tokscale.core.arrays import Floats32
from megatron_tokscale.core.compiled import FAST, compiled
from megatron_tokscale.fit.kernel_rows import (
    F32,
    dot,
    fill_rows,
    lag_one,
    multiply_rows,
    nearest_probe,
)

_TINY = F32(1e-30)
"""Least denominator, as in `varpro`."""


@compiled(**FAST)
def products(
    theta_PN: Floats32,
    linear_LN: Floats32,
    anchor_MN: Floats32,
    y_NK: Floats32,
    x_K: Floats32,
    weight_NK: Floats32,
    table: Floats32,
) -> None:
    """Fill `table`, of shape (R + 1, R + 1, N), with `varpro.products` of `varpro.basis`.

    `weight_NK` has the shape (0, 1) if no loss is missing, here and in the functions below.
    """
    rows_RK = np.empty((3 * anchor_MN.shape[0] + 1, x_K.shape[0]), np.float32)
    own = np.empty(table.shape[:2], np.float32)
    for n in range(y_NK.shape[0]):
        fill_rows(
            rows_RK, n, y_NK, x_K, weight_NK, theta_PN[:, n], linear_LN[:, n], anchor_MN[:, n]
        )
        multiply_rows(rows_RK, n, weight_NK, own)
        table[:, :, n] = own


@compiled(**FAST)
def _evaluate(
    n: int,
    y_NK: Floats32,
    x_K: Floats32,
    weight_NK: Floats32,
    theta_P: Floats32,
    linear_L: Floats32,
    anchor_M: Floats32,
    singular: np.float32,
    rows_RK: Floats32,
    table: Floats32,
    curvature_PP: Floats32,
    descent_P: Floats32,
) -> np.float32:
    """Return token n's SSE at `theta_P`, as `varpro.evaluate`.

    `linear_L` is a guess of floor and drops, and is replaced by the best ones. `anchor_M`,
    `curvature_PP` and `descent_P` are filled; `rows_RK` and `table` are work space.
    """
    # Rows and their products at the anchors of theta.
    n_sigmoids = anchor_M.shape[0]
    n_linear, last = 1 + n_sigmoids, 3 * n_sigmoids + 1
    for m in range(n_sigmoids):
        anchor_M[m] = nearest_probe(x_K, theta_P[m])
    fill_rows(rows_RK, n, y_NK, x_K, weight_NK, theta_P, linear_L, anchor_M)
    multiply_rows(rows_RK, n, weight_NK, table)
    # Eliminate floor and drops; solve for them. A singular one stays at its guess.
    for p in range(n_linear):
        usable = table[p, p] > singular * F32(x_K.shape[0])
        scale = F32(1) / table[p, p] if usable else F32(0)
        for q in range(p + 1, last + 1):
            table[p, q] *= scale
        for i in range(p + 1, last + 1):
            for q in range(p + 1, last + 1):
                table[i, q] -= table[i, p] * table[p, q]
    for p in range(n_linear - 1, -1, -1):
        for q in range(p + 1, n_linear):
            table[p, last] -= table[p, q] * table[q, last]
        linear_L[p] += table[p, last]
    # Curvature and descent, from the remaining products.
    for i in range(2 * n_sigmoids):
        slope = -linear_L[1 + i] if i < n_sigmoids else linear_L[1 + i - n_sigmoids]
        descent_P[i] = slope * table[n_linear + i, last]
        for j in range(2 * n_sigmoids):
            other = -linear_L[1 + j] if j < n_sigmoids else linear_L[1 + j - n_sigmoids]
            curvature_PP[i, j] = slope * other * table[n_linear + i, n_linear + j]
    return max(table[last, last], F32(0))


@compiled(**FAST)
def _step(
    theta_P: Floats32,
    curvature_PP: Floats32,
    descent_P: Floats32,
    sse: np.float32,
    damping: np.float32,
    flat: np.float32,
    box: Floats32,
    system: Floats32,
    step_P: Floats32,
) -> np.float32:
    """Fill `step_P` with one token's Marquardt step; return the fall of the SSE that it promises.

    `system`, of shape (P, P + 1), is work space.
    """
    # A parameter at a bound that the descent would cross stays fixed; the others are free.
    size = theta_P.shape[0]
    for i in range(size):
        low, high = (box[0], box[1]) if i < size // 2 else (box[2], box[3])
        below = theta_P[i] <= low and descent_P[i] < 0
        above = theta_P[i] >= high and descent_P[i] > 0
        step_P[i] = F32(0) if below or above else F32(1)
    # The damped curvature beside the descent, solved by Gauss-Jordan elimination.
    for i in range(size):
        for j in range(size):
            system[i, j] = curvature_PP[i, j] * step_P[i] * step_P[j]
        system[i, i] += system[i, i] * damping + flat * sse + (F32(1) - step_P[i])
        system[i, size] = descent_P[i] * step_P[i]
    for p in range(size):
        scale = F32(1) / max(system[p, p], _TINY)
        for q in range(p, size + 1):
            system[p, q] *= scale
        for i in range(size):
            if i != p:
                factor = system[i, p]
                for q in range(p, size + 1):
                    system[i, q] -= factor * system[p, q]
    # The fall that the linear model of the sigmoids promises.
    promised = F32(0)
    for i in range(size):
        promised += system[i, size] * descent_P[i] * step_P[i]
        step_P[i] = system[i, size]
    return promised


@compiled(inline="always", **FAST)
def _stretch(
    step_P: Floats32,
    stretch: np.float32,
    longest_step: np.float32,
    curvature_PP: Floats32,
    descent_P: Floats32,
) -> tuple[np.float32, np.float32]:
    """Stretch and bound a step in place; return its products with the descent and the curvature."""
    size = step_P.shape[0]
    along, bend = F32(0), F32(0)
    for i in range(size):
        step_P[i] = min(max(step_P[i] * stretch, -longest_step), longest_step)
        along += step_P[i] * descent_P[i]
    for i in range(size):
        for j in range(size):
            bend += step_P[i] * curvature_PP[i, j] * step_P[j]
    return along, bend


@compiled(inline="always", **FAST)
def _move(
    theta_P: Floats32, anchor_M: Floats32, step_P: Floats32, box: Floats32, moved_P: Floats32
) -> None:
    """Fill `moved_P` with the parameters after a step in q and log-width, within the box."""
    n_sigmoids = anchor_M.shape[0]
    for m in range(n_sigmoids):
        log_width = theta_P[n_sigmoids + m]
        q = (theta_P[m] - anchor_M[m]) * np.exp(-log_width) + step_P[m]
        log_width = min(max(log_width + step_P[n_sigmoids + m], box[2]), box[3])
        moved_P[n_sigmoids + m] = log_width
        moved_P[m] = min(max(anchor_M[m] + q * np.exp(log_width), box[0]), box[1])


@compiled(**FAST)
def descend(
    theta_PN: Floats32,
    linear_LN: Floats32,
    y_NK: Floats32,
    x_K: Floats32,
    weight_NK: Floats32,
    box: Floats32,
    settings: Floats32,
    steps: int,
    anchor_MN: Floats32,
    sse_N: Floats32,
    curvature_PPN: Floats32,
    descent_PN: Floats32,
) -> int:
    """Descend as `varpro.descend`, until each token has converged or has taken `steps` steps.

    Args:
        theta_PN: the start; replaced by the end of the descent.
        linear_LN: a guess of floor and drops; replaced by the best ones.
        y_NK: scaled losses, see `varpro.Trajectories`.
        x_K: places of the probes.
        weight_NK: as in `products`.
        box: least and largest midpoint, then least and largest log-width.
        settings: `varpro.KERNEL_SETTINGS`.
        steps: most steps of a token.
        anchor_MN: filled; this and the next are fields of `varpro.Search`.
        sse_N: filled.
        curvature_PPN: filled.
        descent_PN: filled.

    Returns:
        The number of evaluations of all tokens.
    """
    # Work space: rows and tables; the state of a token; the state after the step that it tries.
    n_parameters, n_sigmoids, evaluations = theta_PN.shape[0], theta_PN.shape[0] // 2, y_NK.shape[0]
    singular, flat, longest_step, converged_below = settings[:4]
    least_damping, most_damping, damping_fall, damping_rise = settings[4:8]
    least_raised, longest_stretch = settings[8:]
    size = 3 * n_sigmoids + 2
    rows_RK = np.empty((size - 1, x_K.shape[0]), np.float32)
    table = np.empty((size, size), np.float32)
    system = np.empty((n_parameters, n_parameters + 1), np.float32)
    step_P, theta_P, new_theta_P, descent_P, new_descent_P = np.empty((5, n_parameters), np.float32)
    linear_L, new_linear_L = np.empty((2, 1 + n_sigmoids), np.float32)
    anchor_M, new_anchor_M = np.empty((2, n_sigmoids), np.float32)
    curvature_PP, new_curvature_PP = np.empty((2, n_parameters, n_parameters), np.float32)
    has_moved: bool | np.bool_
    for n in range(y_NK.shape[0]):
        for i in range(n_parameters):
            theta_P[i] = theta_PN[i, n]
        for i in range(1 + n_sigmoids):
            linear_L[i] = linear_LN[i, n]
        sse = _evaluate(
            n,
            y_NK,
            x_K,
            weight_NK,
            theta_P,
            linear_L,
            anchor_M,
            singular,
            rows_RK,
            table,
            curvature_PP,
            descent_P,
        )
        damping, stretch, has_moved = least_damping, F32(1), True
        for _ in range(steps):
            # Stop where an undamped step would lower the SSE too little.
            if has_moved and (
                _step(theta_P, curvature_PP, descent_P, sse, F32(0), flat, box, system, step_P)
                <= converged_below * sse
            ):
                break
            # Try the damped step.
            _step(theta_P, curvature_PP, descent_P, sse, damping, flat, box, system, step_P)
            along, bend = _stretch(step_P, stretch, longest_step, curvature_PP, descent_P)
            _move(theta_P, anchor_M, step_P, box, new_theta_P)
            new_linear_L[:] = linear_L
            new_sse = _evaluate(
                n,
                y_NK,
                x_K,
                weight_NK,
                new_theta_P,
                new_linear_L,
                new_anchor_M,
                singular,
                rows_RK,
                table,
                new_curvature_PP,
                new_descent_P,
            )
            evaluations += 1
            # Take it if the SSE falls; damp or stretch the next one by the ratio of the true
            # curvature along it to that of the linear model.
            gain = sse - new_sse
            has_moved = gain > 0
            if has_moved:
                ratio = (F32(2) * along - gain) / max(bend, _TINY)
                damping = max(
                    damping / damping_fall,
                    min(max(ratio - F32(1), least_damping), most_damping),
                )
                stretch = min(max(F32(1) / max(ratio, _TINY), F32(1)), longest_stretch)
                theta_P[:], linear_L[:], anchor_M[:] = new_theta_P, new_linear_L, new_anchor_M
                sse, curvature_PP[:], descent_P[:] = new_sse, new_curvature_PP, new_descent_P
            else:
                damping = damping_rise * max(damping, least_raised)
                stretch = F32(1)
        theta_PN[:, n], linear_LN[:, n], anchor_MN[:, n] = theta_P, linear_L, anchor_M
        sse_N[n], curvature_PPN[:, :, n], descent_PN[:, n] = sse, curvature_PP, descent_P
    return int(evaluations)


@compiled(inline="always", **FAST)
def _add_tangent(
    i: int, n: int, rows_RK: Floats32, singular: np.float32, weight_JJN: Floats32
) -> None:
    """Replace row i by token n's i-th tangent, from the row and the tangents before it."""
    n_probes = rows_RK.shape[1]
    for j in range(weight_JJN.shape[0]):
        weight_JJN[i, j, n] = F32(1) if i == j else F32(0)
    before = dot(rows_RK, i, i)
    for j in range(i):
        along = dot(rows_RK, i, j)
        for k in range(n_probes):
            rows_RK[i, k] -= along * rows_RK[j, k]
        for p in range(j + 1):
            weight_JJN[i, p, n] -= along * weight_JJN[j, p, n]
    after = dot(rows_RK, i, i)
    length = F32(0)
    # The second condition keeps the order of the compiled sums, on which the last digits depend.
    if after > singular * singular * before and after > F32(0):
        length = F32(1) / np.sqrt(after)
    for k in range(n_probes):
        rows_RK[i, k] *= length
    for p in range(i + 1):
        weight_JJN[i, p, n] *= length


@compiled(**FAST)
def tangents(
    theta_PN: Floats32,
    linear_LN: Floats32,
    anchor_MN: Floats32,
    y_NK: Floats32,
    x_K: Floats32,
    weight_NK: Floats32,
    singular: float,
    residual_NK: Floats32,
    s_NK: Floats32,
    tangent_NJK: Floats32,
    weight_JJN: Floats32,
    lag_one_JJN: Floats32,
    residual_lag_one_N: Floats32,
) -> None:
    """Fill in the residuals and tangents of `noise.Residuals`.

    Args:
        theta_PN: midpoints and log-widths.
        linear_LN: floor and drops.
        anchor_MN: the probe next to each midpoint.
        y_NK: scaled losses.
        x_K: places of the probes.
        weight_NK: as in `products`.
        singular: share of a row's length outside of the rows before it, below which the tangent is
            zero.
        residual_NK: filled.
        s_NK: filled with the first sigmoid.
        tangent_NJK: filled.
        weight_JJN: filled.
        lag_one_JJN: filled.
        residual_lag_one_N: filled with the sums of products of successive residuals.
    """
    n_rows, n_probes = 3 * anchor_MN.shape[0] + 1, x_K.shape[0]
    rows_RK = np.empty((n_rows, n_probes), np.float32)
    for n in range(y_NK.shape[0]):
        # The residuals are kept apart; a row of ones takes their place, before all other rows.
        fill_rows(
            rows_RK, n, y_NK, x_K, weight_NK, theta_PN[:, n], linear_LN[:, n], anchor_MN[:, n]
        )
        for k in range(n_probes):
            residual_NK[n, k] = rows_RK[n_rows - 1, k]
            s_NK[n, k] = rows_RK[0, k]
        residual_lag_one_N[n] = lag_one(residual_NK, n, n)
        for j in range(n_rows - 1, 0, -1):
            for k in range(n_probes):
                rows_RK[j, k] = rows_RK[j - 1, k]
        for k in range(n_probes):
            rows_RK[0, k] = weight_NK[n, k] if weight_NK.shape[0] else F32(1)
        # The tangents, and their lag-one products.
        for i in range(n_rows):
            _add_tangent(i, n, rows_RK, singular, weight_JJN)
            for k in range(n_probes):
                tangent_NJK[n, i, k] = rows_RK[i, k]
            for j in range(i + 1):
                both = lag_one(rows_RK, i, j) + lag_one(rows_RK, j, i)
                lag_one_JJN[i, j, n] = lag_one_JJN[j, i, n] = both * F32(0.5)
