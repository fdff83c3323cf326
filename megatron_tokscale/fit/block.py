"""The fit of one block of tokens: grid search, descent, standard errors, classes.

SSE is the sum of squared residuals of a model. A start is the point (midpoints, log-widths) from
which a descent begins.

Shapes: N tokens, K probe steps, M sigmoids per token, P = 2M searched parameters, L = 1 + M linear
parameters, J parameters in all (floor, M drops, M midpoints, M widths), S starts.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_tokscale.fit import classes, noise, varpro
from megatron_tokscale.fit.columns import (
    Columns,
    ScaledLosses,
    as_fits,
    one_columns,
    ramp_columns,
    two_columns,
    unfitted_columns,
)
from megatron_tokscale.fit.grid import Grid
from megatron_tokscale.fit.noise import Residuals
from megatron_tokscale.fit.probe_axis import MIN_PROBES, ProbeAxis
from megatron_tokscale.fit.search import Box, Search, Trajectories
from megatron_tokscale.fit.table import SigmoidFits, TokenClass

_MOST_STEPS = 56
"""Most Gauss-Newton steps of one token in the compiled loops; our choice. A token that needs more
has the status STEP_LIMIT. Tokens take 7 to 15 steps on average
(benchmarks/results/fit_throughput.md)."""
_ROUNDS = (2, 4, 8, 16, 24)
"""Steps of each round on a GPU, about `_MOST_STEPS` in all. After each round the tokens that have
not converged are packed together. The rounds grow, since fewer tokens need each further step, and
packing takes time. Our choice."""
_PAIR_STEPS = 3
"""Steps from each of the two starts of two sigmoids, before only the better one continues. Our
choice: few steps show which start is in the better basin, and the search for two sigmoids takes the
most time of the fit."""
_RIVAL_SSE = 1.1
"""SSE of the best cell of another band of widths, over the SSE reached, below which a descent from
that cell is tried too. Our choice: a larger value costs descents in vain, a smaller one misses
lower bottoms, since a cell's SSE is above the SSE at the bottom that it leads to. With this value
0% to 0.2% of planted sigmoids end in a wrong basin (benchmarks/results/fit_accuracy.md)."""
_INSIDE = 0.05
"""A probe is inside a transition if s there is more than this above 0 and below 1; our choice."""
_MIN_PLATEAU = 2
"""Least number of probes between the two transitions of a two-step token. Our choice: a single
probe between two steps is an outlier, not a state of the token."""
_ROW_VALUES = 2**19
"""Losses of a chunk on a CPU for the residuals and their tangents, which take several rows per
token: 2 MB in float32, so that the rows stay in the CPU's caches."""
_GRID_VALUES = 2**16
"""Losses of a chunk on a CPU for the grid search, whose table has a row per cell: 256 kB in
float32, so that the table stays in the CPU's caches."""


@dataclass(frozen=True)
class BlockSettings:
    """Settings of the fit of a block of tokens; see `fit_sigmoids`.

    Attributes:
        known_below: a flat token with a mean loss below this many nats is flat-known.
        chunk_tokens: number of tokens worked on at a time.
    """

    known_below: float
    chunk_tokens: int


def fit_block(axis: ProbeAxis, grid: Grid, loss_NK: Tensor, settings: BlockSettings) -> SigmoidFits:
    """Fit every token of a block; tokens with too few finite losses stay unfitted."""
    # The usual case: no loss is missing, or is not finite.
    whole_N = loss_NK.sum(dim=1).isfinite()
    if whole_N.all():
        columns = _fit_group(axis, grid, loss_NK, None, settings)
        columns["n_probes_N"] = torch.full_like(whole_N, axis.n_probes, dtype=torch.int32)
        return as_fits(axis, columns)
    # Tokens that have all losses, and tokens that miss some, are fitted as two groups.
    present_NK = loss_NK.isfinite()
    whole_N = present_NK.all(dim=1)
    timed_K = torch.tensor(axis.timed_K, device=loss_NK.device)
    enough_N = present_NK.sum(dim=1) >= MIN_PROBES
    enough_N &= (present_NK & timed_K).sum(dim=1) >= MIN_PROBES - 1
    columns = unfitted_columns(present_NK)
    for group_N in (whole_N, enough_N & ~whole_N):
        index_N = group_N.nonzero()[:, 0]
        if len(index_N):
            weight_NK = None if group_N is whole_N else present_NK[index_N].to(torch.float32)
            part = _fit_group(axis, grid, loss_NK[index_N], weight_NK, settings)
            for name, value_N in part.items():
                columns[name][index_N] = value_N.to(columns[name].dtype)
    return as_fits(axis, columns)


