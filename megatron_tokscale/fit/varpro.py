"""Sums of sigmoids by variable projection: damped Gauss-Newton for all tokens at once.

Only midpoints and log-widths are searched; floor and drops are linear, and eliminated in closed
form (Golub and Pereyra 1973, with Kaufman's 1975 Jacobian). The step of a token never depends on
another token. Residuals are formed explicitly, so that float32 is enough: a sum of squares that is
a millionth of the variance is still known to four digits.

A step is taken in q = (c - x_a)/w and ln w, x_a being the probe next to the midpoint. With few
probes in a transition, steps in c and w would follow a bent ridge of constant s at x_a. q fixes s
at x_a, and ln w is then a nearly independent direction.

Shapes: N tokens, K probe steps, M sigmoids per token, P = 2M searched parameters (theta_PN: the M
midpoints, then the M log-widths), L = 1 + M linear ones (floor, then drops), R = 3M + 1 rows. The
tokens come last: every operation runs along them. On a CPU the inner loops are those of `kernels`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import combinations_with_replacement
from typing import Self

import numpy as np
import torch
from torch import Tensor

from megatron_tokscale.core.arrays import Floats32
from megatron_tokscale.fit import kernels

_TINY = 1e-30  # least denominator
_SINGULAR = 1e-6
"""Mean square of a row per probe, outside of the rows before it, below which its amplitude is zero:
a sigmoid is then constant to 1e-3 over the probes, and its drop cannot be told from the floor."""
_LONGEST_STEP = 2.0
"""Longest step in q and in ln w: a width changes by a factor of 7 at most, and a midpoint by two
widths, beyond which the linear model of a sigmoid is useless."""
_FLAT = 1e-4
"""Curvature added to each direction, in units of the SSE: steps are short along a direction in
which a step of one could lower the SSE by at most 1e-4 of it."""
_LEAST_DAMPING = 1e-3
"""Damping of the first step, and least damping; relative to the diagonal of the curvature, as
Marquardt's. Small, because most starts are close to the bottom, where Gauss-Newton converges fast.
"""
_MOST_DAMPING = 4.0  # after a step that lowered the SSE
_DAMPING_FALL = 8.0  # largest factor by which the damping falls from step to step
_DAMPING_RISE = 4.0  # factor of the damping after a step that raised the SSE, ...
_LEAST_RAISED = 0.1  # ... and least damping after it, so that one failure has an effect
_LONGEST_STRETCH = 3.0
"""Largest factor on a step, where the step before gained more than the curvature predicted."""
CONVERGED_BELOW = 1e-6
"""Share of the SSE: a search has converged if an undamped step would lower the SSE by less."""


KERNEL_SETTINGS = np.array(
    [
        *(_SINGULAR, _FLAT, _LONGEST_STEP, CONVERGED_BELOW),
        *(_LEAST_DAMPING, _MOST_DAMPING, _DAMPING_FALL, _DAMPING_RISE),
        *(_LEAST_RAISED, _LONGEST_STRETCH),
    ],
    np.float32,
)
"""These constants as `kernels.descend` takes them."""


@dataclass(frozen=True)
class Trajectories:
    """Centred losses of unit variance, the places of their probes, and the mask of missing losses.

    Attributes:
        y_KN: losses less their mean, over their standard deviation; 0 where missing.
        x_K: places of the probes, in units of the probed range: 0 at its start, 1 at its end.
        weight_KN: 1 where there is a loss, 0 where it is missing; None if none is missing.
    """

    y_KN: Tensor
    x_K: Tensor
    weight_KN: Tensor | None = None

    def __len__(self) -> int:
        return self.y_KN.shape[1]

    def tokens(self, index: Tensor | slice) -> "Trajectories":
        """Return the trajectories of some of the tokens."""
        weight_KN = None if self.weight_KN is None else _columns(self.weight_KN, index)
        return Trajectories(_columns(self.y_KN, index), self.x_K, weight_KN)

    def as_numpy(self) -> tuple[Floats32, Floats32, Floats32]:
        """Return y_NK, x_K and weight_NK (of shape (0, 1) if no loss is missing), for `kernels`."""
        weight_KN = self.y_KN.new_empty(1, 0) if self.weight_KN is None else self.weight_KN
        return self.y_KN.T.numpy(), self.x_K.numpy(), weight_KN.T.numpy()

    @property
    def on_cpu(self) -> bool:
        """True if the compiled loops of `kernels` can work on them."""
        return self.y_KN.device.type == "cpu"

    @property
    def count_N(self) -> Tensor:
        """Number of losses of each token."""
        if self.weight_KN is None:
            return self.y_KN.new_full((len(self),), len(self.y_KN))
        return self.weight_KN.sum(dim=0)


def _columns(value_KN: Tensor, index: Tensor | slice) -> Tensor:
    """Return some tokens' values, contiguous along the probes on a CPU, along tokens on a GPU."""
    if value_KN.device.type == "cpu":
        return value_KN.T[index].contiguous().T
    return value_KN[:, index].contiguous()


