"""Sums of sigmoids by variable projection: damped Gauss-Newton for all tokens at once.

Only midpoints and log-widths are searched; floor and drops are linear, and eliminated in closed
form (Golub and Pereyra 1973, with Kaufman's 1975 Jacobian). One token's step never depends on
another's.

Shapes: N tokens, K probe steps, M sigmoids per token, P = 2M searched parameters (theta_NP: the M
midpoints, then the M log-widths). Losses y_NK come centred, of unit variance.
"""

from dataclasses import dataclass, fields

import torch
from torch import Tensor

_TINY = 1e-30
_MAX_LOG_WIDTH_STEP = 2.0
_DAMPING_START, _DAMPING_LEAST = 1e-2, 1e-9
CONVERGED_BELOW = 1e-4


@dataclass(frozen=True)
class Search:
    """The state of the search.

    Attributes:
        theta_NP: midpoints and log-widths.
        drop_NM: the best drops for this theta.
        sse_N: sum of squared residuals.
        curvature_NPP: J^T J with floor and drops projected out.
        descent_NP: J^T r; the Gauss-Newton step solves curvature step = descent.
    """

    theta_NP: Tensor
    drop_NM: Tensor
    sse_N: Tensor
    curvature_NPP: Tensor
    descent_NP: Tensor

    def where(self, mask_N: Tensor, other: "Search") -> "Search":
        """This state where `mask_N` is true, `other` elsewhere."""
        pairs = ((getattr(self, f.name), getattr(other, f.name)) for f in fields(self))
        return Search(*(torch.where(_expand(mask_N, a), a, b) for a, b in pairs))

    def rows(self, index_N: Tensor) -> "Search":
        """The tokens at `index_N`."""
        return Search(*(getattr(self, f.name)[index_N] for f in fields(self)))

    def put(self, index_N: Tensor, other: "Search") -> "Search":
        """This state with the tokens at `index_N` replaced by those of `other`."""
        pairs = ((getattr(self, f.name), getattr(other, f.name)) for f in fields(self))
        return Search(*(a.index_copy(0, index_N, b) for a, b in pairs))


@dataclass(frozen=True)
class Box:
    """Bounds of a midpoint and of a log-width."""

    midpoint: tuple[float, float]
    log_width: tuple[float, float]

    def limits(self, like_NP: Tensor) -> tuple[Tensor, Tensor]:
        """Lower and upper bound of every entry of theta, each of length P."""
        n_sigmoids = like_NP.shape[1] // 2
        low, high = (
            like_NP.new_tensor([self.midpoint[i]] * n_sigmoids + [self.log_width[i]] * n_sigmoids)
            for i in (0, 1)
        )
        return low, high


def _expand(mask_N: Tensor, like: Tensor) -> Tensor:
    return mask_N.reshape(-1, *[1] * (like.ndim - 1))


def solve(matrix_NPP: Tensor, right_NPR: Tensor) -> Tensor:
    """Solve N small symmetric positive systems by Gauss-Jordan elimination, unrolled over P.

    A singular direction gives a large but finite solution.
    """
    size = matrix_NPP.shape[-1]
    table = torch.cat([matrix_NPP, right_NPR], dim=-1)
    for p in range(size):
        row = table[:, p] / table[:, p, p].clamp_min(_TINY)[:, None]
        table = table - table[:, :, p, None] * row[:, None, :]
        table[:, p] = row
    return table[:, :, size:]


