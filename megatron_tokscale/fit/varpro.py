"""The search for the best sum of sigmoids: variable projection, and damped Gauss-Newton steps.

A token's model is f + sum over m of A_m s(u_m), with u_m = (c_m - x)/w_m and s(u) = 1/(1 + exp(-u))
(docs/references.md 1.4): floor f, drops A, midpoints c, widths w. SSE is its sum of squared
residuals over the probes.

**Variable projection.** Floor and drops are linear. So the search is over midpoints and log-widths
only, and for each of them the best floor and drops follow in closed form (Golub and Pereyra 1973;
the Jacobian is Kaufman's of 1975).

**Directions.** A step is taken in ln w and in q = (c - a)/w. The anchor a is the probe next to the
midpoint. The sigmoid at its anchor is s(q), so q fixes its value there, and ln w is a nearly
independent direction. With few probes in a transition many pairs (c, w) give the same value at the
anchor, and steps in c and w would follow that bent ridge.

**Rounding.** Residuals are computed one by one, and not from sums over losses, so that float32 is
enough: an SSE of a millionth of the variance still has four correct digits.

All tokens take their steps at once, and no token's steps depend on another token. On a CPU the
inner loops are those of `kernels`; on a GPU they are the torch functions here.

Shapes: N tokens, K probe steps, M sigmoids per token, P = 2M searched parameters (theta_PN: M
midpoints, then M log-widths), L = 1 + M linear parameters (floor, then M drops), R = 3M + 1 rows.
Tokens are the last axis: every torch operation runs along them.
"""

from itertools import combinations_with_replacement

import numpy as np
import torch
from torch import Tensor

from megatron_tokscale.fit import kernels
from megatron_tokscale.fit.search import Box, Search, Trajectories

_TINY = 1e-30
"""Least denominator: far below every denominator of losses of unit variance, and not zero."""
_SINGULAR = 1e-6
"""Least mean square over the probes of a row's part outside of the rows before it. A sigmoid below
it is constant to 1e-3 over the probes: its drop cannot be separated from the floor, and stays at
its guess."""
_LONGEST_STEP = 2.0
"""Longest step in q and in ln w. It changes a width by a factor of 7 at most, and a midpoint by two
widths at most. Beyond, the linear model of a sigmoid is useless."""
_FLAT = 1e-4
"""Curvature that is added in every direction, in units of the SSE. It keeps steps short in a nearly
flat direction, in which a step of one lowers the SSE by at most a share of 1e-4."""
_LEAST_DAMPING = 1e-3
"""Damping of the first step, and least damping, relative to the diagonal of the curvature (as
Marquardt's). It is small, since most starts lie close to the bottom, where undamped Gauss-Newton
steps converge fast."""
_MOST_DAMPING = 4.0
"""Most damping after a step that lowered the SSE: the next step is a fifth of the undamped one, and
a search that makes progress is not slowed down more. Our choice."""
_DAMPING_FALL = 8.0
"""Largest factor by which damping falls from one step to the next: four steps lead from the most
damping to the least. Our choice."""
_DAMPING_RISE = 4.0
"""Factor of the damping after a step that raised the SSE; our choice."""
_LEAST_RAISED = 0.1
"""Damping, before that factor, that a step which raised the SSE leaves at least. A rise from the
least damping would not change the next step."""
_LONGEST_STRETCH = 3.0
"""Largest factor on a step, used where the step before gained more than the curvature predicted.
Our choice: `_LONGEST_STEP` bounds the product as well."""
CONVERGED_BELOW = 1e-6
"""A search has converged if an undamped step would lower the SSE by less than this share of it. It
is eight times the resolution of float32."""

KERNEL_SETTINGS = np.array(
    [
        *(_SINGULAR, _FLAT, _LONGEST_STEP, CONVERGED_BELOW),
        *(_LEAST_DAMPING, _MOST_DAMPING, _DAMPING_FALL, _DAMPING_RISE),
        *(_LEAST_RAISED, _LONGEST_STRETCH),
    ],
    np.float32,
)
"""The constants above in the order in which `kernels.descend` unpacks them."""


