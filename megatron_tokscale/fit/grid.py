"""The global search: the best cells of a grid of (midpoint, width), by one matrix product.

A cell is a pair (midpoint c, width w). Its curve is the sigmoid s((c - x)/w) at the probes' x
(docs/references.md 1.4). Floor and drop need no search: for a centred loss y and a centred curve u
of unit length the best drop lowers the SSE (the sum of squared residuals) by (u . y)^2, the gain of
the cell.

A cell is only a start: the descent from it moves midpoint and width freely. So the grid is just
fine enough for the best cell to lie in the right basin, the region from which the descent leads to
the lowest SSE. The grid is our choice. benchmarks/results/fit_accuracy.md has the share of wrong
basins, benchmarks/results/fit_throughput.md the cost.

All x are in units of the probed range: 0 at the first finite probe, 1 at the last.

Shapes: N tokens, K probe steps, B bins of probes, C cells, P = 2 parameters of a cell, or 4 of a
pair of cells (midpoints, then log-widths).
"""

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Self

import numpy as np
import torch
from scipy.special import expit
from torch import Tensor

from megatron_tokscale.core.arrays import Floats, Integers
from megatron_tokscale.fit.noise import Residuals
from megatron_tokscale.fit.probe_axis import ProbeAxis
from megatron_tokscale.fit.search import Box, Trajectories

_MOST_BINS = 96
"""Most bins of probes; with more probes, neighbours share a bin. The cost of the search grows with
the bins, and a cell needs only to find the basin. Our choice."""
_WIDTHS_PER_OCTAVE = 1.5
"""Widths per factor of two: neighbouring widths differ by a factor of 1.6. Our choice."""
_CELLS_PER_WIDTH = 1.5
"""Midpoints per width: neighbouring midpoints are two thirds of a width apart, so that their curves
overlap. Our choice."""
_REACH = 2.5
"""Largest distance of a midpoint from the nearest bin, in widths. Beyond it, s differs from 0 or 1
by less than 0.08 at every bin, so that the curve is nearly a step between two bins."""
_FINEST = 1e-3
"""Least width of the regular grid, in units of the probed range; our choice. Probes may come in
bursts, whose small spacing would make the grid very fine everywhere."""
_BANDS = 3
"""Bands of widths: narrow, middle and wide. The best cell of each band is a start. Our choice."""
_COARSE = ((32, 40), (8, 10))
"""Coarse cells for a second sigmoid, as (number of midpoints, probed range over width): 32 with a
width of a fortieth of the range, and 8 with a tenth. Our choice: the 780 pairs of them are tried
for each token, so their number is small."""
_NEARLY_SAME = 0.99
"""Cosine of two centred coarse curves above which they are no pair: the best fit of two such
curves has large drops of opposite signs. Our choice."""
_INDEX_BITS = 12
"""Bits of a float32 that hold the number of a cell in `_argmax_size`. They number up to 4,095
cells; the 11 bits that remain of the mantissa keep the value to 5e-4."""
_NEARLY_SPANNED = 1e-2
"""Least squared length of a coarse curve's part outside of the tangents of the first sigmoid; it
is at most about K/4. Below it, the curve counts as a move of the first sigmoid, and has no gain.
Our choice."""
_LEAST_LENGTH = 1e-3
"""Least length of a centred curve over all probes. A cell with a shorter curve is dropped: the
curve is flat over the probes, and its best drop could be a thousand times the losses themselves."""
_LEAST_SPREAD = 1e-6
"""Square of `_LEAST_LENGTH`, for a curve over the losses that a token has."""
_RAMP_ONSETS = 32
"""Onsets of ramps. Our choice: the SSE of a ramp is not refined, and changes little from one onset
to the next."""
_LATEST_ONSET = 2 / 3
"""Latest onset of a ramp, in units of the probed range; our choice. A shorter ramp looks like the
beginning of a step."""
_SHARP = (4, 8)
"""Distance of two neighbouring bins over the width of a step between them. At the bins, such steps
are complete to 12% and to 2%."""
_JUMP = 5
"""Distance of two neighbouring probes over the width of a sigmoid, above which the sigmoid between
them is a jump (`Grid.wider`). Halfway between the two probes, s is then within 8% of 0 and 1 at
them. Our choice."""


