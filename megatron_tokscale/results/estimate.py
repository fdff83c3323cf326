"""A number with its 95% interval, or the reason why it is undefined; and its form in print.

Shapes: R resamples (the first is the data as they are), I items that a jackknife leaves out.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Self

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import stdtrit

from megatron_tokscale.core.arrays import Floats
from megatron_tokscale.core.errors import UndefinedError


@dataclass(frozen=True)
class Undefined:
    """Reason why the data do not determine a result.

    Attributes:
        undefined: the reason, a sentence for people.
    """

    undefined: str


@dataclass(frozen=True)
class Estimate:
    """A number and its 95% interval; the number lies in it. An unknown interval is NaN.

    Attributes:
        value: the number, corrected for its bias if it has an interval; NaN where it is not
            defined.
        low: lower end of the interval.
        high: upper end of the interval.
        uncorrected: the number of the data as they are.
    """

    value: float
    low: float = math.nan
    high: float = math.nan
    uncorrected: float = field(default=math.nan, compare=False)

    def __post_init__(self) -> None:
        known = np.isfinite([self.low, self.high])
        if known.any() and not (known.all() and self.low <= self.value <= self.high):
            raise ValueError(f"{self.value} is not in [{self.low}, {self.high}]")

    @property
    def has_interval(self) -> bool:
        """Return whether the interval is known."""
        return math.isfinite(self.low)

    @classmethod
    def from_resamples(
        cls, value_R: ArrayLike, least: float = -np.inf, most: float = np.inf
    ) -> Self:
        """Return the bias-corrected value and its interval.

        A score such as R^2 is lower on few documents than on many, because the measured values that
        it compares with are noisier. Resamples are lower by the same amount again, so they show the
        bias: their median minus the value of the data as they are. Twice the bias is subtracted
        from the median and from the percentiles of the resamples: value and interval are those that
        many documents would give, and the value is always in its interval (our choice; measured
        coverage: benchmarks/results/evidence.md). The correction may move them out of the range of
        the number; all three are then clipped to it. Without an interval, the value is that of the
        data as they are.

        Args:
            value_R: the value of the data as they are, then those of the resamples.
            least: the smallest value that the number can have.
            most: the largest value that it can have.
        """
        value, *drawn = np.asarray(value_R, dtype=np.float64)
        drawn_R = np.array(drawn)[np.isfinite(drawn)]
        undefined = cls(float(value), float("nan"), float("nan"), float(value))
        if not np.isfinite(value) or len(drawn_R) < max(len(drawn) // 2, 2):
            return undefined
        low, median, high = np.quantile(drawn_R, [0.025, 0.5, 0.975], method="weibull")
        corrected = np.array([median, low, high]) + 2 * (value - median)
        if corrected[2] < least or corrected[1] > most:
            return undefined
        kept, low, high = np.clip(corrected, least, most).tolist()
        return cls(kept, low, high, float(value))

    @classmethod
    def from_jackknife(cls, value: float, left_out_I: Floats, most: float = np.inf) -> Self:
        """Return a number and its interval by the jackknife (Tukey 1958).

        A bootstrap of a handful of runs often draws one size only; leaving one run out never does.
        The half-length is Student's quantile with I - 1 degrees of freedom times the jackknife's
        error. There is no interval if there are fewer than three items.

        Args:
            value: the number from all items: runs, or units of resampling.
            left_out_I: the number without each item; NaN where it is not defined, and then there
                is no interval.
            most: the largest value that the number can have.
        """
        count = len(left_out_I)
        if count < 3 or not np.isfinite(left_out_I).all():
            return cls(value)
        error = np.sqrt((count - 1) / count * ((left_out_I - left_out_I.mean()) ** 2).sum())
        half = float(stdtrit(count - 1, 0.975) * error)
        return cls(value, value - half, min(value + half, max(most, value)), value)

    @classmethod
    def of_sum(cls, value_R: ArrayLike, least: float = -np.inf, most: float = np.inf) -> Self:
        """Return the number of the data as they are, and the percentiles of its resamples.

        For sums and other numbers that resamples do not bias: sums of such estimates are those of
        their numbers. The interval is widened to hold the number.

        Args:
            value_R: the value of the data as they are, then those of the resamples.
            least: the smallest value that the number can have.
            most: the largest value that it can have.
        """
        first, *drawn = np.asarray(value_R, dtype=np.float64)
        value, drawn_R = float(first), np.array(drawn)[np.isfinite(drawn)]
        if not math.isfinite(value) or len(drawn_R) < 2:
            return cls(value, uncorrected=value)
        low, high = np.clip(np.quantile(drawn_R, [0.025, 0.975]), least, most).tolist()
        return cls(value, min(low, value), max(high, value), value)


def defined_or_reason[T](compute: Callable[[], T]) -> T | Undefined:
    """Return the result of `compute`, or why it is undefined; a `TokscaleError` propagates."""
    try:
        return compute()
    except UndefinedError as error:
        return Undefined(str(error))


def format_estimate(estimate: Estimate | Undefined, pattern: str = ".3f") -> str:
    """Return "0.470 [0.435, 0.508]"; without an interval "0.470"; "-" where it is undefined."""
    if isinstance(estimate, Undefined) or not math.isfinite(estimate.value):
        return "-"
    if not estimate.has_interval:
        return f"{estimate.value:{pattern}}"
    return f"{estimate.value:{pattern}} [{estimate.low:{pattern}}, {estimate.high:{pattern}}]"
