"""One block of tokens through grid, refinement, errors and classes.

Shapes: N tokens, K probe steps, M sigmoids per token, P = 2M searched parameters, L = 1 + M linear
ones, C cells.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_tokscale.fit import classes, noise, varpro
from megatron_tokscale.fit.axis import MIN_PROBES, Axis
from megatron_tokscale.fit.grid import Grid
from megatron_tokscale.fit.noise import Residuals
from megatron_tokscale.fit.table import FitStatus, SigmoidFits, TokenClass
from megatron_tokscale.fit.varpro import Box, Search, Trajectories

_PAIR_STEPS, _MOST_STEPS = 3, 56
_ROUNDS = (2, 4, 8, 16, 24)
_RIVAL = 1.1
_ROUNDING = 1e-6
_INSIDE = 0.05
_MIN_PLATEAU = 2
_NAN = torch.nan
_ROW_VALUES, _GRID_VALUES = 2**19, 2**16

Columns = dict[str, Tensor]


@dataclass(frozen=True)
class Settings:
    """How to fit; see `fit_sigmoids`.

    Attributes:
        known_below: a flat token with a mean loss below this many nats is flat-known.
        chunk_tokens: tokens worked on at once.
    """

    known_below: float
    chunk_tokens: int


def fit_block(axis: Axis, grid: Grid, loss_NK: Tensor, settings: Settings) -> SigmoidFits:
    """Fit every token of a block."""
    whole_N = loss_NK.sum(dim=1).isfinite()
    if whole_N.all():
        columns = _fit_group(axis, grid, loss_NK, None, settings)
        columns["n_probes_N"] = torch.full_like(whole_N, axis.n_probes, dtype=torch.int32)
        return _as_fits(axis, columns)
    present_NK = loss_NK.isfinite()
    whole_N = present_NK.all(dim=1)
    timed_K = torch.tensor(axis.timed_K, device=loss_NK.device)
    enough_N = present_NK.sum(dim=1) >= MIN_PROBES
    enough_N &= (present_NK & timed_K).sum(dim=1) >= MIN_PROBES - 1
    columns = _unfitted(present_NK)
    for group_N in (whole_N, enough_N & ~whole_N):
        index_N = group_N.nonzero()[:, 0]
        if len(index_N):
            weight_NK = None if group_N is whole_N else present_NK[index_N].to(torch.float32)
            part = _fit_group(axis, grid, loss_NK[index_N], weight_NK, settings)
            for name, value_N in part.items():
                columns[name][index_N] = value_N.to(columns[name].dtype)
    return _as_fits(axis, columns)


_CODES = {
    "class_N": (TokenClass.UNFITTED, torch.int8),
    "runner_up_N": (TokenClass.UNFITTED, torch.int8),
    "status_N": (FitStatus.NON_FINITE, torch.int8),
    "n_probes_N": (0, torch.int32),
}


def _unfitted(present_NK: Tensor) -> Columns:
    """The columns of tokens of which nothing is known but how many losses they have."""
    shape, device = (len(present_NK),), present_NK.device
    columns = {name: torch.full(shape, _NAN, device=device) for name in SigmoidFits.columns()}
    for name, (value, dtype) in _CODES.items():
        columns[name] = torch.full(shape, int(value), dtype=dtype, device=device)
    columns["n_probes_N"] += present_NK.sum(dim=1, dtype=torch.int32)
    return columns


def _as_fits(axis: Axis, columns: Columns) -> SigmoidFits:
    types = {name: dtype for name, (_, dtype) in _CODES.items()}
    return SigmoidFits(
        axis.x_K,
        **{
            name: columns[name].to(types.get(name, torch.float32)).cpu().numpy()
            for name in SigmoidFits.columns()
        },
    )


@dataclass(frozen=True)
class Losses:
    """The losses of a group of tokens, scaled for the search.

    Attributes:
        data: losses less their mean, of unit variance; zero where there is nothing to fit.
        level_N: mean loss in nats.
        scale_N: standard deviation over the probes in nats.
        fall_N: first loss minus last, in nats.
        moves_N: whether the losses differ by more than rounding.
    """

    data: Trajectories
    level_N: Tensor
    scale_N: Tensor
    fall_N: Tensor
    moves_N: Tensor

    @staticmethod
    def scaled(loss_NK: Tensor, x_K: Tensor, weight_NK: Tensor | None) -> "Losses":
        """Scale losses in nats; `weight_NK` is 1 where there is one, 0 where it is missing."""
        dtype = torch.float64 if loss_NK.dtype == torch.float64 else torch.float32
        loss_KN = loss_NK.to(dtype).T
        weight_KN = None if weight_NK is None else weight_NK.T
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
        scale_N = (y_KN.square().sum(dim=0) / count).sqrt()
        moves_N = scale_N > _ROUNDING * loss_KN.abs().amax(dim=0)
        y_KN *= torch.where(moves_N, 1 / scale_N, 0)
        scale_N = torch.where(moves_N, scale_N, 1.0)
        data = Trajectories(y_KN.float(), x_K, weight_KN).tokens(slice(None))
        return Losses(data, level_N, scale_N, first_N - last_N, moves_N)


def _chunks(count: int, size: int) -> Iterator[slice]:
    """Slices that cover `count` tokens; one empty slice if there are none."""
    return (slice(start, start + size) for start in range(0, max(count, 1), size))


def _fitting(data: Trajectories, chunk_tokens: int, values: int) -> int:
    """Tokens whose losses are so many, on a CPU: what is made of them then stays in its caches."""
    return min(chunk_tokens, values // len(data.y_KN) + 1) if data.on_cpu else chunk_tokens


def _fit_group(
    axis: Axis,
    grid: Grid,
    loss_NK: Tensor,
    weight_NK: Tensor | None,
    settings: Settings,
) -> Columns:
    """Fit tokens that all have every loss, or that all miss some."""
    losses = Losses.scaled(loss_NK, grid.x_K, weight_NK)
    data, chunk_tokens = losses.data, settings.chunk_tokens
    one = fit_one(grid, data, chunk_tokens)
    parts = list(_chunks(len(data), _fitting(data, chunk_tokens, _ROW_VALUES)))
    looked = [_look_at(grid, data.tokens(part), one.tokens(part)) for part in parts]
    found = {name: torch.cat([each[name] for each in looked], -1) for name in looked[0]}
    sse = {
        "flat": torch.where(losses.moves_N, data.count_N, 0),
        "sigmoid": one.sse_N,
        "ramp": found["ramp_sse_N"],
    }
    hopeful = classes.in_reach(
        "two", one.sse_N - found["second_gain_N"], sse, data.count_N
    ).nonzero()[:, 0]
    two = fit_two(
        grid, data.tokens(hopeful), one.tokens(hopeful), found["second_N"][hopeful], chunk_tokens
    )
    two_sse_N = torch.full_like(one.sse_N, torch.inf)
    two_sse_N[hopeful] = torch.where(_is_two(grid, data.tokens(hopeful), two), two.sse_N, torch.inf)
    two_se_JN, phi_N = two.sse_N.new_empty(7, len(hopeful)), found["phi_N"].clone()
    for part in _chunks(len(hopeful), chunk_tokens):
        residuals = Residuals.from_fit(two.tokens(part), data.tokens(hopeful[part]))
        two_se_JN[:, part] = noise.standard_errors(two.tokens(part), residuals)
        phi_N[hopeful[part]] = torch.minimum(residuals.phi_N, phi_N[hopeful[part]])
    class_N, runner_up_N, evidence_N = classes.choose(
        sse | {"two": two_sse_N},
        one.drop_MN[0],
        losses.level_N,
        data.count_N,
        phi_N,
        settings.known_below,
    )
    columns: Columns = {
        "level_N": losses.level_N,
        "fall_N": losses.fall_N,
        "class_N": class_N,
        "runner_up_N": runner_up_N,
        "evidence_N": evidence_N,
        "autocorrelation_N": found["phi_N"],
    }
    columns |= _one_columns(axis, grid, losses, one, found)
    columns |= _ramp_columns(axis, losses, found, class_N == TokenClass.GRADUAL)
    of_two = class_N[hopeful] == TokenClass.TWO_STEP
    which = of_two.nonzero()[:, 0]
    for name, value_N in _two_columns(
        axis, losses, hopeful[which], two.tokens(which), two_se_JN[:, which]
    ).items():
        columns[name] = torch.full_like(losses.level_N, _NAN)
        columns[name][hopeful[which]] = value_N.to(columns[name].dtype)
    return columns


def settle(
    theta_PN: Tensor, linear_LN: Tensor, data: Trajectories, box: Box, chunk_tokens: int
) -> Search:
    """Descend from `theta_PN` to the bottom, a chunk at a time.

    In compiled loops every token takes the steps that it needs. Elsewhere all of a chunk take as
    many; after each round those that have not converged are packed together: the few that need
    many steps do not make the others take them.
    """
    first, *others = (_MOST_STEPS,) if data.on_cpu else _ROUNDS
    parts = []
    for part in _chunks(len(data), chunk_tokens):
        few = data.tokens(part)
        parts.append(varpro.descend(theta_PN[:, part], linear_LN[:, part], few, box, first))
    search = Search.join(parts)
    for steps in others:
        slow = (~varpro.converged(search, box)).nonzero()[:, 0]
        for part in _chunks(len(slow), chunk_tokens):
            index_N = slow[part]
            start = search.theta_PN[:, index_N], search.linear_LN[:, index_N]
            search.put(index_N, varpro.descend(*start, data.tokens(index_N), box, steps))
    return search


def fit_one(grid: Grid, data: Trajectories, chunk_tokens: int) -> Search:
    """The best sigmoid: the best cell of all, refined.

    Where the best cell of another band of widths comes within a tenth of the SSE reached, it is
    refined as well: it may lead to a lower bottom. So may a slower transition at the place of one
    that has become a jump between two probes.
    """
    small = _fitting(data, chunk_tokens, _GRID_VALUES)
    started = [grid.starts(data.tokens(part)) for part in _chunks(len(data), small)]
    theta_SPN = torch.stack(
        [torch.cat([starts[s][0] for starts in started], 1) for s in range(len(grid.bands))]
    )
    sse_SN = torch.stack(
        [torch.cat([starts[s][1] for starts in started]) for s in range(len(grid.bands))]
    )
    best_N = sse_SN.argmin(dim=0)
    theta_PN = theta_SPN.gather(0, best_N.expand(1, 2, -1))[0]
    search = settle(theta_PN, torch.zeros_like(theta_PN), data, grid.box, chunk_tokens)
    rival_SN = sse_SN < _RIVAL * search.sse_N
    rival_SN.scatter_(0, best_N[None], False)
    start, index_N = rival_SN.nonzero().T
    _try(search, index_N, theta_SPN[start, :, index_N].T, data, grid.box, chunk_tokens)
    sharp, theta_PN = grid.wider(search.theta_PN)
    _try(search, sharp, theta_PN, data, grid.box, chunk_tokens)
    return search


def _try(
    search: Search,
    index_N: Tensor,
    theta_PN: Tensor,
    data: Trajectories,
    box: Box,
    chunk_tokens: int,
) -> None:
    """Refine other starts of the tokens at `index_N` (in which one may be twice); keep the best."""
    linear_LN = theta_PN.new_zeros(2, len(index_N))
    other = settle(theta_PN, linear_LN, data.tokens(index_N), box, chunk_tokens)
    best_N = search.sse_N.scatter_reduce(0, index_N, other.sse_N, "amin")[index_N]
    better = (other.sse_N == best_N) & (other.sse_N < search.sse_N[index_N])
    search.put(index_N[better], other.tokens(better))


def _look_at(grid: Grid, data: Trajectories, one: Search) -> Columns:
    """What else the losses and the residuals of the best sigmoid say, for one chunk of tokens."""
    residuals = Residuals.from_fit(one, data)
    second_N, second_gain_N = grid.second(residuals, data)
    onset_N, slope_N, ramp_level_N, ramp_sse_N = grid.ramp(data)
    s_KN, x_K1 = residuals.s_KN, data.x_K[:, None]
    before_KN, after_KN = s_KN >= 1 - _INSIDE, s_KN <= _INSIDE
    if data.weight_KN is not None:
        after_KN &= data.weight_KN > 0
    left_N = torch.where(before_KN, x_K1, -torch.inf).amax(dim=0)
    right_N = torch.where(after_KN, x_K1, torch.inf).amin(dim=0)
    inside_N = data.count_N - before_KN.sum(dim=0) - after_KN.sum(dim=0)
    return {
        "phi_N": residuals.phi_N,
        "variance_N": residuals.variance_N,
        "inside_N": inside_N,
        "left_N": left_N,
        "right_N": right_N,
        "s_length_N": s_KN.square().sum(dim=0),
        "s_sum_N": s_KN.sum(dim=0),
        "se_JN": noise.standard_errors(one, residuals),
        "second_N": second_N,
        "second_gain_N": second_gain_N,
        "onset_N": onset_N,
        "slope_N": slope_N,
        "ramp_level_N": ramp_level_N,
        "ramp_sse_N": ramp_sse_N,
    }


def fit_two(
    grid: Grid, data: Trajectories, one: Search, second_N: Tensor, chunk_tokens: int
) -> Search:
    """Two sigmoids, from two starts; after a few steps the better of them goes on.

    One start is the best sigmoid and the cell that adds most to it, the other the best pair of
    coarse cells: two steps that the best sigmoid takes for a single slow one, or down and up.
    """
    second_PN = grid.coarse_PC[:, second_N]
    theta_PN = torch.stack([one.theta_PN[0], second_PN[0], one.theta_PN[1], second_PN[1]])
    linear_LN = torch.cat([one.linear_LN, torch.zeros_like(one.linear_LN[:1])])
    parts = []
    for part in _chunks(len(data), chunk_tokens):
        few = data.tokens(part)
        added = varpro.descend(theta_PN[:, part], linear_LN[:, part], few, grid.box, _PAIR_STEPS)
        small = _fitting(data, chunk_tokens, _GRID_VALUES)
        cells = [grid.pair(few.tokens(each)) for each in _chunks(len(few), small)]
        nothing_LN = torch.zeros_like(linear_LN[:, part])
        pair = varpro.descend(torch.cat(cells, 1), nothing_LN, few, grid.box, _PAIR_STEPS)
        parts.append(added.where(added.sse_N <= pair.sse_N, pair))
    chosen = Search.join(parts)
    return settle(chosen.theta_PN, chosen.linear_LN, data, grid.box, chunk_tokens)


def _is_two(grid: Grid, data: Trajectories, two: Search) -> Tensor:
    """Whether both midpoints are inside the probed range, with two probes or more between them.

    A single probe between two steps is an outlier, not a state of the token (our choice).
    """
    midpoint_MN = two.theta_PN[:2]
    before_MKN = grid.x_K[:, None] < midpoint_MN[:, None]
    if data.weight_KN is not None:
        before_MKN = before_MKN & (data.weight_KN > 0)
    before_MN = before_MKN.sum(dim=1)
    inside_MN = (midpoint_MN >= 0) & (midpoint_MN <= 1)
    return ((before_MN[0] - before_MN[1]).abs() >= _MIN_PLATEAU) & inside_MN.all(dim=0)


def _one_columns(axis: Axis, grid: Grid, losses: Losses, one: Search, found: Columns) -> Columns:
    """Status, and the columns of the one-sigmoid fit.

    A constant token has a floor and no drop; where it would fall or how fast is not known.
    With fewer than two probes where 0.05 < s < 0.95 neither c nor w is a smooth function of the
    losses there: c is then uniform between the probes on either side (their distance over sqrt 12),
    w has no error, and f and A have those of c and w held fixed.
    """
    moves_N, count_N = losses.moves_N, losses.data.count_N
    floor_se_N, drop_se_N, midpoint_se_N, width_se_N = found["se_JN"]
    smooth_N = found["inside_N"] >= 2
    fixed_N = noise.inflation(found["phi_N"], torch.ones_like(found["phi_N"])) * found["variance_N"]
    spread_N = (found["s_length_N"] - found["s_sum_N"].square() / count_N).clamp_min(1e-12)
    floor_fixed_N = (fixed_N * found["s_length_N"] / (count_N * spread_N)).sqrt()
    drop_fixed_N = (fixed_N / spread_N).sqrt()
    gap_N = found["right_N"] - found["left_N"].clamp_min(grid.box.midpoint[0])
    floor_se_N = torch.where(smooth_N, floor_se_N, floor_fixed_N)
    drop_se_N = torch.where(smooth_N, drop_se_N, drop_fixed_N)
    midpoint_se_N = torch.where(smooth_N, midpoint_se_N, gap_N / math.sqrt(12))
    width_se_N = torch.where(smooth_N, width_se_N, _NAN)
    midpoint_N, log_width_N = one.theta_PN
    unknown_N = midpoint_se_N * classes.student(count_N - 4) > 0.5
    at_bound_N = (midpoint_N < 0) | (midpoint_N > 1) | (log_width_N >= grid.box.log_width[1])
    status_N = torch.where(
        varpro.converged(one, grid.box), int(FitStatus.CONVERGED), int(FitStatus.STEP_LIMIT)
    )
    status_N = torch.where(smooth_N, status_N, int(FitStatus.TOO_FEW_POINTS))
    status_N = torch.where(unknown_N, int(FitStatus.UNDETERMINED), status_N)
    status_N = torch.where(at_bound_N, int(FitStatus.AT_BOUND), status_N)
    has_errors_N = moves_N & ~at_bound_N
    status_N = torch.where(moves_N, status_N, int(FitStatus.CONVERGED))
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


def _ramp_columns(axis: Axis, losses: Losses, found: Columns, gradual_N: Tensor) -> Columns:
    """Onset, slope and the loss before the onset, of gradual tokens."""
    values = {
        "onset_N": axis.low + axis.span * found["onset_N"],
        "slope_N": found["slope_N"] * losses.scale_N / axis.span,
        "onset_loss_N": losses.level_N + found["ramp_level_N"] * losses.scale_N,
    }
    return {name: torch.where(gradual_N, value_N, _NAN) for name, value_N in values.items()}


def _two_columns(
    axis: Axis, losses: Losses, index_N: Tensor, two: Search, se_JN: Tensor
) -> Columns:
    """Floor, and drop, midpoint and width of the earlier and the later transition."""
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