def solve(matrix_PPN: Tensor, right_PRN: Tensor) -> Tensor:
    """Solve N small symmetric positive systems by Gauss-Jordan elimination, one column at a time.

    The solution is large but finite where a system is singular.
    """
    size = len(matrix_PPN)
    table = torch.cat([matrix_PPN, right_PRN], dim=1)
    for p in range(size):
        row = table[p] / table[p, p].clamp_min(_TINY)
        table = table - table[:, p, None] * row
        table[p] = row
    return table[:, size:]


def anchor(theta_PN: Tensor, x_K: Tensor) -> Tensor:
    """Return the x of the probe next to each midpoint, of shape (M, N)."""
    midpoint_MN = theta_PN[: len(theta_PN) // 2].contiguous()
    return x_K[torch.bucketize(midpoint_MN, (x_K[1:] + x_K[:-1]) / 2)]


def basis(theta_PN: Tensor, anchor_MN: Tensor, linear_LN: Tensor, data: Trajectories) -> Tensor:
    """Return the rows from which a step is computed, rows_RKN; they are 0 where a loss is missing.

    The order is: the M sigmoids s(u); for each of them s^2 - s = -s'(u), the negative of its
    derivative by q; for each its derivative by ln w at a fixed q; and the residuals of `linear_LN`.
    """
    n_sigmoids = len(theta_PN) // 2
    midpoint_MN, log_width_MN = theta_PN.chunk(2)
    narrowness_MN = (-log_width_MN).exp()
    q_MN = (midpoint_MN - anchor_MN) * narrowness_MN
    rows_RKN = data.y_KN.new_empty(3 * n_sigmoids + 1, *data.y_KN.shape)
    residual_KN = rows_RKN[-1]
    torch.sub(data.y_KN, linear_LN[0], out=residual_KN)
    x_K1 = data.x_K[:, None]
    for m in range(n_sigmoids):
        s_KN, bump_KN, by_log_width_KN = rows_RKN[m:-1:n_sigmoids]
        torch.sub(anchor_MN[m], x_K1, out=by_log_width_KN)
        by_log_width_KN *= narrowness_MN[m]
        torch.add(by_log_width_KN, q_MN[m], out=s_KN)
        s_KN.sigmoid_()
        torch.sub(s_KN, 1, out=bump_KN)
        bump_KN *= s_KN
        by_log_width_KN *= bump_KN
        residual_KN.addcmul_(s_KN, linear_LN[1 + m], value=-1)
    if data.weight_KN is not None:
        rows_RKN *= data.weight_KN
    return rows_RKN


def products(theta_PN: Tensor, anchor_MN: Tensor, linear_LN: Tensor, data: Trajectories) -> Tensor:
    """Return the products of all pairs of rows of `basis`, each summed over the probes.

    A row of ones precedes the rows of `basis`, so that the table has the shape (R + 1, R + 1, N).
    """
    size = 3 * (len(theta_PN) // 2) + 2
    table = theta_PN.new_empty(size, size, len(data))
    if data.on_cpu:
        inputs = (each.contiguous().numpy() for each in (theta_PN, linear_LN, anchor_MN))
        kernels.products(*inputs, *data.as_numpy(), table.numpy())
        return table
    rows_RKN = basis(theta_PN, anchor_MN, linear_LN, data)
    table[0, 0] = data.count_N
    table[0, 1:] = table[1:, 0] = rows_RKN.sum(dim=1)
    for i, j in combinations_with_replacement(range(size - 1), 2):
        table[1 + i, 1 + j] = table[1 + j, 1 + i] = (rows_RKN[i] * rows_RKN[j]).sum(dim=0)
    return table


def evaluate(theta_PN: Tensor, linear_LN: Tensor, data: Trajectories) -> Search:
    """Return the state of the search at `theta_PN`, with the best floor and drops.

    `linear_LN` is a guess of floor and drops. The residuals are those of the guess, so that a
    closer guess leaves smaller rounding errors.
    """
    # The table of products, which holds every sum over the probes that is needed.
    n_sigmoids = len(theta_PN) // 2
    n_linear = 1 + n_sigmoids
    anchor_MN = anchor(theta_PN, data.x_K)
    table = products(theta_PN, anchor_MN, linear_LN, data)
    # Eliminate floor and drops from the table, and solve for them. A singular one (see `_SINGULAR`)
    # stays at its guess.
    pivots = []
    for p in range(n_linear):
        usable_N = table[p, p] > _SINGULAR * len(data.y_KN)
        row = table[p, p:] * torch.where(usable_N, 1 / table[p, p], 0)
        pivots.append(row)
        table[p + 1 :, p:] -= table[p + 1 :, p, None] * row
    linear = [row[-1] for row in pivots]
    for p in reversed(range(n_linear)):
        for q in range(p + 1, n_linear):
            linear[p] = linear[p] - pivots[p][q - p] * linear[q]
    # What remains in the table are products of the rows' parts outside of the span of ones and
    # sigmoids: SSE, curvature and descent with floor and drops projected out.
    linear_LN = linear_LN + torch.stack(linear)
    slope_PN = torch.cat([-linear_LN[1:], linear_LN[1:]])
    searched = slice(n_linear, -1)
    curvature_PPN = table[searched, searched] * slope_PN * slope_PN[:, None]
    descent_PN = table[searched, -1] * slope_PN
    sse_N = table[-1, -1].clamp_min(0)
    return Search(theta_PN, anchor_MN, linear_LN, sse_N, curvature_PPN, descent_PN)


def _free(search: Search, box: Box) -> Tensor:
    """Return a mask of the free parameters: those that the descent does not push over a bound."""
    low_P1, high_P1 = box.limits(search.theta_PN)
    outward = (search.theta_PN <= low_P1) & (search.descent_PN < 0)
    outward |= (search.theta_PN >= high_P1) & (search.descent_PN > 0)
    return ~outward


def _step(search: Search, damping_N: Tensor | float, free_PN: Tensor) -> Tensor:
    """Return the Marquardt step, step_PN, in q and ln w; it is zero in the fixed parameters."""
    free_PN = free_PN.to(search.sse_N.dtype)
    curvature_PPN = search.curvature_PPN * (free_PN * free_PN[:, None])
    diagonal_PN = curvature_PPN.diagonal().T  # a view: the next line changes curvature_PPN
    diagonal_PN += diagonal_PN * damping_N + _FLAT * search.sse_N + (1 - free_PN)
    return solve(curvature_PPN, (search.descent_PN * free_PN)[:, None])[:, 0]


def _move(search: Search, step_PN: Tensor, box: Box) -> Tensor:
    """Return theta_PN after a step in q and ln w, bounded by the box."""
    midpoint_MN, log_width_MN = search.theta_PN.chunk(2)
    by_q_MN, by_log_width_MN = step_PN.chunk(2)
    q_MN = (midpoint_MN - search.anchor_MN) * (-log_width_MN).exp() + by_q_MN
    log_width_MN = (log_width_MN + by_log_width_MN).clamp(*box.log_width)
    midpoint_MN = (search.anchor_MN + q_MN * log_width_MN.exp()).clamp(*box.midpoint)
    return torch.cat([midpoint_MN, log_width_MN])


def descend(
    theta_PN: Tensor, linear_LN: Tensor, data: Trajectories, box: Box, steps: int
) -> Search:
    """Try `steps` damped Gauss-Newton steps from `theta_PN`; take those that lower the SSE.

    The gain of a step is the fall of the SSE. Along a step d with slope g = d^T J^T r, the SSE of a
    quadratic with curvature B falls by 2 g - B. So the measured gain gives B. J^T J leaves out
    second derivatives, and gives d^T J^T J d instead. The ratio of the two sets the damping of the
    next step if it is above 1, and lengthens the next step if it is below 1 (our choice).

    Args:
        theta_PN: the starts.
        linear_LN: a guess of floor and drops, see `evaluate`.
        data: the trajectories of the tokens.
        box: bounds of the search.
        steps: steps to try. On a CPU a token stops earlier if it has converged.
    """
    if data.on_cpu:
        return _descend_on_cpu(theta_PN, linear_LN, data, box, steps)
    search = evaluate(theta_PN, linear_LN, data)
    damping_N = torch.full_like(search.sse_N, _LEAST_DAMPING)
    stretch_N = torch.ones_like(search.sse_N)
    for _ in range(steps):
        # Try the damped step, stretched and bounded.
        step_PN = _step(search, damping_N, _free(search, box)) * stretch_N
        step_PN = step_PN.clamp(-_LONGEST_STEP, _LONGEST_STEP)
        theta_PN = _move(search, step_PN, box)
        trial = evaluate(theta_PN, search.linear_LN, data)
        # The ratio of the true curvature along the step to that of J^T J.
        gain_N = search.sse_N - trial.sse_N
        better_N = gain_N > 0
        along_N = (step_PN * search.descent_PN).sum(dim=0)
        bend_N = ((search.curvature_PPN * step_PN).sum(dim=1) * step_PN).sum(dim=0)
        ratio_N = (2 * along_N - gain_N) / bend_N.clamp_min(_TINY)
        # Take the step if it lowers the SSE; set damping and stretch of the next one.
        search = trial.where(better_N, search)
        damped_N = torch.maximum(
            damping_N / _DAMPING_FALL, (ratio_N - 1).clamp(_LEAST_DAMPING, _MOST_DAMPING)
        )
        raised_N = _DAMPING_RISE * damping_N.clamp_min(_LEAST_RAISED)
        damping_N = torch.where(better_N, damped_N, raised_N)
        stretched_N = (1 / ratio_N.clamp_min(_TINY)).clamp(1, _LONGEST_STRETCH)
        stretch_N = torch.where(better_N, stretched_N, 1)
    return search


def _descend_on_cpu(
    theta_PN: Tensor, linear_LN: Tensor, data: Trajectories, box: Box, steps: int
) -> Search:
    """Descend as `descend`, in compiled loops; a token that has converged takes no more steps."""
    n_parameters, n_tokens = theta_PN.shape
    theta_PN = theta_PN.clone(memory_format=torch.contiguous_format)
    linear_LN = linear_LN.clone(memory_format=torch.contiguous_format)
    anchor_MN = theta_PN.new_empty(n_parameters // 2, n_tokens)
    sse_N = theta_PN.new_empty(n_tokens)
    curvature_PPN = theta_PN.new_empty(n_parameters, n_parameters, n_tokens)
    descent_PN = torch.empty_like(theta_PN)
    kernels.descend(
        theta_PN.numpy(),
        linear_LN.numpy(),
        *data.as_numpy(),
        np.array([*box.midpoint, *box.log_width], np.float32),
        KERNEL_SETTINGS,
        steps,
        *(each.numpy() for each in (anchor_MN, sse_N, curvature_PPN, descent_PN)),
    )
    return Search(theta_PN, anchor_MN, linear_LN, sse_N, curvature_PPN, descent_PN)


def converged(search: Search, box: Box) -> Tensor:
    """Return a mask of the tokens whose search has converged, see `CONVERGED_BELOW`."""
    free_PN = _free(search, box)
    promised_N = (_step(search, 0.0, free_PN) * search.descent_PN * free_PN).sum(dim=0)
    return promised_N <= CONVERGED_BELOW * search.sse_N + _TINY
