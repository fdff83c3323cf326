"""Sums over tokens by resampling unit, from one pass; a resample is then a small matrix product.

Shapes: N tokens, E events, U units, K probe steps, C bins of x (in `loss_sums` and `model_sums`:
cells), V bins of ln width, J classes, R resamples.
"""

import math
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields
from functools import reduce

import numpy as np
from scipy.special import expit

from megatron_tokscale.core.arrays import Floats, Floats32, Integers, Integers32
from megatron_tokscale.core.errors import UndefinedError
from megatron_tokscale.fit import SigmoidFits, TokenClass
from megatron_tokscale.spectrum.density import Bins, events_of
from megatron_tokscale.spectrum.kernels import add_losses, add_ramps, add_sigmoids

CLASSES = tuple(each for each in TokenClass if each is not TokenClass.UNFITTED)
"""The classes of tokens that miss no loss, in the order of the axis J."""
_BEFORE_TRAINING = -1e6  # stands for x = -inf, where every sigmoid is one
_WIDTH_BINS = 512  # bins of ln width, each about 2% wide: finer than any interval of a median width
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
        count_UC: learning events per bin of x.
        drop_UC: their drops in nats.
        width_UV: their drops per bin of ln w.
        class_UJ: tokens by class, in the order of `CLASSES`.
        fall_UJ: measured fall from the first probe to the last by class.
    """

    tokens_U: Floats
    loss_UK: Floats
    full_UK: Floats
    count_UC: Floats
    drop_UC: Floats
    width_UV: Floats
    class_UJ: Floats
    fall_UJ: Floats

    @staticmethod
    def from_blocks(x_K: Floats, blocks: Iterable[TokenBlock], n_units: int) -> "DocumentSums":
        """Sum blocks of tokens; two threads take one block each.

        Raises:
            UndefinedError: no token is fitted at all probes.
        """
        with ThreadPoolExecutor(_THREADS) as pool:
            pending = (pool.submit(_sum_block, x_K, *block, n_units) for block in blocks)
            total = reduce(_add, _results_in_order(pending))
        if not total.tokens_U.any():
            raise UndefinedError("no token has a fit and finite losses at all probes")
        return total

    def resampled(self, x_K: Floats, weight_RU: Floats) -> "Resampled":
        """Return means over tokens under each row of weights; NaN for a row that draws no token."""
        tokens_R = weight_RU @ self.tokens_U
        with np.errstate(invalid="ignore"):
            mean = {
                name: weight_RU @ getattr(self, f"{name}_U{axis}") / tokens_R[:, None]
                for name, axis in (("loss", "K"), ("full", "K"), ("count", "C"), ("drop", "C"))
            }
        width_R = _medians(weight_RU @ self.width_UV, _log_widths(x_K))
        return Resampled(
            x_K, tokens_R, mean["loss"], mean["full"], mean["count"], mean["drop"], width_R
        )


@dataclass(frozen=True)
class Resampled:
    """Spectrum and mean curves of each resample, per token.

    Attributes:
        x_K: probes.
        tokens_R: number of tokens, each counted as often as its document was drawn.
        loss_RK: measured mean loss in nats.
        full_RK: mean loss by the model of each token's class.
        count_RC: events per token and bin.
        drop_RC: nats per token and bin.
        width_R: common width of the events: drop-weighted median of w; NaN without events.
    """

    x_K: Floats
    tokens_R: Floats
    loss_RK: Floats
    full_RK: Floats
    count_RC: Floats
    drop_RC: Floats
    width_R: Floats

    def curves(self) -> dict[str, Floats]:
        """Return the mean loss at the probes by each reconstruction ("full", "kernel", "spectrum").

        All but "full" are known up to a constant.
        """
        x_C = Bins.over(self.x_K).x_C
        kernel_RK, spectrum_RK = np.zeros((2, *self.full_RK.shape))
        mean_drop_R = self.drop_RC.sum(axis=1) / np.maximum(self.count_RC.sum(axis=1), 1e-300)
        for r in np.flatnonzero(np.isfinite(self.width_R)):
            s_KC = expit((x_C - self.x_K[:, None]) / self.width_R[r])
            kernel_RK[r] = s_KC @ self.drop_RC[r]
            spectrum_RK[r] = s_KC @ self.count_RC[r] * mean_drop_R[r]
        return {"full": self.full_RK, "kernel": kernel_RK, "spectrum": spectrum_RK}


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
) -> DocumentSums:
    whole_N = fits.complete_N
    if not whole_N.all():
        fits, loss_NK, unit_N = fits.rows(whole_N), loss_NK[whole_N], unit_N[whole_N]
    bins = Bins.over(x_K)
    events = events_of(fits)
    unit_E, bin_E = unit_N[events.token_E], bins.index(events.midpoint_E)
    log_w = _log_widths(x_K)
    width_E = np.searchsorted(log_w[1:-1], np.log(events.width_E))
    class_N = fits.class_N.astype(np.int64)
    shape_UC, shape_UV, shape_UJ = (
        (n_units, n) for n in (len(bins.x_C), _WIDTH_BINS, len(CLASSES))
    )
    return DocumentSums(
        tokens_U=np.bincount(unit_N, minlength=n_units).astype(np.float64),
        loss_UK=loss_sums(loss_NK, unit_N, n_units),
        full_UK=model_sums(fits, unit_N, n_units, x_K),
        count_UC=table_of(shape_UC, unit_E, bin_E),
        drop_UC=table_of(shape_UC, unit_E, bin_E, events.drop_E),
        width_UV=table_of(shape_UV, unit_E, width_E, events.drop_E),
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
