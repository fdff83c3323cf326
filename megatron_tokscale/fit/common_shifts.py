"""Common shifts: by how much all tokens of a dataset are off together at one probe.

A checkpoint is a little lucky or unlucky, and the losses of all tokens shift with it. The mean loss
over many tokens shows this shift, as its departure from a smooth curve; no single token does. A
sharp change of the mean that stays (the unigram phase, a fast fall) is no shift. So the curve
through the means may have jumps and kinks, where the likelihood asks for them (`MeanCurve`), and
only what is left beside curve, jumps and kinks is taken out of the losses.

Shapes: N tokens, D datasets, K probe steps, T probes after step 0, B draws.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import numpy as np

from megatron_tokscale.core.arrays import Floats, Floats32, Integers16
from megatron_tokscale.fit.mean_curve import MeanCurve
from megatron_tokscale.fit.summary import DatasetShifts

if TYPE_CHECKING:
    from megatron_tokscale.store import Run

_LEAST_PROBES = 8
"""Least number of probes after step 0; our choice: with fewer, a curve with jumps follows every
mean."""
_LEAST_TOKENS = 100
"""Least number of tokens of a dataset; our choice: the mean of fewer has a tenth of a token's own
noise or more, which hides the noise that they share."""
_BLOCK_VALUES = 2**23  # losses read at a time: 32 MB in float32


def common_shifts(run: "Run", x_K: Floats) -> tuple[DatasetShifts, ...]:
    """Return the common shifts of each dataset of a run, from one pass over its losses.

    Args:
        run: an opened run.
        x_K: natural logarithm of the time of its probes; -inf at step 0, which has no shift.
    """
    size = max(_BLOCK_VALUES // max(len(x_K), 1), 1)
    parts = (
        slice(start, min(start + size, run.n_tokens)) for start in range(0, run.n_tokens, size)
    )
    blocks = (
        (run.read_losses(part.start, part.stop), run.tokens.rows(part).dataset_N) for part in parts
    )
    return shifts_of(x_K, blocks, run.tokens.datasets)


def shifts_of(
    x_K: Floats, blocks: Iterable[tuple[Floats32, Integers16]], names: Sequence[str]
) -> tuple[DatasetShifts, ...]:
    """Return the common shifts of datasets by name, from blocks of losses and their datasets."""
    sums = [_MeanSums.over(x_K) for _ in names]
    for loss_NK, dataset_N in blocks:
        for dataset, each in enumerate(sums):
            each.add(loss_NK[dataset_N == dataset])
    return tuple(each.shifts(name) for name, each in zip(names, sums, strict=True))


def shift_table(shifts: Sequence[DatasetShifts]) -> Floats:
    """Return the shifts as a matrix shift_DK in nats."""
    return np.array([each.shift_K for each in shifts])


def without_shifts(loss_NK: Floats32, shift_DK: Floats, dataset_N: Integers16) -> Floats32:
    """Return losses without the shifts of their tokens' datasets."""
    if not shift_DK.any():
        return loss_NK
    return loss_NK - shift_DK.astype(np.float32)[dataset_N]


def draw_left_over(
    x_K: Floats,
    mean_DK: Floats,
    shifts: Sequence[DatasetShifts],
    n_draws: int,
    rng: np.random.Generator,
) -> Floats:
    """Draw the part of the common noise that `without_shifts` leaves in the losses.

    Noise of its estimated size is added to the mean curve of each dataset and taken out again. The
    slow part of it stays, since it looks like the curve (parametric bootstrap).

    Args:
        x_K: natural logarithm of the time of the probes.
        mean_DK: mean losses without the shifts, in nats.
        shifts: the shifts of each dataset.
        n_draws: number of draws B.
        rng: source of the noise.

    Returns:
        left_BDK, in nats; 0 for a dataset without common noise, and at step 0.
    """
    timed_K = np.isfinite(x_K)
    left_BDK = np.zeros((n_draws, *mean_DK.shape))
    for d, each in enumerate(shifts):
        if each.shared == 0:
            continue
        for b in range(n_draws):
            noise_T = each.shared * rng.standard_normal(int(timed_K.sum()))
            curve = MeanCurve.from_means(x_K[timed_K], mean_DK[d, timed_K] + noise_T)
            left_BDK[b, d, timed_K] = noise_T - _shift(curve, each.own**2)[0]
    return left_BDK


