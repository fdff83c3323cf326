"""The columns of a fit: parameters, standard errors and status, in nats and units of x.

Shapes: N tokens, K probe steps, M sigmoids per token, J parameters (floor, M drops, M midpoints, M
widths).
"""

import math
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from megatron_tokscale.fit import classes, noise, varpro
from megatron_tokscale.fit.grid import Grid
from megatron_tokscale.fit.probe_axis import ProbeAxis
from megatron_tokscale.fit.search import Search, Trajectories
from megatron_tokscale.fit.table import FitStatus, SigmoidFits, TokenClass

_ROUNDING = 1e-6
"""Least standard deviation of a trajectory that moves, over its largest loss: eight times the
resolution of float32. Below it, only rounding distinguishes the losses."""
_FEWEST_INSIDE = 2
"""Fewest probes inside a transition for errors of its midpoint and width; our choice: with fewer,
neither is a smooth function of the losses."""
_LEAST_SPREAD = 1e-12
"""Least sum of squares of s about its mean, so that no denominator is zero."""
_UNDETERMINED_FROM = 0.5
"""Half the length of the 95% interval of a midpoint, in units of the probed range, from which the
midpoint counts as undetermined. Our choice: the whole interval is then as long as the range."""
_NAN = torch.nan

Columns = dict[str, Tensor]

_CODES = {
    "class_N": (TokenClass.UNFITTED, torch.int8),
    "runner_up_N": (TokenClass.UNFITTED, torch.int8),
    "status_N": (FitStatus.NON_FINITE, torch.int8),
    "n_probes_N": (0, torch.int32),
}
"""Columns of whole numbers: their value for a token that is not fitted, and their type."""


def unfitted_columns(present_NK: Tensor) -> Columns:
    """Return the columns of tokens that are not fitted, with the number of losses of each."""
    shape, device = (len(present_NK),), present_NK.device
    columns = {name: torch.full(shape, _NAN, device=device) for name in SigmoidFits.columns()}
    for name, (value, dtype) in _CODES.items():
        columns[name] = torch.full(shape, int(value), dtype=dtype, device=device)
    columns["n_probes_N"] += present_NK.sum(dim=1, dtype=torch.int32)
    return columns


def as_fits(axis: ProbeAxis, columns: Columns) -> SigmoidFits:
    """Return the columns as a table of fits."""
    types = {name: dtype for name, (_, dtype) in _CODES.items()}
    return SigmoidFits(
        axis.x_K,
        **{
            name: columns[name].to(types.get(name, torch.float32)).cpu().numpy()
            for name in SigmoidFits.columns()
        },
    )


@dataclass(frozen=True)
class ScaledLosses:
    """The losses of a group of tokens, scaled to mean 0 and variance 1 for the search.

    Attributes:
        data: the scaled losses; zero for a token that does not move.
        level_N: mean loss in nats.
        scale_N: standard deviation over the probes in nats; 1 for a token that does not move.
        fall_N: first loss minus last, in nats.
        moves_N: true if the losses differ by more than rounding.
    """

    data: Trajectories
    level_N: Tensor
    scale_N: Tensor
    fall_N: Tensor
    moves_N: Tensor

    @classmethod
    def from_losses(cls, loss_NK: Tensor, x_K: Tensor, weight_NK: Tensor | None) -> Self:
        """Scale losses in nats; `weight_NK` is 1 where there is a loss, 0 where it is missing."""
        dtype = torch.float64 if loss_NK.dtype == torch.float64 else torch.float32
        loss_KN = loss_NK.to(dtype).T
        weight_KN = None if weight_NK is None else weight_NK.T
        # Mean, first and last of the losses that are not missing.
        if weight_KN is None:
            level_N = loss_KN.mean(dim=0)
            y_KN = loss_KN - level_N
            first_N, last_N = loss_KN[0], loss_KN[-1]
            count: Tensor | int = len(loss_KN)
        else:
            count = weight_KN.sum(dim=0)
            loss_KN = torch.where(weight_KN > 0, loss_KN, 0)
            level_N = loss_KN.sum(dim=0) / count
            y_KN = (loss_KN - level_N) * weight_KN
            first = weight_KN.argmax(dim=0, keepdim=True)
            last = len(weight_KN) - 1 - weight_KN.flip(0).argmax(dim=0, keepdim=True)
            first_N, last_N = (loss_KN.gather(0, which)[0] for which in (first, last))
        # Unit variance for the tokens that move.
        scale_N = (y_KN.square().sum(dim=0) / count).sqrt()
        moves_N = scale_N > _ROUNDING * loss_KN.abs().amax(dim=0)
        y_KN *= torch.where(moves_N, 1 / scale_N, 0)
        scale_N = torch.where(moves_N, scale_N, 1.0)
        data = Trajectories(y_KN.float(), x_K, weight_KN).tokens(slice(None))
        return cls(data, level_N, scale_N, first_N - last_N, moves_N)


