"""One block of tokens through grid, refinement, errors and classes.

Shapes: N tokens, K probe steps, M sigmoids per token, P = 2M searched parameters.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_tokscale.fit import classes, varpro
from megatron_tokscale.fit.axis import Axis
from megatron_tokscale.fit.grid import Grid
from megatron_tokscale.fit.table import FitStatus, SigmoidFits, TokenClass
from megatron_tokscale.fit.varpro import Search

_SCOUT_STEPS, _STEPS, _SLOW_STEPS = 4, 12, 40
_ROUNDING = 1e-6
_INSIDE = 0.05
_MIN_PLATEAU = 2


@dataclass(frozen=True)
class Losses:
    """A block's losses, scaled so that the search knows no units.

    Attributes:
        y_NK: losses less their mean, of unit variance; zero where there is nothing to fit.
        level_N: mean loss in nats.
        scale_N: standard deviation over the probes in nats.
        fall_N: first loss minus last, in nats.
        finite_N: whether all losses are finite.
        moves_N: whether the losses differ by more than rounding.
    """

    y_NK: Tensor
    level_N: Tensor
    scale_N: Tensor
    fall_N: Tensor
    finite_N: Tensor
    moves_N: Tensor

    @staticmethod
    def of(loss_NK: Tensor) -> "Losses":
        """Scale losses in nats."""
        loss_NK = loss_NK.double()
        finite_N = loss_NK.isfinite().all(dim=1)
        loss_NK = torch.where(finite_N[:, None], loss_NK, 0.0)
        level_N = loss_NK.mean(dim=1)
        y_NK = loss_NK - level_N[:, None]
        scale_N = y_NK.square().mean(dim=1).sqrt()
        moves_N = scale_N > _ROUNDING * loss_NK.abs().amax(dim=1)
        scale_N = torch.where(moves_N, scale_N, 1.0)
        y_NK = torch.where(moves_N[:, None], y_NK / scale_N[:, None], 0.0)
        return Losses(y_NK, level_N, scale_N, loss_NK[:, 0] - loss_NK[:, -1], finite_N, moves_N)


def fit_block(axis: Axis, grid: Grid, loss_NK: Tensor, known_below: float) -> SigmoidFits:
    """Fit every token of a block; see `fit_sigmoids`."""
    losses = Losses.of(loss_NK)
    one = fit_one(grid, losses.y_NK)
    onset_N, slope_N, ramp_sse_N = grid.ramp(losses.y_NK)
    flat_sse_N = losses.y_NK.square().sum(dim=1)
    sse_N = {"flat": flat_sse_N, "sigmoid": one.sse_N, "ramp": ramp_sse_N}
    two = fit_two(grid, losses.y_NK, rivals=sse_N)
    sse_N["two"] = torch.where(_is_two(axis, two), two.sse_N, torch.inf)
    class_N, evidence_N = classes.choose(
        sse_N, one.drop_NM[:, 0], losses.level_N, axis.n_probes, known_below
    )
    class_N = torch.where(losses.finite_N, class_N, int(TokenClass.UNFITTED))
    gradual_N = class_N == TokenClass.GRADUAL
    two_step_N = class_N == TokenClass.TWO_STEP
    status_N, columns = _one_columns(axis, grid, losses, one)
    columns |= {
        "level_N": (losses.level_N, losses.finite_N),
        "fall_N": (losses.fall_N, losses.finite_N),
        "evidence_N": (evidence_N, losses.finite_N),
        "onset_N": (onset_N, gradual_N),
        "slope_N": (slope_N * losses.scale_N, gradual_N),
    } | {name: (each_N, two_step_N) for name, each_N in _two_columns(grid, losses, two).items()}
    return SigmoidFits(
        axis.x_K,
        **{
            name: torch.where(known_N, each_N, torch.nan).float().cpu().numpy()
            for name, (each_N, known_N) in columns.items()
        },
        class_N=class_N.to(torch.int8).cpu().numpy(),
        status_N=status_N.to(torch.int8).cpu().numpy(),
    )


def fit_one(grid: Grid, y_NK: Tensor) -> Search:
    """The best sigmoid: every band's best cell is refined a little, the best of them further.

    The few tokens that have not converged by then get more steps, by themselves.
    """
    best: Search | None = None
    for theta_NP in grid.starts(y_NK):
        start = varpro.evaluate(theta_NP, y_NK, grid.x_K)
        found = varpro.descend(start, y_NK, grid.x_K, grid.box, _SCOUT_STEPS)
        best = found if best is None else best.where(best.sse_N <= found.sse_N, found)
    assert best is not None
    found = varpro.descend(best, y_NK, grid.x_K, grid.box, _STEPS)
    slow = (~varpro.converged(found, grid.box)).nonzero()[:, 0]
    more = varpro.descend(found.rows(slow), y_NK[slow], grid.x_K, grid.box, _SLOW_STEPS)
    return found.put(slow, more)


def fit_two(grid: Grid, y_NK: Tensor, rivals: dict[str, Tensor]) -> Search:
    """Two sigmoids: the best pair of coarse cells, then all four parameters together.

    Tokens that after a few steps are far from beating the simpler models (`rivals`: the SSE of
    each) are left there.
    """
    start = varpro.evaluate(grid.pair_start(y_NK), y_NK, grid.x_K)
    scout = varpro.descend(start, y_NK, grid.x_K, grid.box, _SCOUT_STEPS)
    hopeful = classes.in_reach("two", scout.sse_N, rivals, y_NK.shape[1]).nonzero()[:, 0]
    y_hopeful = y_NK[hopeful]
    found = varpro.descend(scout.rows(hopeful), y_hopeful, grid.x_K, grid.box, _STEPS)
    return scout.put(hopeful, found)


def _is_two(axis: Axis, two: Search) -> Tensor:
    """Whether both midpoints are inside the probed range, with two probes or more between them.

    A single probe between two steps is an outlier, not a state of the token (our choice).
    """
    midpoint_NM = two.theta_NP[:, :2]
    x_K = torch.tensor(axis.placed_K, device=midpoint_NM.device)
    before_NM = (x_K < midpoint_NM[..., None]).sum(dim=-1)
    inside_NM = (midpoint_NM >= axis.low) & (midpoint_NM <= axis.high)
    apart_N = (before_NM[:, 0] - before_NM[:, 1]).abs() >= _MIN_PLATEAU
    return apart_N & inside_NM.all(dim=1)


def _one_columns(
    axis: Axis, grid: Grid, losses: Losses, one: Search
) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]:
    """Status, and the columns of the one-sigmoid fit: each with where it is known.

    A constant token has a floor and no drop; where it would fall or how fast is not known.
    """
    finite_N, fitted_N = losses.finite_N, losses.finite_N & losses.moves_N
    se_N4, inside_N = _errors(axis, one, grid.x_K)
    status_N = _status(axis, grid, one, inside_N)
    floor_se_N, drop_se_N, midpoint_se_N, width_se_N = se_N4.unbind(dim=1)
    trusted_N = fitted_N & (status_N != FitStatus.AT_BOUND)
    status_N = torch.where(losses.moves_N, status_N, int(FitStatus.CONVERGED))
    status_N = torch.where(finite_N, status_N, int(FitStatus.NON_FINITE))
    drop_N = torch.where(losses.moves_N, one.drop_NM[:, 0] * losses.scale_N, 0.0)
    mean_s_N = varpro.curves(one.theta_NP, grid.x_K)[0].mean(dim=(1, 2))
    return status_N, {
        "floor_N": (losses.level_N - drop_N * mean_s_N, finite_N),
        "drop_N": (drop_N, finite_N),
        "midpoint_N": (one.theta_NP[:, 0], fitted_N),
        "width_N": (one.theta_NP[:, 1].exp(), fitted_N),
        "floor_se_N": (floor_se_N * losses.scale_N, trusted_N),
        "drop_se_N": (drop_se_N * losses.scale_N, trusted_N),
        "midpoint_se_N": (midpoint_se_N, trusted_N),
        "width_se_N": (width_se_N, trusted_N),
        "sse_N": (one.sse_N * losses.scale_N.square(), finite_N),
        "r2_N": (1 - one.sse_N / axis.n_probes, fitted_N),
    }


def _two_columns(grid: Grid, losses: Losses, two: Search) -> dict[str, Tensor]:
    """Floor, and drop, midpoint and width of the earlier and the later transition."""
    drop_NM = two.drop_NM * losses.scale_N[:, None]
    mean_s_NM = varpro.curves(two.theta_NP, grid.x_K)[0].mean(dim=-1)
    order_NM = two.theta_NP[:, :2].argsort(dim=1)
    columns = {"steps_floor_N": losses.level_N - (drop_NM * mean_s_NM).sum(dim=1)}
    values = {"drop": drop_NM, "midpoint": two.theta_NP[:, :2], "width": two.theta_NP[:, 2:].exp()}
    for name, value_NM in values.items():
        for m, ordered_N in enumerate(value_NM.gather(1, order_NM).unbind(dim=1), start=1):
            columns[f"step{m}_{name}_N"] = ordered_N
    return columns


def _errors(axis: Axis, one: Search, x_K: Tensor) -> tuple[Tensor, Tensor]:
    """Standard errors of f, A, c, w (scaled losses), and how many probes lie in the transition.

    sqrt of the diagonal of (J^T J)^-1 SSE/(K - 4). With fewer than two probes where
    0.05 < s < 0.95 neither c nor w is a smooth function of the losses there: c is then uniform
    between the probes on either side (their distance over sqrt 12), w has no error, and f
    and A have those of c and w held fixed.
    """
    s, by_midpoint, by_log_width = (curve[:, 0] for curve in varpro.curves(one.theta_NP, x_K))
    drop_N1, width_N1 = one.drop_NM, one.theta_NP[:, 1:].exp()
    jacobian = torch.stack(
        [torch.ones_like(s), s, drop_N1 * by_midpoint, drop_N1 * by_log_width / width_N1], dim=1
    )
    variance_N1 = (one.sse_N / (axis.n_probes - 4))[:, None]
    gram = jacobian @ jacobian.mT
    inside_N = ((s > _INSIDE) & (s < 1 - _INSIDE)).sum(dim=1)
    smooth_N1 = (inside_N >= 2)[:, None]
    full = _inverse_diagonal(gram)
    fixed = torch.nn.functional.pad(_inverse_diagonal(gram[:, :2, :2]), (0, 2), value=torch.nan)
    se_N4 = (torch.where(smooth_N1, full, fixed) * variance_N1).sqrt()
    left_N = torch.where(s >= 1 - _INSIDE, x_K, -torch.inf).amax(dim=1)
    right_N = torch.where(s <= _INSIDE, x_K, torch.inf).amin(dim=1)
    gap_N = right_N - left_N.clamp_min(axis.low - axis.spacing)
    se_N4[:, 2] = torch.where(smooth_N1[:, 0], se_N4[:, 2], gap_N / math.sqrt(12))
    return se_N4, inside_N


def _inverse_diagonal(gram_NPP: Tensor) -> Tensor:
    """Diagonal of the inverse, the parameters scaled to unit curvature first."""
    length_NP = gram_NPP.diagonal(dim1=1, dim2=2).clamp_min(1e-30).sqrt()
    scaled = gram_NPP / (length_NP[:, :, None] * length_NP[:, None, :])
    identity = torch.eye(gram_NPP.shape[-1], dtype=gram_NPP.dtype, device=gram_NPP.device)
    inverse = varpro.solve(scaled, identity.expand_as(scaled))
    return inverse.diagonal(dim1=1, dim2=2) / length_NP.square()


def _status(axis: Axis, grid: Grid, one: Search, inside_N: Tensor) -> Tensor:
    """The first of: at a bound, too few points in the transition, step limit, converged."""
    midpoint_N, log_width_N = one.theta_NP.unbind(dim=1)
    outside_N = (midpoint_N < axis.low) | (midpoint_N > axis.high)
    status_N = torch.where(
        varpro.converged(one, grid.box), int(FitStatus.CONVERGED), int(FitStatus.STEP_LIMIT)
    )
    status_N = torch.where(inside_N < 2, int(FitStatus.TOO_FEW_POINTS), status_N)
    at_bound_N = outside_N | (log_width_N >= grid.box.log_width[1])
    return torch.where(at_bound_N, int(FitStatus.AT_BOUND), status_N)
