"""The global search: the best cell of a grid of (midpoint, width) by one matrix product.

For a centred loss y and a centred curve u of unit length the best amplitude lowers the SSE by the
square of their inner product: floor and drop need no search (model: papers.md 1.4; the grid is our
choice).

Shapes: N tokens, K probe steps, C cells.
"""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from megatron_tokscale.fit.axis import Axis
from megatron_tokscale.fit.varpro import Box, curves

_FINEST = 1 / 128
_BANDS = 3
_NEARLY_SAME = 0.99
_PAIR_CELLS = ((32, 40), (8, 10))


@dataclass(frozen=True)
class Grid:
    """Cells of (midpoint, log-width) and their centred unit curves.

    Attributes:
        theta_CP: midpoint and log-width of each cell.
        unit_KC: the sigmoid of each cell at the probes, centred, of unit length, float32.
        bands: the cells of narrow, middle and wide sigmoids, each a start of its own.
        pair_theta_CP: midpoints and log-widths of pairs of coarse cells.
        pair_sum_KC, pair_difference_KC: an orthonormal basis of each pair, float32.
        ramp_onset_C: onsets of the ramps (constant until the onset, then straight).
        ramp_KC: those ramps, centred, of unit length, float32.
        ramp_length_C: the length each ramp had before.
        x_K: the probes with step 0 at a finite place.
        box: bounds of the search.
    """

    theta_CP: Tensor
    unit_KC: Tensor
    bands: tuple[slice, ...]
    pair_theta_CP: Tensor
    pair_sum_KC: Tensor
    pair_difference_KC: Tensor
    ramp_onset_C: Tensor
    ramp_KC: Tensor
    ramp_length_C: Tensor
    x_K: Tensor
    box: Box

    @staticmethod
    def over(axis: Axis, device: torch.device) -> "Grid":
        """Lay the grid over an axis: widths double, midpoints lie one width apart.

        Midpoints are never further apart than a sigmoid's own width nor closer than half the
        probes' spacing (and a 1/128 of the range), so a start lies in every basin. Ramps begin at
        one of 32 onsets and are at least a third of the range long (our choice): shorter ones
        are the beginning of a step.
        """
        finest = max(axis.spacing / 2, axis.span * _FINEST)
        low, high = axis.midpoint_bounds
        n_widths = int(np.ceil(np.log2(axis.span / (finest / 2)))) + 1
        widths = np.geomspace(finest / 2, axis.span, n_widths)
        cells = []
        for width in widths:
            count = int(np.ceil((high - low) / max(width, finest))) + 1
            cells.append(
                np.stack([np.linspace(low, high, count), np.full(count, np.log(width))], 1)
            )
        edges = np.cumsum([0, *(sum(map(len, part)) for part in _split(cells))])
        theta_CP = torch.tensor(np.concatenate(cells), device=device)
        x_K = torch.tensor(axis.placed_K, device=device)
        unit_KC, _ = _unit(curves(theta_CP, x_K)[0][:, 0])
        onset_C = np.linspace(axis.low, axis.high - axis.span / 3, 32)
        ramps = np.maximum(axis.clamped_K - onset_C[:, None], 0)
        ramp_KC, ramp_length_C = _unit(torch.tensor(ramps, device=device))
        pair_theta_CP, pair_sum_KC, pair_difference_KC = _pairs(axis, x_K)
        return Grid(
            theta_CP=theta_CP,
            unit_KC=unit_KC,
            bands=tuple(slice(int(a), int(b)) for a, b in pairwise(edges)),
            pair_theta_CP=pair_theta_CP,
            pair_sum_KC=pair_sum_KC,
            pair_difference_KC=pair_difference_KC,
            ramp_onset_C=torch.tensor(onset_C, device=device),
            ramp_KC=ramp_KC,
            ramp_length_C=ramp_length_C,
            x_K=x_K,
            box=Box((low, high), (float(np.log(axis.width_bounds[0])), float(np.log(axis.span)))),
        )

    def starts(self, y_NK: Tensor) -> list[Tensor]:
        """The best cell of each band of widths, as theta_NP."""
        gain_NC = (y_NK.float() @ self.unit_KC).square_()
        return [self.theta_CP[band][gain_NC[:, band].argmax(dim=1)] for band in self.bands]

    def pair_start(self, y_NK: Tensor) -> Tensor:
        """The best pair of cells, as theta_NP of two sigmoids."""
        y_NK = y_NK.float()
        gain_NC = (y_NK @ self.pair_sum_KC).square_()
        gain_NC += (y_NK @ self.pair_difference_KC).square_()
        return self.pair_theta_CP[gain_NC.argmax(dim=1)]

    def ramp(self, y_NK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The best ramp: its onset, its slope, and the SSE it leaves."""
        along_NC = y_NK.float() @ self.ramp_KC
        best_N = along_NC.abs().argmax(dim=1)
        along_N = (y_NK * self.ramp_KC.T.double()[best_N]).sum(dim=1)
        sse_N = (y_NK.square().sum(dim=1) - along_N.square()).clamp_min(0)
        return self.ramp_onset_C[best_N], along_N / self.ramp_length_C[best_N], sse_N


def _pairs(axis: Axis, x_K: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs of narrow and wide cells; sum and difference of two unit curves are orthogonal."""
    cells = [
        (midpoint, np.log(axis.span / narrowness))
        for count, narrowness in _PAIR_CELLS
        for midpoint in np.linspace(axis.low, axis.high, count + 2)[1:-1]
    ]
    theta_CP = torch.tensor(cells, device=x_K.device)
    unit_CK = _unit(curves(theta_CP, x_K)[0][:, 0])[0].T.double()
    i, j = torch.triu_indices(len(cells), len(cells), offset=1, device=x_K.device)
    usable = unit_CK[i].ne(0).any(dim=1) & unit_CK[j].ne(0).any(dim=1)
    usable &= (unit_CK[i] * unit_CK[j]).sum(dim=1).abs() < _NEARLY_SAME
    i, j = i[usable], j[usable]
    theta_CP = torch.stack([theta_CP[i], theta_CP[j]], dim=2).flatten(1)
    return theta_CP, _unit(unit_CK[i] + unit_CK[j])[0], _unit(unit_CK[i] - unit_CK[j])[0]


def _split(cells: list[np.ndarray]) -> list[list[np.ndarray]]:
    """Cut the widths into bands of about as many widths each."""
    cuts = np.linspace(0, len(cells), _BANDS + 1).round().astype(int)
    return [cells[a:b] for a, b in pairwise(cuts) if b > a]


def _unit(curve_CK: Tensor) -> tuple[Tensor, Tensor]:
    """Centre the curves and scale them to unit length; a constant one becomes zero."""
    centred = curve_CK - curve_CK.mean(dim=1, keepdim=True)
    length_C = centred.norm(dim=1)
    usable_C = length_C > 1e-6
    unit_CK = torch.where(usable_C[:, None], centred / length_C.clamp_min(1e-6)[:, None], 0.0)
    return unit_CK.T.float().contiguous(), length_C
