"""The surface of slopes: learning-time bins of run A, and how each of them falls in run B.

The learning times in run A are cut into 20 bins as wide as each other in x; the tokens that A did
not learn are one bin more. (The edges of bins of as many tokens would depend on the documents, and
an interval over documents would not know it.) The slope -dL/dx of each bin in run B, over x, is a
surface, here as falls per half octave, each less the mean fall of the tokens' groups. It says more
than the slope of all tokens, which has a single row.

Run A predicts the surface in four ways: by its learning times alone, by drops and times, by its
fits of all tokens, and by its own measured surface. The null model is made from run A too: every
token has the mean curve of its group, scaled to its own total fall. The skill is the share of the
misfit that the null model leaves,

    skill = 1 - sum_b share_b |B_b - predicted_b|^2 / sum_b share_b |B_b - null_b|^2.

If the prediction's misfit is the larger one, the two change places and the skill is negative: -1
means that the null model is exact. In a world without steps the bins are cut by noise and by group,
and no prediction has a skill above 0 (our choice of bins, intervals and null model). Where the mean
loss does not fall, as in noise, no group has a shape to compare with, and the skill is undefined.

Shapes: N tokens, A probe steps of run A, K probe steps of run B, J intervals, B bins of learning
time, G groups, U resampling units, C cells (pairs of a unit and a bin, or of a unit and a group), X
fine bins of x, V bins of widths, R estimates: that of the data as they are, then those without each
of the units.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np
from scipy.special import expit

from megatron_tokscale.core.arrays import Floats, Floats32, Integers, Mask
from megatron_tokscale.core.errors import UndefinedError
from megatron_tokscale.core.resampling import Units
from megatron_tokscale.fit import SigmoidFits, TokenClass
from megatron_tokscale.results.estimate import Estimate, format_estimate
from megatron_tokscale.results.transfer import Surface
from megatron_tokscale.results.verdict import Claim, ClaimTest, holm
from megatron_tokscale.spectrum.density import finite_range
from megatron_tokscale.spectrum.evidence.misfits import Misfit, skill
from megatron_tokscale.spectrum.groups import Groups
from megatron_tokscale.spectrum.interpolation import interpolated
from megatron_tokscale.spectrum.sums import at_probes, loss_sums, model_sums, table_of

BINS: Final = 20
TIMES, DROPS, FITS, MEASURED = "A's times only", "A's drops + times", "A's fits", "A measured"
"""The predictions of run B's surface, by what they take from run A."""
_TARGET: Final = "B"
_FINE_BINS: Final = 128  # of x: one is 5% of a factor of e in a run of 640 steps (our choice)
_WIDTH_BINS: Final = 64  # of ln w (our choice)
_LEAST_MOVING: Final = 10 * BINS  # tokens: ten in a bin (our choice)
_LEAST_FALL: Final = 1e-3  # nats: a group that falls less has no shape (our choice)


def moving_times(fits: SigmoidFits) -> Floats:
    """Return the midpoint of the one sigmoid of every token that falls, in x; NaN for the others.

    A midpoint beyond the probed range is at its end.
    """
    moving_N = fits.is_class(TokenClass.FALLING, TokenClass.TWO_STEP, TokenClass.GRADUAL)
    moving_N &= (fits.drop_N > 0) & np.isfinite(fits.midpoint_N) & fits.complete_N
    inside_N = np.clip(fits.midpoint_N.astype(np.float64), *finite_range(fits.x_K))
    return np.where(moving_N, inside_N, np.nan)


def time_bins(time_N: Floats, x_K: Floats) -> Groups:
    """Return 20 bins of learning times, as wide as each other, and one of tokens without.

    Args:
        time_N: learning time of each token, in x; NaN without one (`moving_times`).
        x_K: the probes of the run; the bins reach from the first after step 0 to the last.

    Raises:
        UndefinedError: fewer than 200 tokens have a learning time.
    """
    known_N = np.isfinite(time_N)
    if known_N.sum() < _LEAST_MOVING:
        raise UndefinedError(
            f"{known_N.sum()} tokens fall in the other run; expected at least {_LEAST_MOVING}; "
            "watch more tokens"
        )
    inner_edges = np.linspace(*finite_range(x_K), BINS + 1)[1:-1]
    bin_N = np.where(known_N, np.searchsorted(inner_edges, time_N), BINS)
    return Groups(bin_N, (*(str(number + 1) for number in range(BINS)), "none"))