def _shift(curve: MeanCurve, own: float) -> tuple[Floats, float]:
    """Return the shift at each probe after step 0, and the variance of the noise that is shared.

    The mean of the tokens' own noise stays in: it is no shift, but a sum of other errors.

    Args:
        curve: the curve through the means.
        own: the variance that the tokens' own noise gives the means.
    """
    shared = max(curve.noise_variance - own, 0.0)
    return curve.departure_T * (shared / max(curve.noise_variance, 1e-300)), shared


@dataclass
class _MeanSums:
    """Sums over the tokens of one dataset that miss no loss.

    The departure of a loss is its difference from the straight line between the losses of the
    probes before and after it; the first and the last probe after step 0 have none.

    Attributes:
        x_K: natural logarithm of the time of the probes.
        tokens: number of tokens.
        loss_K: sum of the losses.
        square_T: sum over the tokens of the squares of their departures.
    """

    x_K: Floats
    tokens: int
    loss_K: Floats
    square_T: Floats

    @classmethod
    def over(cls, x_K: Floats) -> Self:
        timed = int(np.isfinite(x_K).sum())
        return cls(x_K, 0, np.zeros(len(x_K)), np.zeros(max(timed - 2, 0)))

    def add(self, loss_NK: Floats32) -> None:
        """Add a block of tokens."""
        loss_NK = loss_NK[np.isfinite(loss_NK).all(axis=1)]
        self.tokens += len(loss_NK)
        self.loss_K += loss_NK.sum(axis=0, dtype=np.float64)
        self.square_T += (self._departures(loss_NK) ** 2).sum(axis=0, dtype=np.float64)

    def shifts(self, name: str) -> DatasetShifts:
        """Return the shifts of the dataset."""
        timed_K = np.isfinite(self.x_K)
        shift_K = np.zeros(len(self.x_K))
        if self.tokens < _LEAST_TOKENS or timed_K.sum() < _LEAST_PROBES:
            return DatasetShifts(name, self.tokens, tuple(shift_K.tolist()), 0.0, 0.0, 0.0, ())
        mean_K = self.loss_K / self.tokens
        curve = MeanCurve.from_means(self.x_K[timed_K], mean_K[timed_K])
        own = self._own_variance()
        rounding = float(np.finfo(np.float32).eps * np.abs(mean_K).max()) ** 2
        shift_T, shared = _shift(curve, own)
        if shared > rounding:
            shift_K[timed_K] = shift_T
        else:
            shared = 0.0
        breaks = np.flatnonzero(timed_K)[list(curve.jumps)]
        return DatasetShifts(
            dataset=name,
            tokens=self.tokens,
            shift_K=tuple(shift_K.tolist()),
            shared=float(np.sqrt(shared)),
            own=float(np.sqrt(own)),
            share=self._share(shift_K),
            jumps=tuple(breaks.tolist()),
        )

    def _departures(self, loss_NK: Floats | Floats32) -> Floats:
        """Return the departures (N, T - 2)."""
        timed_K = np.isfinite(self.x_K)
        if timed_K.sum() < 3:
            return np.zeros((len(loss_NK), 0))
        loss_NT = loss_NK[:, timed_K].astype(np.float64, copy=False)
        line_NT = loss_NT[:, :-2] * (1 - self._after_T) + loss_NT[:, 2:] * self._after_T
        return np.asarray(loss_NT[:, 1:-1] - line_NT)

    @property
    def _after_T(self) -> Floats:
        """Weight of the probe after each inner probe in the line between its neighbours."""
        x_T = self.x_K[np.isfinite(self.x_K)]
        return np.asarray((x_T[1:-1] - x_T[:-2]) / (x_T[2:] - x_T[:-2]))

    @property
    def _mean_departure_T(self) -> Floats:
        """Departure of the mean loss at each inner probe, in nats."""
        return np.asarray(self._departures(self.loss_K[None] / self.tokens)[0])

    def _own_variance(self) -> float:
        """Return the variance of the mean that the tokens' own noise gives, for independent noise.

        It follows from the spread of the departures over the tokens. The median over the probes
        leaves out those at which many tokens move.
        """
        spread_T = self.square_T / self.tokens - self._mean_departure_T**2
        of_white_T = 1 + self._after_T**2 + (1 - self._after_T) ** 2
        return float(np.median(np.maximum(spread_T, 0) / of_white_T)) / self.tokens

    def _share(self, shift_K: Floats) -> float:
        """Return the share of the tokens' mean square departure that goes with the shifts."""
        of_shift_T = self._departures(shift_K[None])[0]
        before = float(self.square_T.sum()) / self.tokens
        removed_T = 2 * of_shift_T * self._mean_departure_T - of_shift_T**2
        return float(removed_T.sum()) / max(before, 1e-300)