@dataclass(frozen=True)
class Box:
    """Bounds of a midpoint and of a log-width.

    Attributes:
        midpoint: bounds in units of the probed range.
        log_width: bounds of ln w, w in units of the probed range.
    """

    midpoint: tuple[float, float]
    log_width: tuple[float, float]

    def limits(self, theta_PN: Tensor) -> tuple[Tensor, Tensor]:
        """Return the lower and upper bound of every entry of theta, each of shape (P, 1)."""
        n_sigmoids = len(theta_PN) // 2
        bounds = [self.midpoint] * n_sigmoids + [self.log_width] * n_sigmoids
        low_P1, high_P1 = theta_PN.new_tensor(bounds)[..., None].unbind(dim=1)
        return low_P1, high_P1


@dataclass(frozen=True)
class Search:
    """The state of the search.

    Attributes:
        theta_PN: midpoints and log-widths.
        anchor_MN: the probe next to each midpoint.
        linear_LN: the best floor (of centred losses) and drops for this theta.
        sse_N: sum of squared residuals.
        curvature_PPN: J^T J by the q and log-widths, with floor and drops projected out.
        descent_PN: J^T r; the Gauss-Newton step solves curvature step = descent.
    """

    theta_PN: Tensor
    anchor_MN: Tensor
    linear_LN: Tensor
    sse_N: Tensor
    curvature_PPN: Tensor
    descent_PN: Tensor

    @property
    def drop_MN(self) -> Tensor:
        """The drops."""
        return self.linear_LN[1:]

    def where(self, mask_N: Tensor, other: "Search") -> "Search":
        """Return this state where `mask_N` is true, and `other` elsewhere."""
        pairs = ((getattr(self, f.name), getattr(other, f.name)) for f in fields(self))
        return Search(*(torch.where(mask_N, a, b) for a, b in pairs))

    def tokens(self, index: Tensor | slice) -> "Search":
        """Return the state of some of the tokens."""
        return Search(*(getattr(self, f.name)[..., index] for f in fields(self)))

    def put(self, index_N: Tensor, other: "Search") -> None:
        """Replace the tokens at `index_N` by those of `other`, in place."""
        for f in fields(self):
            getattr(self, f.name)[..., index_N] = getattr(other, f.name)

    @classmethod
    def join(cls, parts: Sequence["Search"]) -> Self:
        """Return the tokens of all parts, in order."""
        return cls(*(torch.cat([getattr(p, f.name) for p in parts], -1) for f in fields(cls)))


def solve(matrix_PPN: Tensor, right_PRN: Tensor) -> Tensor:
    """Solve N small symmetric positive systems by Gauss-Jordan elimination, unrolled over P.

    A singular direction gives a large but finite solution.
    """
    size = len(matrix_PPN)
    table = torch.cat([matrix_PPN, right_PRN], dim=1)
    for p in range(size):
        row = table[p] / table[p, p].clamp_min(_TINY)
        table = table - table[:, p, None] * row
        table[p] = row
    return table[:, size:]


