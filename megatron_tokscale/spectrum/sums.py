"""Sums over tokens by resampling unit, from one pass; a resample is then a small matrix product.

Shapes: N tokens, E events, U units, K probe steps, C bins of x (in `loss_sums` and `model_sums`:
cells), V bins of ln width, P periods (`PERIODS`), J classes, R resamples.
"""

import math
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields
from functools import cached_property, reduce

import numpy as np
from scipy.special import expit

from megatron_tokscale.core.arrays import Floats, Floats32, Integers, Integers32, Mask
from megatron_tokscale.core.errors import UndefinedError
from megatron_tokscale.fit import SigmoidFits, TokenClass
from megatron_tokscale.spectrum.density import PERIODS, Bins
from megatron_tokscale.spectrum.events import events_of
from megatron_tokscale.spectrum.kernels import add_losses, add_ramps, add_sigmoids

CLASSES = tuple(each for each in TokenClass if each is not TokenClass.UNFITTED)
"""The classes of tokens that miss no loss, in the order of the axis J."""
_BEFORE_TRAINING = -1e6  # stands for x = -inf, where every sigmoid is one
_WIDTH_BINS = 128  # bins of ln width, each about 8% wide: a median is interpolated within one
_THREADS = 2  # blocks summed at once: each of them takes the memory of a block (our choice)

type TokenBlock = tuple[SigmoidFits, Floats32, Integers | Integers32]
"""Fits, losses (NK) and resampling units (N) of some tokens."""


@dataclass(frozen=True)
class DocumentSums:
    """Sums over the fitted tokens that miss no loss, by resampling unit.

    Attributes:
        tokens_U: number of tokens.
        loss_UK: measured losses in nats.
        full_UK: losses by the model of each token's class.
        count_UC: learning events per bin of x (`Bins`), censored ones too.
        drop_UC: their drops in nats.
        count_width_UPV: learning events per period and bin of ln w.
        drop_width_UPV: their drops in nats.
        class_UJ: tokens by class, in the order of `CLASSES`.
        fall_UJ: measured fall from the first probe to the last by class.
    """

    tokens_U: Floats
    loss_UK: Floats
    full_UK: Floats
    count_UC: Floats
    drop_UC: Floats
    count_width_UPV: Floats
    drop_width_UPV: Floats
    class_UJ: Floats
    fall_UJ: Floats

    @staticmethod
    def from_blocks(
        x_K: Floats, blocks: Iterable[TokenBlock], n_units: int, *, from_x: float = -np.inf
    ) -> "DocumentSums":
        """Sum blocks of tokens; two threads take one block each.

        Args:
            x_K: probes.
            blocks: the tokens.
            n_units: number of resampling units.
            from_x: start of the scored range, for the events and their periods.

        Raises:
            UndefinedError: no token is fitted at all probes.
        """
        with ThreadPoolExecutor(_THREADS) as pool:
            pending = (pool.submit(_sum_block, x_K, *block, n_units, from_x) for block in blocks)
            total = reduce(_add, _results_in_order(pending))
        if not total.tokens_U.any():
            raise UndefinedError("no token has a fit and finite losses at all probes")
        return total

    def resampled(self, x_K: Floats, weight_RU: Floats, *, from_x: float = -np.inf) -> "Resampled":
        """Return means over tokens under each row of weights; NaN for a row that draws no token.

        `from_x` is that of `from_blocks`.
        """
        tokens_R = weight_RU @ self.tokens_U
        with np.errstate(invalid="ignore"):
            mean = {
                name: weight_RU @ getattr(self, f"{name}_U{axis}") / tokens_R[:, None]
                for name, axis in (("loss", "K"), ("full", "K"), ("count", "C"), ("drop", "C"))
            }
        return Resampled(
            x_K,
            from_x,
            tokens_R,
            mean["loss"],
            mean["full"],
            mean["count"],
            mean["drop"],
            np.tensordot(weight_RU, self.count_width_UPV, axes=1),
            np.tensordot(weight_RU, self.drop_width_UPV, axes=1),
        )


