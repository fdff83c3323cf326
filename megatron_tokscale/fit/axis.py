"""The axis of a fit: the probes' x, and the box a midpoint and a width may lie in.

Shapes: K probe steps.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from megatron_tokscale.core.errors import TokscaleError

MIN_PROBES = 5
_FAR = 1000.0


@dataclass(frozen=True)
class Axis:
    """Where the probes are on the x axis. Make one with `Axis.from_x`.

    Attributes:
        x_K: x of each probe, ascending; -inf for step 0, and for later probes at which no time has
            passed (a first step at learning rate 0, in summed learning rates).
        low: smallest finite x.
        high: largest x.
        spacing: median distance of neighbouring finite probes.
        closest: smallest such distance, but no less than a tenth of the median.
    """

    x_K: NDArray[np.float64]
    low: float
    high: float
    spacing: float
    closest: float

    @staticmethod
    def from_x(x_K: ArrayLike) -> "Axis":
        """Check `x_K` and measure it.

        Raises:
            TokscaleError: fewer than five probes, x not ascending, NaN, or +inf.
        """
        x_K = np.asarray(x_K, dtype=np.float64)
        if x_K.ndim != 1:
            raise TokscaleError(f"the probes' x must be one-dimensional, not {x_K.shape}")
        if len(x_K) < MIN_PROBES:
            raise TokscaleError(
                f"a sigmoid needs at least {MIN_PROBES} probe steps, there are {len(x_K)}; "
                "train on, or probe more often (--tokscale-probe-schedule)"
            )
        if np.isnan(x_K).any() or np.isposinf(x_K).any():
            raise TokscaleError("the probes' x has NaN or +inf; use another time axis")
        finite = x_K[np.isfinite(x_K)]
        before = x_K[: len(x_K) - len(finite)]
        if not np.isneginf(before).all() or not (np.diff(finite) > 0).all():
            raise TokscaleError(
                "the probes' x does not ascend (two probes at one time, or out of order); "
                "sort the probes, or use the time 'step'"
            )
        if len(finite) < MIN_PROBES - 1:
            raise TokscaleError(
                f"only {len(finite)} probes have a finite x, a sigmoid needs {MIN_PROBES - 1}; "
                "train on, or probe more often (--tokscale-probe-schedule)"
            )
        distances = np.diff(finite)
        spacing = float(np.median(distances))
        closest = max(float(distances.min()), spacing / 10)
        return Axis(x_K, float(finite[0]), float(finite[-1]), spacing, closest)

    @property
    def n_probes(self) -> int:
        """Number of probes K."""
        return len(self.x_K)

    @property
    def span(self) -> float:
        """Length of the probed range of x."""
        return self.high - self.low

    @property
    def midpoint_bounds(self) -> tuple[float, float]:
        """Where a midpoint may lie: the probed range and one spacing on either side."""
        return self.low - self.spacing, self.high + self.spacing

    @property
    def width_bounds(self) -> tuple[float, float]:
        """Which width may be fitted: from a step between two probes to the whole range.

        At a twentieth of their distance a sigmoid halfway between two probes is a step to 5e-5.
        """
        return self.closest / 20, self.span

    @property
    def timed_K(self) -> NDArray[np.bool_]:
        """Which probes have a finite x."""
        return np.isfinite(self.x_K)

    @property
    def unit_K(self) -> NDArray[np.float64]:
        """x_K in units of the probed range: 0 at the first finite probe, 1 at the last.

        Step 0 is at a finite place so far left that s = 1 and s' = 0 to the last bit.
        """
        return np.where(np.isfinite(self.x_K), (self.x_K - self.low) / self.span, -_FAR)

    def as_metadata(self) -> list[Any]:
        """x_K as plain JSON values: null stands for -inf."""
        return [float(x) if np.isfinite(x) else None for x in self.x_K]