def anchor(theta_PN: Tensor, x_K: Tensor) -> Tensor:
    """Return the x of the probe next to each midpoint, x_MN."""
    midpoint_MN = theta_PN[: len(theta_PN) // 2].contiguous()
    return x_K[torch.bucketize(midpoint_MN, (x_K[1:] + x_K[:-1]) / 2)]


def basis(theta_PN: Tensor, anchor_MN: Tensor, linear_LN: Tensor, data: Trajectories) -> Tensor:
    """Return the rows from which a step is computed, rows_RKN.

    In this order: the sigmoids s(u), u = (c - x)/w; -s'(u), the negative of their derivatives by q;
    their derivatives by ln w at that q; the residuals of `linear_LN`. Zero where a loss is missing.
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
    """Return the sums over the probes of products of all pairs of rows of `basis`.

    A row of ones comes before those rows: the table is of shape (R + 1, R + 1, N).
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
    """Return the state at `theta_PN`, with floor and drops projected out of the curvature.

    `linear_LN` is a guess of floor and drops: the closer it is, the smaller the rounding errors.
    """
    # All sums, from one table of products.
    n_sigmoids = len(theta_PN) // 2
    n_linear = 1 + n_sigmoids
    anchor_MN = anchor(theta_PN, data.x_K)
    table = products(theta_PN, anchor_MN, linear_LN, data)
    # Eliminate floor and drops; a singular one stays at its guess.
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
    # The remaining products are of the rows' parts outside of the span of ones and sigmoids.
    linear_LN = linear_LN + torch.stack(linear)
    slope_PN = torch.cat([-linear_LN[1:], linear_LN[1:]])
    searched = slice(n_linear, -1)
    curvature_PPN = table[searched, searched] * slope_PN * slope_PN[:, None]
    descent_PN = table[searched, -1] * slope_PN
    sse_N = table[-1, -1].clamp_min(0)
    return Search(theta_PN, anchor_MN, linear_LN, sse_N, curvature_PPN, descent_PN)


def _free(search: Search, box: Box) -> Tensor:
    """Return a mask of the parameters that are not at a bound the descent would cross."""
    low_P1, high_P1 = box.limits(search.theta_PN)
    outward = (search.theta_PN <= low_P1) & (search.descent_PN < 0)
    outward |= (search.theta_PN >= high_P1) & (search.descent_PN > 0)
    return ~outward


def _step(search: Search, damping_N: Tensor | float, free_PN: Tensor) -> Tensor:
    """Return Marquardt's step within the free parameters; see `_FLAT` for nearly flat
    directions."""
    free_PN = free_PN.to(search.sse_N.dtype)
    curvature_PPN = search.curvature_PPN * (free_PN * free_PN[:, None])
    diagonal_PN = curvature_PPN.diagonal().T  # a view, tokens last
    diagonal_PN += diagonal_PN * damping_N + _FLAT * search.sse_N + (1 - free_PN)
    return solve(curvature_PPN, (search.descent_PN * free_PN)[:, None])[:, 0]


def _move(search: Search, step_PN: Tensor, box: Box) -> Tensor:
    """Return midpoints and log-widths after a step in q and log-width, within the box."""
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

    `linear_LN` is a guess of floor and drops (`evaluate`).

    J^T J leaves out the second derivatives. The gain of a step gives the ratio of the true
    curvature along it to J^T J's: the next step is damped, or lengthened, by that ratio.
    """
    if data.on_cpu:
        return _descend_on_cpu(theta_PN, linear_LN, data, box, steps)
    search = evaluate(theta_PN, linear_LN, data)
    damping_N = torch.full_like(search.sse_N, _LEAST_DAMPING)
    stretch_N = torch.ones_like(search.sse_N)
    for _ in range(steps):
        step_PN = _step(search, damping_N, _free(search, box)) * stretch_N
        step_PN = step_PN.clamp(-_LONGEST_STEP, _LONGEST_STEP)
        theta_PN = _move(search, step_PN, box)
        trial = evaluate(theta_PN, search.linear_LN, data)
        # The ratio of the curvatures, from the predicted and the true gain of the step.
        gain_N = search.sse_N - trial.sse_N
        better_N = gain_N > 0
        along_N = (step_PN * search.descent_PN).sum(dim=0)
        bend_N = ((search.curvature_PPN * step_PN).sum(dim=1) * step_PN).sum(dim=0)
        ratio_N = (2 * along_N - gain_N) / bend_N.clamp_min(_TINY)
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
    """Descend in compiled loops, in which a token that has converged takes no more steps."""
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
    """Return whether the next undamped step would lower the SSE by less than 1e-6 of it."""
    free_PN = _free(search, box)
    promised_N = (_step(search, 0.0, free_PN) * search.descent_PN * free_PN).sum(dim=0)
    return promised_N <= CONVERGED_BELOW * search.sse_N + _TINY
