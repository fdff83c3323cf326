"""Zero-sum learning of Mircea et al. (docs/references.md 8.1): tokens' changes of loss that cancel.

Between two probes with changes dl of the tokens' losses:
    D = 1 - |sum dl| / sum |dl|    destructive interference, from 0 to 1
    M = mean |dl|                  movement, in nats per token
    |dL| = (1 - D) M               size of the change of the mean loss
over pairs of a probe and the one nearest to twice its step. Sums over tokens are enough, so a run
of any size streams through `ZeroSum` in blocks of tokens.

Noise moves losses as well (arithmetic, dropout, the jitter of the weights from mini-batches). If a
measured loss has the standard deviation s, a token that learns nothing has dl ~ N(0, 2 s^2), and a
mean |dl| of 2 s / sqrt(pi). This is the least value of M, at which D is near 1. A movement near it
is noise, and not learning that cancels.

Shapes: K probe steps, P pairs, N tokens of a block, U units of resampling, R resamples.
"""

import math
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.sparse import csr_array

from megatron_tokscale.core.arrays import Floats, Integers
from megatron_tokscale.core.errors import TokscaleError, UndefinedError
from megatron_tokscale.core.resampling import percentile_interval
from megatron_tokscale.results.estimate import Estimate
from megatron_tokscale.results.laws import ZeroSumPair, ZeroSumResult
from megatron_tokscale.store import Run

_FARTHEST = math.sqrt(2)  # greatest ratio of a probe's step and the exact double


@dataclass(frozen=True)
class ZeroSumMetrics:
    """Metrics of P pairs of probes; metrics of resamples have a leading R.

    Attributes:
        interference: D, without a unit; NaN where no token moved.
        movement: M, in nats per token.
        change: mean dl, in nats per token; negative where the mean loss falls. |dL| is its size.
    """

    interference: Floats
    movement: Floats
    change: Floats

    @classmethod
    def from_sums(cls, dl: Floats, abs_dl: Floats, tokens: Floats | int) -> Self:
        """Compute the metrics from sums over tokens of dl and |dl|, and the number of tokens."""
        with np.errstate(invalid="ignore"):
            interference = 1 - np.abs(dl) / abs_dl
        return cls(interference, abs_dl / tokens, dl / tokens)


@dataclass(frozen=True)
class ZeroSumIntervals:
    """95% percentiles of the metrics over resamples: (2, P), lower ends first."""

    interference_2P: Floats
    movement_2P: Floats
    change_2P: Floats


def doubling_pairs(step_K: ArrayLike) -> Integers:
    """Return (P, 2) indices of probes at step t and of the nearest probe, in ln t, to 2t.

    The steps of a pair differ by a factor from sqrt 2 to 2 sqrt 2; step 0 has no double.

    Raises:
        TokscaleError: the steps do not ascend.
        UndefinedError: there is no such pair.
    """
    step = np.asarray(step_K, dtype=np.float64)
    if step.ndim != 1 or not len(step) or step[0] < 0 or not (np.diff(step) > 0).all():
        raise TokscaleError("the steps of the probes do not ascend from 0 or later; sort them")
    from_P = np.flatnonzero(step > 0)
    x_P = np.log(step[from_P])
    miss_PP = np.abs(x_P - (x_P[:, None] + math.log(2)))
    near_P = miss_PP.min(axis=1, initial=np.inf) <= math.log(_FARTHEST)
    if not near_P.any():
        raise UndefinedError(
            "no probe lies near twice the step of another; probe at doubling steps or more often"
        )
    pairs_P2 = np.stack([from_P, from_P[0] + miss_PP.argmin(axis=1)], axis=1)
    return np.asarray(pairs_P2[near_P], dtype=np.int64)