@dataclass(frozen=True)
class Comparison:
    """The places of run B's probes on run A's axis, and the falls that are compared.

    Attributes:
        x_A: x of run A's probes.
        place_K: x of run A at each probe of run B.
        operator_KJ: matrix from losses at B's probes to falls between edges (`fall_weights`).
    """

    x_A: Floats
    place_K: Floats
    operator_KJ: Floats

    @property
    def source_operator_AJ(self) -> Floats:
        """Matrix from losses at A's probes to falls between the same edges."""
        at_place_AK = interpolated(np.eye(len(self.x_A)), self.x_A, at_probes(self.place_K))
        return np.asarray(at_place_AK @ self.operator_KJ)

    @property
    def fine_edges(self) -> Floats:
        """Edges of the fine bins of A's x."""
        return np.linspace(*finite_range(self.x_A), _FINE_BINS + 1)

    @property
    def width_edges(self) -> Floats:
        """Edges of the bins of ln w."""
        low, high = finite_range(self.x_A)
        return np.linspace(np.log((high - low) / 1e4), np.log(2 * (high - low)), _WIDTH_BINS + 1)


class SurfaceSums:
    """Sums over tokens for the surface, added up block by block.

    Args:
        bins: bins of learning time in run A (`time_bins`).
        groups: groups whose mean falls are subtracted.
        compared: the places of the probes, and the falls.
        units: resampling units.
    """

    def __init__(self, bins: Groups, groups: Groups, compared: Comparison, units: Units):
        self._compared, self._units = compared, units
        self._margins = [_Margin(each, compared, units) for each in (bins, groups)]
        self._shape = (len(units), len(bins.names), len(groups.names))
        self._cell_N = (
            units.unit_N.astype(np.int64) * self._shape[1] + bins.group_N
        ) * self._shape[2] + groups.group_N
        self._tokens_UBG, self._fall_UBG = np.zeros((2, *self._shape))
        self._width_UV = np.zeros((len(units), _WIDTH_BINS))

    def add(
        self, at: slice, fits: SigmoidFits, source_NA: Floats32, loss_NK: Floats | Floats32
    ) -> None:
        """Add the tokens in the slice.

        Args:
            at: the tokens of the block.
            fits: fits of run A.
            source_NA: A's losses at A's probes.
            loss_NK: B's losses at B's probes.
        """
        whole_N = fits.complete_N & np.isfinite(loss_NK).all(axis=1)
        fits, source_NA, loss_NK = fits.rows(whole_N), source_NA[whole_N], loss_NK[whole_N]
        moves = _Moves.of(fits, self._compared)
        unit_N = self._units.unit_N[at][whole_N][moves.moving]
        self._width_UV += table_of(self._width_UV.shape, unit_N, moves.width_N, moves.drop_N)
        for margin in self._margins:
            margin.add(at, whole_N, fits, moves, source_NA, loss_NK)
        total_A = self._compared.source_operator_AJ.sum(axis=1).astype(source_NA.dtype)
        cell_N, n_cells = self._cell_N[at][whole_N], self._tokens_UBG.size
        self._tokens_UBG += np.bincount(cell_N, minlength=n_cells).reshape(self._shape)
        self._fall_UBG += np.bincount(cell_N, source_NA @ total_A, n_cells).reshape(self._shape)

    def result(self) -> Surface:
        """Return the skill of every prediction, with its interval over documents, and its test.

        Raises:
            UndefinedError: the mean loss of one of the runs does not fall.
        """
        weight_RU = self._units.leave_one_out()
        tokens_RBG, fall_RBG = (
            np.tensordot(weight_RU, each, axes=1) for each in (self._tokens_UBG, self._fall_UBG)
        )
        tokens_RB = tokens_RBG.sum(axis=2)
        count_RB1 = np.maximum(tokens_RB, 1e-300)[..., None]
        within_RBG = tokens_RBG / count_RB1
        kernel_RXJ = self._kernels(weight_RU)
        by_bin, by_group = (margin.falls(weight_RU, kernel_RXJ) for margin in self._margins)
        tokens_RG = tokens_RBG.sum(axis=1)
        _check_fall("the other run", tokens_RG, by_group[MEASURED])
        _check_fall("this run", tokens_RG, by_group[_TARGET])
        beyond = {name: by_bin[name] - within_RBG @ by_group[name] for name in by_bin}
        # The null model: deviations of a bin's total falls from those of its groups, each with the
        # shape of the group's mean curve.
        total_RG1 = by_group[MEASURED].sum(axis=2, keepdims=True)
        shape_RGJ = np.where(
            total_RG1 > _LEAST_FALL, by_group[MEASURED] / np.maximum(total_RG1, _LEAST_FALL), 0
        )
        null_RBJ = (fall_RBG / count_RB1 - within_RBG * total_RG1[:, None, :, 0]) @ shape_RGJ
        share_RB = tokens_RB / tokens_RB.sum(axis=1, keepdims=True)
        return _surface(int(self._tokens_UBG.sum()), beyond, null_RBJ, share_RB)

    def _kernels(self, weight_RU: Floats) -> Floats:
        """Return the falls of the mean sigmoid of the moving tokens at each fine bin, (R, X, J).

        Each token's width counts by its drop.
        """
        compared = self._compared
        edges, width_edges = compared.fine_edges, compared.width_edges
        x_X, log_w_V = ((each[1:] + each[:-1]) / 2 for each in (edges, width_edges))
        away_XK = x_X[:, None] - at_probes(compared.place_K)
        fall_VXJ = np.stack(
            [expit(away_XK / np.exp(log_w)) @ compared.operator_KJ for log_w in log_w_V]
        )
        width_RV = weight_RU @ self._width_UV
        share_RV = width_RV / np.maximum(width_RV.sum(axis=1, keepdims=True), 1e-300)
        return np.tensordot(share_RV, fall_VXJ, axes=1)


