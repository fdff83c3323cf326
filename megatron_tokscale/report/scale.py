"""A logarithmic time axis with a place for step 0 at its left, for every figure alike.

Shapes: K probe steps.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

LABELS = {
    "step": "training step",
    "tokens": "training tokens",
    "lr-sum": "sum of learning rates over their peak",
}
UNITS = {"step": "steps", "tokens": "tokens", "lr-sum": "peak-rate steps"}

_ZERO_GAP = 2.0
_SUFFIXES = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))


@dataclass(frozen=True)
class TimeScale:
    """Where times are on a logarithmic axis.

    Attributes:
        low: first positive time.
        high: last time.
        has_zero: whether there is a probe at time 0.
    """

    low: float
    high: float
    has_zero: bool

    @staticmethod
    def from_times(time_K: NDArray[np.float64]) -> "TimeScale":
        """The scale that holds these times."""
        positive = time_K[time_K > 0]
        return TimeScale(float(positive.min()), float(positive.max()), bool((time_K == 0).any()))

    @property
    def zero(self) -> float:
        """Where time 0 is drawn: a factor of two left of the first positive time."""
        return self.low / _ZERO_GAP

    @property
    def left(self) -> float:
        """The left end of the axis."""
        return self.zero if self.has_zero else self.low

    def place(self, time_K: NDArray[np.float64]) -> NDArray[np.float64]:
        """The times, with 0 moved to its place."""
        return np.where(time_K > 0, time_K, self.zero)

    def ticks(self) -> dict[float, str]:
        """Position to label: 0 if there is one, and powers of ten; 1-2-5 within two decades."""
        exponents = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        wide = self.high / self.low > 100
        steps = [m * 10.0**e for e in exponents for m in ((1,) if wide else (1, 2, 5))]
        inside = {t: short(t) for t in steps if self.low * 0.999 <= t <= self.high * 1.001}
        return ({self.zero: "0"} if self.has_zero else {}) | inside

    def minor_ticks(self) -> list[float]:
        """The multiples of the powers of ten between the ends."""
        exponents = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        steps = (m * 10.0**e for e in exponents for m in range(2, 10))
        return [t for t in steps if self.low <= t <= self.high]


def short(value: float) -> str:
    """A number in four characters or so: 300, 2.5k, 10M."""
    for size, suffix in _SUFFIXES:
        if value >= size * 0.9999:
            return f"{value / size:.3g}{suffix}"
    return f"{value:.3g}"


def time_of(x_K: NDArray[np.float64]) -> NDArray[np.float64]:
    """Time from its natural logarithm; 0 for -inf."""
    return np.asarray(np.exp(x_K))