class ZeroSum:
    """Sums over tokens, block by block in float64, of the changes of loss between paired probes.

    Attributes:
        from_step_P: first step of each pair.
        to_step_P: second step of each pair.
        sum_dl_UP: sum of dl over the tokens of a unit, in nats.
        sum_abs_UP: sum of |dl| over the tokens of a unit, in nats.
        tokens_U: number of tokens of each unit.
    """

    def __init__(self, step_K: ArrayLike, n_units: int = 1) -> None:
        """Start sums for probes at `step_K` and `n_units` resampling units, such as documents."""
        self._pair_P2 = doubling_pairs(step_K)
        self._n_probes = len(np.asarray(step_K))
        self.from_step_P, self.to_step_P = np.asarray(step_K, dtype=np.float64)[self._pair_P2].T
        self.sum_dl_UP = np.zeros((n_units, len(self._pair_P2)))
        self.sum_abs_UP = np.zeros_like(self.sum_dl_UP)
        self.tokens_U = np.zeros(n_units, dtype=np.int64)

    def add(self, loss_NK: ArrayLike, *, unit_N: ArrayLike | None = None) -> None:
        """Add a block of tokens.

        Args:
            loss_NK: losses of the tokens at all probes, in nats.
            unit_N: unit of each token, from 0; by default all belong to unit 0.

        Raises:
            TokscaleError: losses are not finite, shapes do not match, or a unit is out of range.
        """
        loss = self._checked_block(np.asarray(loss_NK, dtype=np.float64))
        n = len(loss)
        unit = self._checked_units(
            np.zeros(n, np.int64) if unit_N is None else np.asarray(unit_N), n
        )
        from_P, to_P = self._pair_P2.T
        dl_NP = loss[:, to_P] - loss[:, from_P]
        member_UN = csr_array((np.ones(n), (unit, np.arange(n))), shape=(len(self.tokens_U), n))
        self.sum_dl_UP += member_UN @ dl_NP
        self.sum_abs_UP += member_UN @ np.abs(dl_NP)
        self.tokens_U += np.bincount(unit, minlength=len(self.tokens_U))

    def metrics(self) -> ZeroSumMetrics:
        """Return the metrics over all tokens."""
        return ZeroSumMetrics.from_sums(
            self.sum_dl_UP.sum(axis=0), self.sum_abs_UP.sum(axis=0), self._n_tokens()
        )

    def resampled(self, weight_RU: ArrayLike) -> ZeroSumMetrics:
        """Return the metrics of resamples that take unit u weight_RU[:, u] times.

        Raises:
            TokscaleError: the weights are not one finite number, not negative, per unit.
            UndefinedError: a resample has no token.
        """
        weight = np.asarray(weight_RU, dtype=np.float64)
        good = weight.ndim == 2 and weight.shape[1] == len(self.tokens_U)
        if not good or not (np.isfinite(weight) & (weight >= 0)).all():
            raise TokscaleError(
                f"weights of shape {weight.shape} do not resample {len(self.tokens_U)} units; "
                "expected one finite weight, not negative, per resample and unit"
            )
        tokens_R = weight @ self.tokens_U
        if not (tokens_R > 0).all():
            raise UndefinedError("a resample has no token; draw more units")
        return ZeroSumMetrics.from_sums(
            weight @ self.sum_dl_UP, weight @ self.sum_abs_UP, tokens_R[:, None]
        )

    def intervals(self, weight_RU: ArrayLike) -> ZeroSumIntervals:
        """Return 95% percentile intervals over resamples of units.

        The intervals do not cover the noise that all tokens of a run share. An interval is NaN if
        the metric of the data as they are lies outside of it.
        """
        resampled, whole = self.resampled(weight_RU), self.metrics()
        return ZeroSumIntervals(
            *(
                np.transpose(
                    [percentile_interval(*each) for each in zip(value_P, value_RP.T, strict=True)]
                )
                for value_P, value_RP in (
                    (whole.interference, resampled.interference),
                    (whole.movement, resampled.movement),
                    (whole.change, resampled.change),
                )
            )
        )

    def _n_tokens(self) -> int:
        n_tokens = int(self.tokens_U.sum())
        if not n_tokens:
            raise UndefinedError("zero-sum metrics have no tokens; add a block of losses first")
        return n_tokens

    def _checked_block(self, loss_NK: Floats) -> Floats:
        if loss_NK.ndim != 2 or loss_NK.shape[1] != self._n_probes:
            raise TokscaleError(
                f"a block of shape {loss_NK.shape} does not match {self._n_probes} probes; "
                "expected a row per token and a column per probe"
            )
        if not np.isfinite(loss_NK).all():
            raise TokscaleError(
                "a block has losses that are not finite; leave out the tokens that miss some"
            )
        return loss_NK

    def _checked_units(self, unit_N: NDArray[np.generic], n: int) -> Integers:
        good = unit_N.shape == (n,) and np.issubdtype(unit_N.dtype, np.integer)
        unit = unit_N.astype(np.int64) if good else np.array([-1])
        if n and (unit.min() < 0 or unit.max() >= len(self.tokens_U)):
            raise TokscaleError(
                f"units of tokens are not {n} integers from 0 to {len(self.tokens_U) - 1}, one per "
                "token; give `n_units` the number of units of the whole run"
            )
        return unit[:n]


def measure_zero_sum(run: Run, n_resamples: int, seed: int) -> ZeroSumResult:
    """Return the metrics of a run's pairs of probes, with intervals over documents.

    A run of few documents has no resamples, and so no intervals (`Units.weights`).

    Raises:
        UndefinedError: no probe lies near twice the step of another, or no token has finite losses.
    """
    units = run.tokens.units(seed)
    sums = ZeroSum(run.time_K(), len(units))
    for at_N, loss_NK in run.finite_blocks():
        sums.add(loss_NK, unit_N=units.unit_N[at_N])
    whole = sums.metrics()
    weight_RU = units.weights(n_resamples, seed)[1:]
    if np.isfinite(weight_RU).all():
        intervals = sums.intervals(weight_RU)
    else:
        intervals = ZeroSumIntervals(*[np.full((2, len(sums.to_step_P)), np.nan)] * 3)
    pairs = zip(
        sums.from_step_P.tolist(),
        sums.to_step_P.tolist(),
        _estimates(whole.interference, intervals.interference_2P),
        _estimates(whole.movement, intervals.movement_2P),
        _estimates(whole.change, intervals.change_2P),
        strict=True,
    )
    return ZeroSumResult(tuple(ZeroSumPair(*pair) for pair in pairs))


def _estimates(value_P: Floats, interval_2P: Floats) -> list[Estimate]:
    rows = zip(value_P.tolist(), *interval_2P.tolist(), strict=True)
    return [Estimate(value, low, high) for value, low, high in rows]