@dataclass(frozen=True)
class _Moves:
    """The tokens of a block that fall in run A.

    Attributes:
        moving: their rows in the block.
        fine_N: fine bin of the learning time of each.
        drop_N: drop of each, in nats.
        width_N: bin of ln w of each.
    """

    moving: Integers
    fine_N: Integers
    drop_N: Floats
    width_N: Integers

    @classmethod
    def of(cls, fits: SigmoidFits, compared: Comparison) -> "_Moves":
        time_N = moving_times(fits)
        moving = np.flatnonzero(np.isfinite(time_N))
        drop_N = fits.drop_N[moving].astype(np.float64)
        log_w_N = np.log(fits.width_N[moving].astype(np.float64))
        return cls(
            moving,
            np.searchsorted(compared.fine_edges[1:-1], time_N[moving]),
            drop_N,
            np.searchsorted(compared.width_edges[1:-1], log_w_N),
        )


class _Margin:
    """Sums by resampling unit and one grouping: losses of both runs, models, and events."""

    def __init__(self, groups: Groups, compared: Comparison, units: Units):
        self._compared, self._n_units = compared, len(units)
        self._n_groups = len(groups.names)
        self._cell_N = units.unit_N.astype(np.int64) * self._n_groups + groups.group_N
        n_cells = self._n_units * self._n_groups
        self._tokens_C = np.zeros(n_cells)
        n_probes, n_source = len(compared.place_K), len(compared.x_A)
        self._loss_CK, self._model_CK = np.zeros((2, n_cells, n_probes))
        self._source_CA = np.zeros((n_cells, n_source))
        self._count_CX, self._drop_CX = np.zeros((2, n_cells, _FINE_BINS))

    def add(
        self,
        at: slice,
        whole_N: Mask,
        fits: SigmoidFits,
        moves: _Moves,
        source_NA: Floats32,
        loss_NK: Floats | Floats32,
    ) -> None:
        """Add the tokens of the slice that are in the mask `whole_N`; the rest has these rows."""
        cell_N, n_cells = self._cell_N[at][whole_N], len(self._tokens_C)
        self._tokens_C += np.bincount(cell_N, minlength=n_cells)
        self._loss_CK += loss_sums(loss_NK, cell_N, n_cells)
        self._source_CA += loss_sums(source_NA, cell_N, n_cells)
        self._model_CK += model_sums(fits, cell_N, n_cells, self._compared.place_K)
        cells, shape = cell_N[moves.moving], self._count_CX.shape
        self._count_CX += table_of(shape, cells, moves.fine_N)
        self._drop_CX += table_of(shape, cells, moves.fine_N, moves.drop_N)

    def falls(self, weight_RU: Floats, kernel_RXJ: Floats) -> dict[str, Floats]:
        """Return mean falls per group, (R, groups, J), of run B and of every prediction."""
        operator_KJ = self._compared.operator_KJ
        sums = {
            _TARGET: self._loss_CK @ operator_KJ,
            FITS: self._model_CK @ operator_KJ,
            MEASURED: self._source_CA @ self._compared.source_operator_AJ,
        }
        tokens_RG = weight_RU @ self._tokens_C.reshape(self._n_units, self._n_groups)
        count_RG1 = np.maximum(tokens_RG, 1e-300)[..., None]

        def means(sum_C: Floats) -> Floats:
            drawn = weight_RU @ sum_C.reshape(self._n_units, -1)
            return np.asarray(drawn.reshape(*tokens_RG.shape, -1) / count_RG1)

        events_RGX, drop_RGX = means(self._count_CX), means(self._drop_CX)
        total_R, events_R = ((each * count_RG1).sum(axis=(1, 2)) for each in (drop_RGX, events_RGX))
        mean_drop_R = total_R / np.maximum(events_R, 1e-300)
        return {name: means(sum_CJ) for name, sum_CJ in sums.items()} | {
            TIMES: mean_drop_R[:, None, None] * (events_RGX @ kernel_RXJ),
            DROPS: drop_RGX @ kernel_RXJ,
        }


