"""The axis of a fit: the probes' x, and the bounds of midpoints and widths.

Shapes: K probe steps.
"""

from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import ArrayLike

from megatron_tokscale.core.arrays import Floats, Mask
from megatron_tokscale.core.errors import TokscaleError

MIN_PROBES = 5
"""Least number of losses of a token that is fitted: one more than a sigmoid has parameters."""
_FAR = 1000.0
"""Distance at which step 0 is placed before the first finite probe, in units of the probed range. A
midpoint lies at most one spacing before the range, and a width is at most the range. So s at step 0
is 1 to the last bit, as it is at x = -inf."""
_NARROWEST = 20
"""Closest distance of two probes over the least width. Halfway between two probes a sigmoid of that
width is a step to 5e-5, and a narrower one looks the same."""
_BURST = 10
"""Median distance of two probes over the least distance that counts as `closest`. Our choice: a few
probes in a burst must not allow very narrow sigmoids everywhere."""


@dataclass(frozen=True)
class ProbeAxis:
    """The places of the probes on the x axis; `ProbeAxis.from_x` checks them.

    Attributes:
        x_K: x of each probe, ascending; equal for runs of one size; -inf at time 0. Besides step 0,
            that can be a later probe on the axis of summed learning rates, if the first rates are
            0.
        low: smallest finite x.
        high: largest x.
        spacing: median distance of neighbouring finite probes.
        closest: smallest such distance, or a tenth of the median if that is more.
    """

    x_K: Floats
    low: float
    high: float
    spacing: float
    closest: float

    @classmethod
    def from_x(cls, x_K: ArrayLike) -> Self:
        """Return the axis of the probes at `x_K`.

        Raises:
            TokscaleError: fewer than five probes, x not ascending, NaN, or +inf.
        """
        x_K = np.asarray(x_K, dtype=np.float64)
        if x_K.ndim != 1:
            raise TokscaleError(
                f"the probes' x has shape {x_K.shape}; expected one dimension; give an x per probe"
            )
        if len(x_K) < MIN_PROBES:
            raise TokscaleError(
                f"a sigmoid needs at least {MIN_PROBES} probe steps, there are {len(x_K)}; "
                "train on, or probe more often (--tokscale-probe-schedule)"
            )
        if np.isnan(x_K).any() or np.isposinf(x_K).any():
            raise TokscaleError("the probes' x has NaN or +inf; use another time axis")
        finite = x_K[np.isfinite(x_K)]
        before = x_K[: len(x_K) - len(finite)]
        if not np.isneginf(before).all() or not (np.diff(finite) >= 0).all():
            raise TokscaleError(
                "the probes' x does not ascend; sort the probes, or use the time 'step'"
            )
        distinct = np.unique(finite)
        if len(distinct) < MIN_PROBES - 1:
            raise TokscaleError(
                f"only {len(distinct)} probes have a finite x of their own, a sigmoid needs "
                f"{MIN_PROBES - 1}; train on, or probe more often (--tokscale-probe-schedule)"
            )
        distances = np.diff(distinct)
        spacing = float(np.median(distances))
        closest = max(float(distances.min()), spacing / _BURST)
        return cls(x_K, float(finite[0]), float(finite[-1]), spacing, closest)

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
        """The bounds of a midpoint: the probed range and one spacing on either side."""
        return self.low - self.spacing, self.high + self.spacing

    @property
    def width_bounds(self) -> tuple[float, float]:
        """The bounds of a width: from a step between two probes (`_NARROWEST`) to the range."""
        return self.closest / _NARROWEST, self.span

    @property
    def timed_K(self) -> Mask:
        """Mask of the probes with a finite x."""
        return np.isfinite(self.x_K)

    @property
    def unit_K(self) -> Floats:
        """The x in units of the probed range: 0 at the first finite probe, 1 at the last.

        An x of -inf becomes -`_FAR`, where s = 1 and s' = 0 to the last bit.
        """
        return np.where(np.isfinite(self.x_K), (self.x_K - self.low) / self.span, -_FAR)

    def as_metadata(self) -> list[float | None]:
        """Return x_K as plain JSON values: null stands for -inf."""
        return x_as_metadata(self.x_K)


def x_as_metadata(x_K: Floats) -> list[float | None]:
    """Return x_K as plain JSON values: null stands for -inf."""
    return [float(x) if np.isfinite(x) else None for x in x_K]