@dataclass(frozen=True)
class Resampled:
    """Spectrum and mean curves of each resample, per token.

    Attributes:
        x_K: probes.
        from_x: start of the scored range.
        tokens_R: number of tokens, each counted as often as its document was drawn.
        loss_RK: measured mean loss in nats.
        full_RK: mean loss by the model of each token's class.
        count_RC: events per token and bin, censored ones too.
        drop_RC: nats per token and bin.
        count_width_RPV: events per period and bin of ln w.
        drop_width_RPV: their drops.
    """

    x_K: Floats
    from_x: float
    tokens_R: Floats
    loss_RK: Floats
    full_RK: Floats
    count_RC: Floats
    drop_RC: Floats
    count_width_RPV: Floats
    drop_width_RPV: Floats

    @cached_property
    def width_R(self) -> Floats:
        """Drop-weighted median of w of the events from `from_x` on; NaN without events."""
        return _medians(self.drop_width_RPV[:, 1:].sum(axis=1), _log_widths(self.x_K))

    def curves(self) -> dict[str, Floats]:
        """Return the mean loss at the probes by each reconstruction ("full", "kernel", "spectrum").

        All but "full" are known up to a constant. They convolve the events of each period with the
        mean kernel of the events of this period, each counting by its drop ("kernel") or alike
        ("spectrum"). For "spectrum" all events from `from_x` on have the same, mean drop, and so
        have all events before.
        """
        bins = Bins.over(self.x_K)
        count_RC, drop_RC = (bins.coarse(np.nan_to_num(a)) for a in (self.count_RC, self.drop_RC))
        period_C = bins.coarse_period(self.from_x)
        alike_RC = _equal_drops(count_RC, drop_RC, period_C > 0)
        return {
            "full": self.full_RK,
            "kernel": self._convolved(bins.coarse_x, period_C, drop_RC, self.drop_width_RPV),
            "spectrum": self._convolved(bins.coarse_x, period_C, alike_RC, self.count_width_RPV),
        }

    def _convolved(
        self, x_C: Floats, period_C: Integers, drop_RC: Floats, weight_RPV: Floats
    ) -> Floats:
        """Return the sums of the drops times the mean kernel of their period, (R, K).

        A kernel is the mean over bins of ln w of logistic functions, weighted by `weight_RPV`.
        """
        edges_V = _log_widths(self.x_K)
        width_V = np.exp((edges_V[1:] + edges_V[:-1]) / 2)
        total_RP1 = weight_RPV.sum(axis=2, keepdims=True)
        share_RPV = weight_RPV / np.where(total_RP1 > 0, total_RP1, 1)
        loss_RK = np.zeros((len(drop_RC), len(self.x_K)))
        for period in range(PERIODS):
            used_V = (share_RPV[:, period] > 0).any(axis=0)
            inside_C = period_C == period
            u_KC = x_C[inside_C] - at_probes(self.x_K)[:, None]
            s_KCV = expit(u_KC[:, :, None] / width_V[used_V])
            for r, share_V in enumerate(share_RPV[:, period, used_V]):
                loss_RK[r] += s_KCV @ share_V @ drop_RC[r, inside_C]
        return loss_RK


def _equal_drops(count_RC: Floats, drop_RC: Floats, scored_C: Mask) -> Floats:
    """Return the drops per bin if all events in `scored_C` had one drop, and all others too."""
    alike_RC = np.zeros_like(drop_RC)
    for part_C in (scored_C, ~scored_C):
        count_R1 = count_RC[:, part_C].sum(axis=1, keepdims=True)
        drop_R1 = drop_RC[:, part_C].sum(axis=1, keepdims=True) / np.maximum(count_R1, 1e-300)
        alike_RC[:, part_C] = count_RC[:, part_C] * drop_R1
    return alike_RC


def loss_sums(loss_NK: Floats | Floats32, cell_N: Integers | Integers32, n_cells: int) -> Floats:
    """Return the sums of finite losses by cell, (n_cells, K) in float64."""
    total_CK = np.zeros((n_cells, loss_NK.shape[1]))
    add_losses(total_CK, cell_N, loss_NK)
    return total_CK


def model_sums(
    fits: SigmoidFits, cell_N: Integers | Integers32, n_cells: int, x_K: Floats
) -> Floats:
    """Return sums of `fits.predict(x_K)` by cell, (n_cells, K), without a matrix over tokens."""
    x = at_probes(x_K).astype(np.float32)
    constant_C = np.bincount(cell_N, fits.constant_N, n_cells)
    total_CK = np.repeat(constant_C[:, None], len(x), axis=1)
    moves = fits.transitions
    columns = (moves.drop_E, moves.midpoint_E, moves.width_E)
    add_sigmoids(
        total_CK, cell_N[moves.token_E], *(column.astype(np.float32) for column in columns), x
    )
    gradual = np.flatnonzero(fits.is_class(TokenClass.GRADUAL))
    add_ramps(total_CK, cell_N[gradual], fits.slope_N[gradual], fits.onset_N[gradual], x)
    return total_CK