def _check_fall(run: str, tokens_RG: Floats, fall_RGJ: Floats) -> None:
    """Refuse tokens whose mean loss does not fall with the whole 95% interval.

    Raises:
        UndefinedError: see above.
    """
    total_R = (tokens_RG * fall_RGJ.sum(axis=2)).sum(axis=1) / tokens_RG.sum(axis=1)
    fall = Estimate.from_jackknife(float(total_R[0]), total_R[1:])
    if (fall.low if fall.has_interval else fall.value) <= 0:
        raise UndefinedError(
            f"the mean loss of {run} falls by {format_estimate(fall)} nats over the compared "
            "range; expected a fall above 0 with its whole interval; train on, or watch more tokens"
        )


def _surface(tokens: int, beyond: dict[str, Floats], null_RBJ: Floats, share_RB: Floats) -> Surface:
    """Return the result from the falls of bins beyond their groups, of run B and predicted."""
    target_RBJ = beyond.pop(_TARGET)

    def misfit(predicted_RBJ: Floats | float) -> Misfit:
        away_RBJ = np.sqrt(share_RB)[..., None] * (target_RBJ - predicted_RBJ)
        return Misfit.of(away_RBJ.reshape(len(away_RBJ), -1))

    null, whole = misfit(null_RBJ), misfit(0.0).value
    names = (TIMES, DROPS, FITS, MEASURED)
    tests = holm(
        [
            ClaimTest.of(
                Claim(f"{name} say more than each token's group and total fall", least=0.0),
                skill(misfit(beyond[name]), null),
            )
            for name in names
        ]
    )
    return Surface(
        tokens=tokens,
        bins=target_RBJ.shape[1],
        intervals=target_RBJ.shape[2],
        null=1 - null.value / whole if whole > 0 else float("nan"),
        tests=dict(zip(names, tests, strict=True)),
    )