def one_columns(
    axis: ProbeAxis, grid: Grid, losses: ScaledLosses, one: Search, found: Columns
) -> Columns:
    """Return the status and the columns of the one-sigmoid fit.

    A constant token has a drop of zero; its midpoint and width are NaN. With fewer than two probes
    inside the transition, the losses determine the midpoint c only to the distance of the probes on
    either side. So c counts as uniformly distributed between them, with their distance over sqrt 12
    as its standard error. Width w then has no error, and floor f and drop A have their errors for
    fixed c and w.
    """
    # Standard errors, in units of the scaled losses and of the probed range.
    moves_N, count_N = losses.moves_N, losses.data.count_N
    floor_se_N, drop_se_N, midpoint_se_N, width_se_N = found["se_JN"]
    smooth_N = found["inside_N"] >= _FEWEST_INSIDE
    fixed_N = noise.inflation(found["phi_N"], torch.ones_like(found["phi_N"])) * found["variance_N"]
    spread_N = (found["s_length_N"] - found["s_sum_N"].square() / count_N).clamp_min(_LEAST_SPREAD)
    floor_fixed_N = (fixed_N * found["s_length_N"] / (count_N * spread_N)).sqrt()
    drop_fixed_N = (fixed_N / spread_N).sqrt()
    gap_N = found["right_N"] - found["left_N"].clamp_min(grid.box.midpoint[0])
    floor_se_N = torch.where(smooth_N, floor_se_N, floor_fixed_N)
    drop_se_N = torch.where(smooth_N, drop_se_N, drop_fixed_N)
    midpoint_se_N = torch.where(smooth_N, midpoint_se_N, gap_N / math.sqrt(12))
    width_se_N = torch.where(smooth_N, width_se_N, _NAN)
    # Status; where several hold, the last of these lines decides.
    midpoint_N, log_width_N = one.theta_PN
    unknown_N = (
        midpoint_se_N * classes.student(count_N - classes.PARAMETERS["sigmoid"])
        > _UNDETERMINED_FROM
    )
    at_bound_N = (midpoint_N < 0) | (midpoint_N > 1) | (log_width_N >= grid.box.log_width[1])
    status_N = torch.where(
        varpro.converged(one, grid.box), int(FitStatus.CONVERGED), int(FitStatus.STEP_LIMIT)
    )
    status_N = torch.where(smooth_N, status_N, int(FitStatus.TOO_FEW_POINTS))
    status_N = torch.where(unknown_N, int(FitStatus.UNDETERMINED), status_N)
    status_N = torch.where(at_bound_N, int(FitStatus.AT_BOUND), status_N)
    has_errors_N = moves_N & ~at_bound_N
    status_N = torch.where(moves_N, status_N, int(FitStatus.CONVERGED))
    # Values in nats and in units of x; NaN where a value is not known.
    scale_N = losses.scale_N
    drop_N = torch.where(moves_N, one.drop_MN[0], 0)
    floor_N = torch.where(moves_N, one.linear_LN[0], 0)
    known = {
        "midpoint_N": (axis.low + axis.span * midpoint_N.double(), moves_N),
        "width_N": (axis.span * log_width_N.exp(), moves_N),
        "r2_N": (1 - one.sse_N / count_N, moves_N),
        "floor_se_N": (floor_se_N * scale_N, has_errors_N),
        "drop_se_N": (drop_se_N * scale_N, has_errors_N),
        "midpoint_se_N": (midpoint_se_N * axis.span, has_errors_N),
        "width_se_N": (width_se_N * axis.span, has_errors_N),
    }
    return {
        "status_N": status_N,
        "floor_N": losses.level_N + floor_N * scale_N,
        "drop_N": drop_N * scale_N,
        "sse_N": torch.where(moves_N, one.sse_N, 0) * scale_N.square(),
    } | {name: torch.where(known_N, value_N, _NAN) for name, (value_N, known_N) in known.items()}


def ramp_columns(
    axis: ProbeAxis, losses: ScaledLosses, found: Columns, gradual_N: Tensor
) -> Columns:
    """Return onset, slope and the loss before the onset of gradual tokens; NaN for others."""
    values = {
        "onset_N": axis.low + axis.span * found["onset_N"],
        "slope_N": found["slope_N"] * losses.scale_N / axis.span,
        "onset_loss_N": losses.level_N + found["ramp_level_N"] * losses.scale_N,
    }
    return {name: torch.where(gradual_N, value_N, _NAN) for name, value_N in values.items()}


def two_columns(
    axis: ProbeAxis, losses: ScaledLosses, index_N: Tensor, two: Search, se_JN: Tensor
) -> Columns:
    """Return the floor, and drop, midpoint and width of the earlier and the later transition."""
    scale_N = losses.scale_N[index_N]
    midpoint_MN, log_width_MN = two.theta_PN.chunk(2)
    order_MN = midpoint_MN.argsort(dim=0)
    values = {
        "drop": two.drop_MN * scale_N,
        "midpoint": axis.low + axis.span * midpoint_MN.double(),
        "width": axis.span * log_width_MN.exp(),
        "midpoint_se": se_JN[3:5] * axis.span,
    }
    columns = {"steps_floor_N": losses.level_N[index_N] + two.linear_LN[0] * scale_N}
    for name, value_MN in values.items():
        for m, ordered_N in enumerate(value_MN.gather(0, order_MN), start=1):
            columns[f"step{m}_{name}_N"] = ordered_N
    return columns