def at_probes(x_K: Floats) -> Floats:
    """Return x with a finite stand-in for -inf, at which every sigmoid is one."""
    return np.asarray(np.maximum(x_K, _BEFORE_TRAINING), dtype=np.float64)


def _sum_block(
    x_K: Floats,
    fits: SigmoidFits,
    loss_NK: Floats32,
    unit_N: Integers | Integers32,
    n_units: int,
    from_x: float,
) -> DocumentSums:
    whole_N = fits.complete_N
    if not whole_N.all():
        fits, loss_NK, unit_N = fits.rows(whole_N), loss_NK[whole_N], unit_N[whole_N]
    bins = Bins.over(x_K)
    events = events_of(fits, from_x=from_x)
    unit_E, bin_E = unit_N[events.token_E], bins.index(events.midpoint_E)
    log_w = _log_widths(x_K)
    width_E = np.searchsorted(log_w[1:-1], np.log(events.width_E))
    column_E = bins.period(bin_E, from_x) * _WIDTH_BINS + width_E
    class_N = fits.class_N.astype(np.int64)
    shape_UC, shape_UV, shape_UJ = (
        (n_units, n) for n in (len(bins.x_C), PERIODS * _WIDTH_BINS, len(CLASSES))
    )
    shape_UPV = (n_units, PERIODS, _WIDTH_BINS)
    return DocumentSums(
        tokens_U=np.bincount(unit_N, minlength=n_units).astype(np.float64),
        loss_UK=loss_sums(loss_NK, unit_N, n_units),
        full_UK=model_sums(fits, unit_N, n_units, x_K),
        count_UC=table_of(shape_UC, unit_E, bin_E),
        drop_UC=table_of(shape_UC, unit_E, bin_E, events.drop_E),
        count_width_UPV=table_of(shape_UV, unit_E, column_E).reshape(shape_UPV),
        drop_width_UPV=table_of(shape_UV, unit_E, column_E, events.drop_E).reshape(shape_UPV),
        class_UJ=table_of(shape_UJ, unit_N, class_N),
        fall_UJ=table_of(shape_UJ, unit_N, class_N, fits.fall_N),
    )


def table_of(
    shape: tuple[int, int],
    row: Integers | Integers32,
    column: Integers,
    value: Floats | Floats32 | None = None,
) -> Floats:
    """Return a table of the values (ones if None) summed by row and column."""
    cell = row.astype(np.int64) * shape[1] + column
    return np.bincount(cell, value, math.prod(shape)).reshape(shape).astype(np.float64, copy=False)


def _add(a: DocumentSums, b: DocumentSums) -> DocumentSums:
    for field in fields(a):
        total = getattr(a, field.name)
        total += getattr(b, field.name)
    return a


def _results_in_order(pending: Iterable[Future[DocumentSums]]) -> Iterator[DocumentSums]:
    """Yield results in order, with at most one block in progress per thread."""
    queue: list[Future[DocumentSums]] = []
    for future in pending:
        queue.append(future)
        if len(queue) > _THREADS:
            yield queue.pop(0).result()
    for future in queue:
        yield future.result()


def _log_widths(x_K: Floats) -> Floats:
    """Return edges of the bins of ln w, from a hundredth of the closest spacing to two ranges."""
    x_K = x_K[np.isfinite(x_K)]
    low, high = np.diff(x_K).min() / 100, np.ptp(x_K) * 2
    return np.linspace(np.log(low), np.log(high), _WIDTH_BINS + 1)


def _medians(weight_RV: Floats, edges_V: Floats) -> Floats:
    """Return e to the power of each row's weighted median; NaN for a row without weight.

    Within a bin the weight is spread evenly.
    """
    below_RV = np.cumsum(weight_RV, axis=1)
    total_R = below_RV[:, -1]
    median_R = np.full(len(weight_RV), np.nan)
    for r in np.flatnonzero(total_R > 0):
        median_R[r] = np.interp(0.5, np.concatenate([[0], below_RV[r]]) / total_R[r], edges_V)
    return np.asarray(np.exp(median_R))
