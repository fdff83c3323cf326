"""The surface of slopes: learning-time bins of run A, and how each of them falls in run B.

The tokens are cut into 20 bins of equal size by their learning time in run A; the tokens that A did
not learn are one bin more. The slope -dL/dx of each bin in run B, over x, is a surface, here as
falls per half octave. It says more than the slope of all tokens, which is one of its margins.

Run A predicts the surface in four ways: by its learning times alone, by drops and times, by its
fits of all tokens, and by its own measured surface. The null model is made from run A too: every
bin has the mean curve of all tokens, scaled to the bin's own total fall. The skill is the share of
the misfit that the null model leaves,

    skill = 1 - sum_b share_b |B_b - predicted_b|^2 / sum_b share_b |B_b - null_b|^2.

In a world without steps the bins are cut by noise, and no prediction has a skill above 0.

Shapes: N tokens, A probe steps of run A, K probe steps of run B, J intervals, B bins of learning
time, U resampling units, C cells (pairs of a unit and a bin), X fine bins of x, V bins of widths, R
resamples (the first is the data as they are).
"""

from typing import Final

import numpy as np
from scipy.special import expit

from megatron_tokscale.core.arrays import Floats, Floats32
from megatron_tokscale.core.errors import UndefinedError
from megatron_tokscale.core.resampling import Units
from megatron_tokscale.fit import SigmoidFits, TokenClass
from megatron_tokscale.results.estimate import Estimate
from megatron_tokscale.results.transfer import Surface
from megatron_tokscale.results.verdict import Claim, ClaimTest, holm
from megatron_tokscale.spectrum.density import finite_range
from megatron_tokscale.spectrum.evidence.transfer import interpolated
from megatron_tokscale.spectrum.groups import Groups
from megatron_tokscale.spectrum.sums import at_probes, loss_sums, model_sums, table_of

BINS: Final = 20
_FINE_BINS: Final = 128  # of x: one is 4% of a factor of e in a run of 640 steps (our choice)
_WIDTH_BINS: Final = 64  # of ln w (our choice)
_LEAST_MOVING: Final = 10 * BINS  # tokens: ten in a bin (our choice)
TIMES, DROPS, FITS, MEASURED = "A's times only", "A's drops + times", "A's fits", "A measured"
"""The predictions of run B's surface, by what they take from run A."""
_CLAIMS: Final = {
    name: Claim(f"{name}: better than the mean curve times each bin's fall", least=0.0)
    for name in (TIMES, DROPS, FITS, MEASURED)
}


def moving_times(fits: SigmoidFits) -> Floats:
    """Return the midpoint of the one sigmoid of every token that falls, in x; NaN for the others.

    A midpoint beyond the probed range is at its end.
    """
    moving_N = fits.is_class(TokenClass.FALLING, TokenClass.TWO_STEP, TokenClass.GRADUAL)
    moving_N &= (fits.drop_N > 0) & np.isfinite(fits.midpoint_N) & fits.complete_N
    inside_N = np.clip(fits.midpoint_N.astype(np.float64), *finite_range(fits.x_K))
    return np.where(moving_N, inside_N, np.nan)


def time_bins(time_N: Floats) -> Groups:
    """Return 20 bins of about as many tokens by learning time, and one of those without.

    Raises:
        UndefinedError: fewer than 200 tokens have a learning time.
    """
    known_N = np.isfinite(time_N)
    if known_N.sum() < _LEAST_MOVING:
        raise UndefinedError(
            f"{known_N.sum()} tokens fall in the other run; expected at least {_LEAST_MOVING}; "
            "watch more tokens"
        )
    edges = np.quantile(time_N[known_N], np.linspace(0, 1, BINS + 1)[1:-1])
    bin_N = np.where(known_N, np.searchsorted(edges, time_N), BINS)
    return Groups(bin_N, (*(str(number + 1) for number in range(BINS)), "none"))