@dataclass(frozen=True)
class Grid:
    """The grid of a probe axis: its cells and their curves, over bins of the probes.

    Attributes:
        bin_BK: 1 where a probe belongs to a bin; None if every probe is a bin of its own.
        theta_PC: midpoint and log-width of each cell, by ascending width.
        curve_CB: curve of each cell, averaged over each bin.
        unit_CB: `curve_CB`, centred and of unit length over all probes.
        bands: the cells of each band of widths, narrow to wide.
        x_K: the probes' x; step 0 has a finite x far left of the others.
        ramp_onset_C: onset of each ramp. A ramp is constant until its onset, then straight.
        ramp_CK: curve of each ramp, with a slope of one.
        coarse_PC: midpoint and log-width of each coarse cell, for a second sigmoid.
        coarse_CK: curve of each coarse cell.
        pair_PC: midpoints, then log-widths of each pair of coarse cells.
        pair_CK: an orthonormal basis of the two curves of each pair: the sums of all pairs, then
            the differences of all pairs.
        box: bounds of the search.
    """

    bin_BK: Tensor | None
    theta_PC: Tensor
    curve_CB: Tensor
    unit_CB: Tensor
    bands: tuple[slice, ...]
    x_K: Tensor
    ramp_onset_C: Tensor
    ramp_CK: Tensor
    coarse_PC: Tensor
    coarse_CK: Tensor
    pair_PC: Tensor
    pair_CK: Tensor
    box: Box

    @classmethod
    def over(cls, axis: ProbeAxis, device: torch.device) -> Self:
        """Lay the grid over an axis; `_cells` describes its cells."""

        def tensor(array: Floats) -> Tensor:
            return torch.tensor(np.ascontiguousarray(array), dtype=torch.float32, device=device)

        # Bins of probes, and cells over the bins whose probes have a finite x.
        x_K = axis.unit_K
        bin_K = _bins(axis)
        x_B = np.array([x_K[bin_K == b].mean() for b in range(bin_K[-1] + 1)])
        timed_B = x_B[np.unique(bin_K[axis.timed_K])]
        cells = _cells(timed_B, axis)
        # Curves of the cells, averaged over each bin; centred and of unit length over all probes.
        curve_KC = expit((cells[0] - x_K[:, None]) / np.exp(cells[1]))
        bin_KB = np.eye(len(x_B))[bin_K]
        curve_BC = (bin_KB / bin_KB.sum(axis=0)).T @ curve_KC
        count_B = bin_KB.sum(axis=0)[:, None]
        centred_BC = curve_BC - (curve_BC * count_B).sum(axis=0) / len(x_K)
        length_C = np.sqrt((centred_BC**2 * count_B).sum(axis=0))
        usable_C = length_C > _LEAST_LENGTH
        cells, curve_BC = cells[:, usable_C], curve_BC[:, usable_C]
        unit_BC = centred_BC[:, usable_C] / length_C[usable_C]
        # Bands of widths: the ratio of the widest to the narrowest is the same in each.
        width_edges = np.geomspace(np.exp(cells[1, 0]), np.exp(cells[1, -1]), _BANDS + 1)[1:-1]
        edges = [0, *np.searchsorted(cells[1], np.log(width_edges)), cells.shape[1]]
        # Onsets of ramps; coarse cells, alone and in pairs.
        onset_C = np.linspace(0, _LATEST_ONSET, _RAMP_ONSETS)
        coarse = np.array(
            [
                (midpoint, -np.log(narrowness))
                for count, narrowness in _COARSE
                for midpoint in np.linspace(0, 1, count + 2)[1:-1]
            ]
        ).T
        coarse_CK = expit((coarse[0][:, None] - x_K) / np.exp(coarse[1][:, None]))
        pair_PC, pair_CK = _pairs(coarse, coarse_CK)
        return cls(
            bin_BK=None if len(x_B) == len(x_K) else tensor(bin_KB.T),
            theta_PC=tensor(cells),
            curve_CB=tensor(curve_BC.T),
            unit_CB=tensor(unit_BC.T),
            bands=tuple(slice(int(a), int(b)) for a, b in pairwise(edges) if b > a),
            x_K=tensor(x_K),
            ramp_onset_C=tensor(onset_C),
            ramp_CK=tensor(np.maximum(np.maximum(x_K, 0) - onset_C[:, None], 0)),
            coarse_PC=tensor(coarse),
            coarse_CK=tensor(coarse_CK),
            pair_PC=tensor(pair_PC),
            pair_CK=tensor(pair_CK),
            box=_box(axis),
        )

    def starts(self, data: Trajectories) -> list[tuple[Tensor, Tensor]]:
        """Return the best cell of each band of widths: its theta_PN, and its SSE of shape (N,).

        For tokens that miss losses, `_spread` gives the length of each curve over the losses that
        they have.
        """
        y_BN = data.y_KN if self.bin_BK is None else self.bin_BK @ data.y_KN
        if data.weight_KN is None:
            gain_CN = self.unit_CB @ y_BN
        else:
            count_BN = data.weight_KN if self.bin_BK is None else self.bin_BK @ data.weight_KN
            gain_CN = self.curve_CB @ y_BN
            gain_CN *= _spread(self.curve_CB, count_BN, data.count_N).rsqrt()
        best = _argmax_size(gain_CN, self.bands)
        return [(self.theta_PC[:, c], data.count_N - size_N**2) for c, size_N in best]

    def wider(self, theta_PN: Tensor) -> tuple[Tensor, Tensor]:
        """Return the tokens whose sigmoid is a jump between two probes, and a wider start for each.

        The SSE hardly depends on the width of a jump, so a descent cannot leave it. The wider start
        has its midpoint halfway between the two probes, and a third of their distance as its width.

        Args:
            theta_PN: midpoint and log-width of the sigmoid of each token.
        """
        after_N = torch.searchsorted(self.x_K, theta_PN[0].contiguous())
        after_N = after_N.clamp(1, len(self.x_K) - 1)
        right_N, left_N = self.x_K[after_N], self.x_K[after_N - 1]
        gap_N = right_N - left_N
        jumps_N = (theta_PN[1].exp() < gap_N / _JUMP) & (gap_N < 1) & (theta_PN[0] <= right_N)
        start_PN = torch.stack([(left_N + right_N) / 2, (gap_N / 3).log()])
        index_N = jumps_N.nonzero()[:, 0]
        return index_N, start_PN[:, index_N]

    def ramp(self, data: Trajectories) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the best ramp of each token: onset, slope, loss before the onset, and SSE."""
        weight_KN = data.y_KN.new_ones(len(data.y_KN), 1)
        if data.weight_KN is not None:
            weight_KN = data.weight_KN
        along_CN = self.ramp_CK @ data.y_KN
        spread_CN = _spread(self.ramp_CK, weight_KN, weight_KN.sum(dim=0))
        gain_N, best_N = (along_CN.square() / spread_CN).max(dim=0)
        slope_N = (along_CN / spread_CN).gather(0, best_N[None])[0]
        mean_N = (self.ramp_CK @ weight_KN / weight_KN.sum(dim=0)).expand(-1, len(data))
        level_N = -slope_N * mean_N.gather(0, best_N[None])[0]
        return self.ramp_onset_C[best_N], slope_N, level_N, (data.count_N - gain_N).clamp_min(0)

    def second(self, found: Residuals, data: Trajectories) -> tuple[Tensor, Tensor]:
        """Return the best coarse cell for a second sigmoid, and its gain in SSE.

        The gain is of first order: beside the second sigmoid, it allows for moves of the floor and
        of the first sigmoid along their tangents.
        """
        # The squared length of each curve's remainder, outside of the tangents.
        n_tangents, n_probes, n_tokens = found.tangent_JKN.shape
        tangent_IK = found.tangent_JKN.permute(2, 0, 1).reshape(-1, n_probes)
        along_NJC = (tangent_IK @ self.coarse_CK.T).view(n_tokens, n_tangents, len(self.coarse_CK))
        length_NC = self.coarse_CK.square().sum(dim=1)
        if data.weight_KN is not None:
            length_NC = data.weight_KN.T @ self.coarse_CK.T.square()
        for j in range(n_tangents):
            length_NC = torch.addcmul(length_NC, along_NJC[:, j], along_NJC[:, j], value=-1)
        # The gain of the remainder: its squared product with the residuals, over that length.
        gain_NC = (found.residual_KN.T @ self.coarse_CK.T).square_()
        gain_NC = torch.where(length_NC > _NEARLY_SPANNED, gain_NC / length_NC, 0)
        gain_N, cell_N = gain_NC.max(dim=1)
        return cell_N, gain_N

    def pair(self, data: Trajectories) -> Tensor:
        """Return the best pair of coarse cells, theta_PN; a missing loss counts as the mean loss.

        The gain of a pair is the sum of the gains of the two curves of its orthonormal basis.
        """
        gain_CN = (self.pair_CK @ data.y_KN).square_()
        sums_CN, differences_CN = gain_CN.chunk(2)
        [(cell_N, _)] = _argmax_size(sums_CN.add_(differences_CN), (slice(None),))
        return self.pair_PC[:, cell_N]


def _spread(curve_CK: Tensor, weight_KN: Tensor, count_N: Tensor) -> Tensor:
    """Return the sum of squares of each curve about its mean, over the losses of each token.

    A curve that is flat over these losses has an infinite spread, so that its gain is zero.
    """
    length_CN = curve_CK.square() @ weight_KN
    length_CN -= (curve_CK @ weight_KN).square_() / count_N
    return torch.where(length_CN > _LEAST_SPREAD, length_CN, torch.inf)


def _argmax_size(value_CN: Tensor, parts: tuple[slice, ...]) -> list[tuple[Tensor, Tensor]]:
    """Return the row with the largest |value| in each part of the rows, and that |value| to 5e-4.

    The number of the row replaces the last bits of its values. Positive floats are ordered like
    their bits, so one pass for the maximum gives both the value and its row. `value_CN` is
    overwritten.
    """
    assert len(value_CN) < 1 << _INDEX_BITS
    low_bits = (1 << _INDEX_BITS) - 1
    bits_CN = value_CN.view(torch.int32)
    bits_CN &= 0x7FFFFFFF & ~low_bits
    bits_CN |= torch.arange(len(bits_CN), dtype=torch.int32, device=bits_CN.device)[:, None]
    best = [bits_CN[part].amax(dim=0) for part in parts]
    return [((bits_N & low_bits).long(), bits_N.view(torch.float32)) for bits_N in best]


def _pairs(cell_PC: Floats, curve_CK: Floats) -> tuple[Floats, Floats]:
    """Return all pairs of cells whose curves differ, and an orthonormal basis of each pair.

    Sum and difference of two curves of unit length are orthogonal: scaled, they are the basis.
    """
    unit_CK = curve_CK - curve_CK.mean(axis=1, keepdims=True)
    length_C1 = np.linalg.norm(unit_CK, axis=1, keepdims=True)
    unit_CK = unit_CK / np.maximum(length_C1, 1e-9)
    i, j = np.triu_indices(len(unit_CK), 1)
    different = np.abs((unit_CK[i] * unit_CK[j]).sum(axis=1)) < _NEARLY_SAME
    different &= (length_C1[i, 0] > _LEAST_LENGTH) & (length_C1[j, 0] > _LEAST_LENGTH)
    i, j = i[different], j[different]
    bases = [unit_CK[i] + unit_CK[j], unit_CK[i] - unit_CK[j]]
    bases = [each / np.linalg.norm(each, axis=1, keepdims=True) for each in bases]
    return cell_PC[:, [i, j]].reshape(4, -1), np.concatenate(bases)


def _bins(axis: ProbeAxis) -> Integers:
    """Return the bin of each probe: at most `_MOST_BINS`, and one for each probe at x = -inf.

    Probes with one x, as of several runs of one size, have one bin.
    """
    finite_K = np.isfinite(axis.x_K)
    distinct, place_K = np.unique(axis.x_K[finite_K], return_inverse=True)
    per_bin = -(-len(distinct) // _MOST_BINS)
    first = int((~finite_K).sum())
    later = first + place_K // per_bin
    return np.concatenate([np.arange(first), later])


def _box(axis: ProbeAxis) -> Box:
    """Return the bounds of the search, in units of the probed range."""
    low, high = axis.midpoint_bounds
    midpoint = ((low - axis.low) / axis.span, (high - axis.low) / axis.span)
    return Box(midpoint, (math.log(axis.width_bounds[0] / axis.span), 0.0))


def _cells(x_B: Floats, axis: ProbeAxis) -> Floats:
    """Return midpoint and log-width of every cell, by ascending width, for bins at `x_B`.

    A regular grid holds widths from half the spacing of the bins (at least `_FINEST`) to the whole
    range. It has midpoints only where a bin is near: elsewhere the curve is a step between two
    bins. Such steps, and steps with one bin on the way down, are cells of their own.
    """
    # Steps between two bins, and steps with one bin on the way down.
    gap = np.diff(x_B)
    middle_B = x_B[:-1] + gap / 2
    between = [np.stack([middle_B, np.log(gap / narrower)]) for narrower in _SHARP]
    beside = np.minimum(np.append(gap, gap[-1]), np.append(gap[0], gap)) / 4
    at = [np.stack([x_B + shift * beside, np.log(beside)]) for shift in (-1, 1)]
    # The regular grid.
    narrowest = max(np.median(gap) / 2, _FINEST)
    n_widths = int(np.ceil(np.log2(1 / narrowest) * _WIDTHS_PER_OCTAVE)) + 1
    levels = [_cells_of_width(width, x_B) for width in np.geomspace(narrowest, 1, n_widths)]
    cells = np.concatenate([*between, *at, *levels], axis=1)
    return cells[:, np.argsort(cells[1], kind="stable")]


def _cells_of_width(width: float, x_B: Floats) -> Floats:
    """Return the regular cells of one width, without those whose midpoint is far from all bins."""
    beyond = np.median(np.diff(x_B)) / 2
    count = int(np.ceil((1 + 2 * beyond) * _CELLS_PER_WIDTH / width)) + 1
    midpoint = np.linspace(-beyond, 1 + beyond, max(count, 3))
    nearest = np.abs(midpoint[:, None] - x_B).min(axis=1)
    midpoint = midpoint[nearest <= _REACH * width]
    return np.stack([midpoint, np.full(len(midpoint), np.log(width))])