def curves(theta_NP: Tensor, x_K: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sigmoids s((c - x)/w) and their derivatives by c and by ln w, each of shape (N, M, K)."""
    filled = theta_NP.new_empty(len(theta_NP), 3 * (theta_NP.shape[1] // 2), len(x_K))
    _fill_curves(filled, theta_NP, x_K)
    s, by_midpoint, by_log_width = filled.chunk(3, dim=1)
    return s, by_midpoint, by_log_width


def _fill_curves(out: Tensor, theta_NP: Tensor, x_K: Tensor) -> None:
    """Write the 3M curves of `curves` into `out` of shape (N, 3M, K), with no copy between."""
    s, by_midpoint, by_log_width = out.chunk(3, dim=1)
    midpoint, log_width = theta_NP[..., None].chunk(2, dim=1)
    narrowness = (-log_width).exp()
    torch.sub(midpoint, x_K, out=by_log_width)
    by_log_width *= narrowness
    torch.sigmoid(by_log_width, out=s)
    torch.sub(1, s, out=by_midpoint)
    by_midpoint *= s
    by_log_width *= -by_midpoint
    by_midpoint *= narrowness


def evaluate(theta_NP: Tensor, y_NK: Tensor, x_K: Tensor) -> Search:
    """Project out floor and drops at `theta_NP`; everything follows from one Gram matrix."""
    n_sigmoids = theta_NP.shape[1] // 2
    basis = y_NK.new_empty(len(y_NK), 3 * n_sigmoids + 1, y_NK.shape[1])
    basis[:, -1] = y_NK
    _fill_curves(basis[:, :-1], theta_NP, x_K)
    basis -= basis.mean(dim=-1, keepdim=True)
    gram = basis @ basis.mT
    linear, searched = slice(0, n_sigmoids), slice(n_sigmoids, 3 * n_sigmoids)
    inner = gram[:, linear, linear]
    cross = gram[:, searched, linear]
    against_y = gram[:, linear, -1:]
    drop = solve(inner, against_y)
    twice = torch.cat([drop, drop], dim=1)
    cross_scaled = cross * twice
    curvature = gram[:, searched, searched] * twice * twice.mT
    curvature -= cross_scaled @ solve(inner, cross_scaled.mT)
    descent = twice * (gram[:, searched, -1:] - cross @ drop)
    sse = gram[:, -1, -1] - (drop * against_y).sum(dim=(1, 2))
    return Search(theta_NP, drop[..., 0], sse.clamp_min(0), curvature, descent[..., 0])


def _free(search: Search, box: Box) -> Tensor:
    """Which parameters may move: not those at a bound that the descent pushes outward."""
    low_P, high_P = box.limits(search.theta_NP)
    outward = (search.theta_NP <= low_P) & (search.descent_NP < 0)
    outward |= (search.theta_NP >= high_P) & (search.descent_NP > 0)
    return ~outward


def _step(search: Search, damping_N: Tensor, free_NP: Tensor) -> Tensor:
    """Marquardt's step within the free parameters."""
    curvature = search.curvature_NPP * (free_NP[:, :, None] & free_NP[:, None, :])
    diagonal = curvature.diagonal(dim1=1, dim2=2)
    damped = curvature + torch.diag_embed(diagonal * damping_N[:, None] + ~free_NP)
    return solve(damped, (search.descent_NP * free_NP)[..., None])[..., 0]


def descend(search: Search, y_NK: Tensor, x_K: Tensor, box: Box, steps: int) -> Search:
    """Take `steps` damped Gauss-Newton steps; a step is taken by a token only if its SSE falls."""
    low_P, high_P = box.limits(search.theta_NP)
    longest_P = torch.minimum((high_P - low_P) / 4, high_P.new_tensor(_MAX_LOG_WIDTH_STEP))
    damping_N = torch.full_like(search.sse_N, _DAMPING_START)
    for _ in range(steps):
        step = _step(search, damping_N, _free(search, box))
        step = torch.maximum(torch.minimum(step, longest_P), -longest_P)
        theta = torch.maximum(torch.minimum(search.theta_NP + step, high_P), low_P)
        trial = evaluate(theta, y_NK, x_K)
        better = trial.sse_N < search.sse_N
        search = trial.where(better, search)
        damping_N = torch.where(better, damping_N / 10, damping_N * 5).clamp_min(_DAMPING_LEAST)
    return search


def converged(search: Search, box: Box) -> Tensor:
    """Whether the next undamped step promises to lower the SSE by less than 1e-4 of it."""
    free = _free(search, box)
    step = _step(search, torch.zeros_like(search.sse_N), free)
    promised = (step * search.descent_NP * free).sum(dim=1)
    return promised <= CONVERGED_BELOW * search.sse_N + _TINY


def at_bound(search: Search, box: Box) -> Tensor:
    """Which parameters lie at a bound."""
    low_P, high_P = box.limits(search.theta_NP)
    return (search.theta_NP <= low_P) | (search.theta_NP >= high_P)