class SurfaceSums:
    """Sums over tokens for the surface, added up block by block.

    Attributes:
        x_A: x of run A's probes.
        place_K: x of run A at each probe of run B.
        operator_KJ: matrix from losses at B's probes to falls between edges.
    """

    def __init__(
        self, bins: Groups, x_A: Floats, place_K: Floats, operator_KJ: Floats, units: Units
    ):
        self.x_A, self.place_K, self.operator_KJ = x_A, place_K, operator_KJ
        self._bins, self._n_units = len(bins.names), len(units)
        self._cell_N = units.unit_N.astype(np.int64) * self._bins + bins.group_N
        n_cells, n_probes = self._n_units * self._bins, len(place_K)
        self._tokens_C = np.zeros(n_cells)
        self._sum_CK = {name: np.zeros((n_cells, n_probes)) for name in ("B", MEASURED, FITS)}
        self._sum_CX = {name: np.zeros((n_cells, _FINE_BINS)) for name in (TIMES, DROPS)}
        self._width_V = np.zeros(_WIDTH_BINS)

    def add(
        self, at: slice, fits: SigmoidFits, source_NK: Floats32, loss_NK: Floats | Floats32
    ) -> None:
        """Add the tokens in the slice.

        Args:
            at: the tokens of the block.
            fits: fits of run A.
            source_NK: A's losses at A's probes.
            loss_NK: B's losses at B's probes.
        """
        whole_N = fits.complete_N & np.isfinite(loss_NK).all(axis=1)
        fits, cell_N = fits.rows(whole_N), self._cell_N[at][whole_N]
        n_cells = len(self._tokens_C)
        self._tokens_C += np.bincount(cell_N, minlength=n_cells)
        self._sum_CK["B"] += loss_sums(loss_NK[whole_N], cell_N, n_cells)
        at_a_CK = loss_sums(source_NK[whole_N], cell_N, n_cells)
        self._sum_CK[MEASURED] += interpolated(at_a_CK, self.x_A, self.place_K)
        self._sum_CK[FITS] += model_sums(fits, cell_N, n_cells, self.place_K)
        # Times, drops and widths of the tokens that move.
        time_N = moving_times(fits)
        moving = np.isfinite(time_N)
        fine_N = np.searchsorted(self._fine_edges[1:-1], time_N[moving])
        drop_N = fits.drop_N[moving].astype(np.float64)
        shape = self._sum_CX[TIMES].shape
        self._sum_CX[TIMES] += table_of(shape, cell_N[moving], fine_N)
        self._sum_CX[DROPS] += table_of(shape, cell_N[moving], fine_N, drop_N)
        log_w = np.log(fits.width_N[moving].astype(np.float64))
        width_bin_N = np.searchsorted(self._width_edges[1:-1], log_w)
        self._width_V += np.bincount(width_bin_N, drop_N, _WIDTH_BINS)

    @property
    def _fine_edges(self) -> Floats:
        return np.linspace(*finite_range(self.x_A), _FINE_BINS + 1)

    @property
    def _width_edges(self) -> Floats:
        low, high = finite_range(self.x_A)
        return np.linspace(np.log((high - low) / 1e4), np.log(2 * (high - low)), _WIDTH_BINS + 1)

    def _kernel(self) -> Floats:
        """Return the mean sigmoid of the moving tokens for each fine bin at B's probes, (X, K).

        Each token's width counts by its drop.
        """
        edges, width_edges = self._fine_edges, self._width_edges
        x_X, log_w_V = ((each[1:] + each[:-1]) / 2 for each in (edges, width_edges))
        share_V = self._width_V / max(self._width_V.sum(), 1e-300)
        away_XK = x_X[:, None] - at_probes(self.place_K)
        return np.asarray(
            sum(
                share * expit(away_XK / np.exp(log_w))
                for share, log_w in zip(share_V, log_w_V, strict=True)
                if share > 0
            )
        )

    def result(self, weight_RU: Floats) -> Surface:
        """Return the skill of every prediction, and its test."""
        tokens_RB = weight_RU @ self._tokens_C.reshape(self._n_units, -1)
        count_RB = np.maximum(tokens_RB, 1e-300)

        def falls(sum_CK: Floats) -> Floats:
            sum_CJ = sum_CK @ self.operator_KJ
            sum_RBJ = weight_RU @ sum_CJ.reshape(self._n_units, -1)
            return np.asarray(sum_RBJ.reshape(*tokens_RB.shape, -1) / count_RB[..., None])

        kernel_XK = self._kernel()
        events = self._sum_CX[TIMES].sum()
        mean_drop = self._sum_CX[DROPS].sum() / max(events, 1)
        predicted = {
            TIMES: falls(self._sum_CX[TIMES] @ kernel_XK * mean_drop),
            DROPS: falls(self._sum_CX[DROPS] @ kernel_XK),
            FITS: falls(self._sum_CK[FITS]),
            MEASURED: falls(self._sum_CK[MEASURED]),
        }
        target_RBJ, source_RBJ = falls(self._sum_CK["B"]), predicted[MEASURED]
        share_RB = tokens_RB / tokens_RB.sum(axis=1, keepdims=True)
        mean_RJ = np.einsum("rb,rbj->rj", share_RB, source_RBJ)
        own_RB = source_RBJ.sum(axis=2) / mean_RJ.sum(axis=1)[:, None]
        null_RBJ = mean_RJ[:, None] * own_RB[..., None]
        flat_RBJ = np.broadcast_to(mean_RJ[:, None], null_RBJ.shape)
        return _surface(
            int(self._tokens_C.sum()), target_RBJ, share_RB, predicted, null_RBJ, flat_RBJ
        )


def _surface(
    tokens: int,
    target_RBJ: Floats,
    share_RB: Floats,
    predicted: dict[str, Floats],
    null_RBJ: Floats,
    flat_RBJ: Floats,
) -> Surface:
    def misfit(predicted_RBJ: Floats) -> Floats:
        return np.asarray((share_RB * ((target_RBJ - predicted_RBJ) ** 2).sum(axis=2)).sum(axis=1))

    with np.errstate(divide="ignore", invalid="ignore"):
        skill_R = {name: 1 - misfit(each) / misfit(null_RBJ) for name, each in predicted.items()}
        null_R = 1 - misfit(null_RBJ) / misfit(flat_RBJ)
    tests = holm(
        [
            ClaimTest.of(_CLAIMS[name], Estimate.from_resamples(each_R, most=1))
            for name, each_R in skill_R.items()
        ]
    )
    return Surface(
        tokens=tokens,
        bins=target_RBJ.shape[1],
        intervals=target_RBJ.shape[2],
        null=Estimate.from_resamples(null_R, most=1),
        tests=dict(zip(skill_R, tests, strict=True)),
    )