def _chunks(count: int, size: int) -> Iterator[slice]:
    """Return slices that cover `count` tokens; one empty slice if there are none."""
    return (slice(start, start + size) for start in range(0, max(count, 1), size))


def _cached_tokens(data: Trajectories, chunk_tokens: int, values: int) -> int:
    """Return the tokens of a chunk of `values` losses on a CPU; on a GPU, `chunk_tokens`."""
    return min(chunk_tokens, values // len(data.y_KN) + 1) if data.on_cpu else chunk_tokens


def _fit_group(
    axis: ProbeAxis,
    grid: Grid,
    loss_NK: Tensor,
    weight_NK: Tensor | None,
    settings: BlockSettings,
) -> Columns:
    """Fit a group of tokens; `weight_NK` is None if no token of the group misses a loss."""
    # The best sigmoid of every token, its noise and its errors, and the best ramp.
    losses = ScaledLosses.from_losses(loss_NK, grid.x_K, weight_NK)
    data, chunk_tokens = losses.data, settings.chunk_tokens
    one = fit_one(grid, data, chunk_tokens)
    parts = list(_chunks(len(data), _cached_tokens(data, chunk_tokens, _ROW_VALUES)))
    by_part = [_examine(grid, data.tokens(part), one.tokens(part)) for part in parts]
    found = {name: torch.cat([each[name] for each in by_part], -1) for name in by_part[0]}
    sse = {
        "flat": torch.where(losses.moves_N, data.count_N, 0),
        "sigmoid": one.sse_N,
        "ramp": found["ramp_sse_N"],
    }
    # Two sigmoids, only for the tokens that they may describe better than all other models.
    hopeful = classes.in_reach(
        "two", one.sse_N - found["second_gain_N"], sse, data.count_N
    ).nonzero()[:, 0]
    two = fit_two(
        grid, data.tokens(hopeful), one.tokens(hopeful), found["second_N"][hopeful], chunk_tokens
    )
    # SSE, errors and noise of the two sigmoids of those tokens.
    two_sse_N = torch.full_like(one.sse_N, torch.inf)
    two_sse_N[hopeful] = torch.where(_is_two(grid, data.tokens(hopeful), two), two.sse_N, torch.inf)
    two_se_JN, phi_N = two.sse_N.new_empty(7, len(hopeful)), found["phi_N"].clone()
    for part in _chunks(len(hopeful), chunk_tokens):
        residuals = Residuals.from_fit(two.tokens(part), data.tokens(hopeful[part]))
        two_se_JN[:, part] = noise.standard_errors(two.tokens(part), residuals)
        phi_N[hopeful[part]] = torch.minimum(residuals.phi_N, phi_N[hopeful[part]])
    # The class of every token: the model with the lowest criterion.
    class_N, runner_up_N, evidence_N = classes.choose(
        sse | {"two": two_sse_N},
        one.drop_MN[0],
        losses.level_N,
        data.count_N,
        phi_N,
        settings.known_below,
    )
    # The columns of each model; the columns of two sigmoids are NaN except for two-step tokens.
    columns: Columns = {
        "level_N": losses.level_N,
        "fall_N": losses.fall_N,
        "class_N": class_N,
        "runner_up_N": runner_up_N,
        "evidence_N": evidence_N,
        "autocorrelation_N": found["phi_N"],
    }
    columns |= one_columns(axis, grid, losses, one, found)
    columns |= ramp_columns(axis, losses, found, class_N == TokenClass.GRADUAL)
    of_two = class_N[hopeful] == TokenClass.TWO_STEP
    which = of_two.nonzero()[:, 0]
    for name, value_N in two_columns(
        axis, losses, hopeful[which], two.tokens(which), two_se_JN[:, which]
    ).items():
        columns[name] = torch.full_like(losses.level_N, torch.nan)
        columns[name][hopeful[which]] = value_N.to(columns[name].dtype)
    return columns


def settle(
    theta_PN: Tensor, linear_LN: Tensor, data: Trajectories, box: Box, chunk_tokens: int
) -> Search:
    """Descend from `theta_PN` until the search of each token has converged, a chunk at a time.

    On a CPU each token takes just the steps that it needs. On a GPU all tokens of a chunk take the
    same number of steps: after each round the tokens that have not converged are packed together,
    so that few tokens take the steps of the long rounds.
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
    """Return the best sigmoid of each token: the end of the descent from the best cell.

    Other starts may lead to a lower SSE, and are tried too: the best cell of another band of widths
    if its SSE is close (`_RIVAL_SSE`), and a wider sigmoid in the place of a jump (`Grid.wider`).
    """
    # The best cell of each band of widths; a descent from the best of these cells.
    small = _cached_tokens(data, chunk_tokens, _GRID_VALUES)
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
    # Descents from the best cells of other bands.
    rival_SN = sse_SN < _RIVAL_SSE * search.sse_N
    rival_SN.scatter_(0, best_N[None], False)
    start, index_N = rival_SN.nonzero().T
    _try(search, index_N, theta_SPN[start, :, index_N].T, data, grid.box, chunk_tokens)
    # Descents from wider starts in the place of jumps.
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
    """Descend from other starts, and put each end that has a lower SSE into `search`.

    `index_N` has the token of each start; a token may have several starts.
    """
    linear_LN = theta_PN.new_zeros(2, len(index_N))
    other = settle(theta_PN, linear_LN, data.tokens(index_N), box, chunk_tokens)
    best_N = search.sse_N.scatter_reduce(0, index_N, other.sse_N, "amin")[index_N]
    better = (other.sse_N == best_N) & (other.sse_N < search.sse_N[index_N])
    search.put(index_N[better], other.tokens(better))


def _examine(grid: Grid, data: Trajectories, one: Search) -> Columns:
    """Return the noise, errors, best second cell and best ramp of one chunk of tokens, by name."""
    residuals = Residuals.from_fit(one, data)
    second_N, second_gain_N = grid.second(residuals, data)
    onset_N, slope_N, ramp_level_N, ramp_sse_N = grid.ramp(data)
    # The number of probes inside the transition, and the nearest probe on either side of it.
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
    """Return the best two sigmoids of each token, from the better of two starts.

    One start is the best single sigmoid with the coarse cell `second_N`, which lowers its SSE most.
    The other is the best pair of coarse cells. It finds two steps that a single sigmoid describes
    as one slow step, and a step down with a step up. A descent of `_PAIR_STEPS` steps from each
    shows which one is better.
    """
    second_PN = grid.coarse_PC[:, second_N]
    theta_PN = torch.stack([one.theta_PN[0], second_PN[0], one.theta_PN[1], second_PN[1]])
    linear_LN = torch.cat([one.linear_LN, torch.zeros_like(one.linear_LN[:1])])
    parts = []
    for part in _chunks(len(data), chunk_tokens):
        few = data.tokens(part)
        added = varpro.descend(theta_PN[:, part], linear_LN[:, part], few, grid.box, _PAIR_STEPS)
        small = _cached_tokens(data, chunk_tokens, _GRID_VALUES)
        cells = [grid.pair(few.tokens(each)) for each in _chunks(len(few), small)]
        nothing_LN = torch.zeros_like(linear_LN[:, part])
        pair = varpro.descend(torch.cat(cells, 1), nothing_LN, few, grid.box, _PAIR_STEPS)
        parts.append(added.where(added.sse_N <= pair.sse_N, pair))
    chosen = Search.join(parts)
    return settle(chosen.theta_PN, chosen.linear_LN, data, grid.box, chunk_tokens)


def _is_two(grid: Grid, data: Trajectories, two: Search) -> Tensor:
    """Return a mask of the tokens whose two transitions count as two steps.

    Both midpoints must lie in the probed range, with `_MIN_PLATEAU` or more probes between them.
    """
    midpoint_MN = two.theta_PN[:2]
    before_MKN = grid.x_K[:, None] < midpoint_MN[:, None]
    if data.weight_KN is not None:
        before_MKN = before_MKN & (data.weight_KN > 0)
    before_MN = before_MKN.sum(dim=1)
    inside_MN = (midpoint_MN >= 0) & (midpoint_MN <= 1)
    return ((before_MN[0] - before_MN[1]).abs() >= _MIN_PLATEAU) & inside_MN.all(dim=0)
