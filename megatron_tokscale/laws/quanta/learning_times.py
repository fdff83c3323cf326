"""Exponent b of learning time = onset + E frequency^-b (docs/references.md 4.1, 4.2).

Shapes: I groups of tokens (subtasks, token types).
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import brentq, minimize_scalar
from scipy.special import expit
from scipy.stats import f as f_distribution
from scipy.stats import t as student_t

from megatron_tokscale.core.arrays import Floats, Mask
from megatron_tokscale.core.errors import TokscaleError, UndefinedError
from megatron_tokscale.laws.estimates import symmetric_estimate
from megatron_tokscale.results.estimate import Estimate
from megatron_tokscale.results.laws import FrequencyExponent

MIN_GROUPS = 5  # our choice: one more than a fit of three parameters and a scatter needs
B_BOUNDS = (0.02, 5.0)  # wider than any published exponent; our choice
_ONSETS = (-12.0, 12.0)  # bounds of the logit of the onset's share; 6e-6 counts as no onset
_N_ONSETS, _N_EXPONENTS = 25, 40  # grid of shares and exponents: one basin each; our choice
_ROUNDING = 1e-24  # mean square of residuals that are only rounding errors


def frequency_exponent(
    frequency_I: ArrayLike,
    time_I: ArrayLike,
    *,
    weight_I: ArrayLike | None = None,
    end: float | None = None,
) -> FrequencyExponent:
    """Fit time = onset + E frequency^-b, onset >= 0, by weighted least squares in ln(time).

    A quantum that a model learns after E exposures, counted from a phase that all quanta share, has
    b = 1; so b = 1 is the claim of Michaud et al. (docs/references.md 4.1) with an onset (our
    extension). Without an onset, quanta with exactly b = 1 have the slope 0.35 over the frequencies
    of a small run, as the common phase hides the differences of the frequent ones. Sparse parity
    has 0.81 without an onset (docs/references.md 4.2).

    The interval of b is by profile: the b at which the sum of squares, least over the two other
    parameters, rises by the quantile of F. It ends at a bound, 0.02 or 5, where the data give no
    end. Groups count as independent, with normal scatter in ln(time). Measured coverage of the 95%
    intervals: benchmarks/results/quanta_onset.md.

    A group that was not learned by `end` is censored. Groups as rare as the commonest one of these
    and rarer are left out: of them only those are seen that are learned early, which lowers b.

    Args:
        frequency_I: share or count of each group's tokens in training, above 0.
        time_I: learning time of each group (steps or tokens), above 0; infinite or NaN where a
            group was not learned.
        weight_I: weight of each group, such as its number of events; equal by default.
        end: last time at which a learning time is not biased; by default no time is censored but
            those that are not finite.

    Raises:
        TokscaleError: the arguments do not fit together.
        UndefinedError: fewer than five groups are left, a number is not positive, or all
            frequencies are the same.
    """
    groups = _Groups.checked(frequency_I, time_I, weight_I, np.inf if end is None else end)
    best = groups.best()
    interval = _interval(groups, best)
    slope, stderr = groups.line()
    reach = stderr * float(student_t.ppf(0.975, groups.n - 2))
    total = float(groups.weight_I @ (groups.y_I - groups.weight_I @ groups.y_I) ** 2)
    return FrequencyExponent(
        b=Estimate(best.b, *interval),
        onset=best.onset,
        exposures=best.exposures,
        b_without_onset=symmetric_estimate(-slope, reach),
        r2=1 - best.square / total if total > 0 else float("nan"),
        n_groups=groups.n,
        n_censored=groups.n_censored,
    )


@dataclass(frozen=True)
class _Law:
    """Best law at one b: its weighted mean square, and its parameters."""

    b: float
    square: float
    onset: float
    exposures: float


@dataclass(frozen=True)
class _Groups:
    """Logarithms of the frequencies and times of the fitted groups; the weights add up to one."""

    x_I: Floats
    y_I: Floats
    weight_I: Floats
    n_censored: int

    @property
    def n(self) -> int:
        return len(self.x_I)

    @classmethod
    def checked(
        cls, frequency_I: ArrayLike, time_I: ArrayLike, weight_I: ArrayLike | None, end: float
    ) -> "_Groups":
        """Return the groups that are commoner than all censored ones."""
        frequency, time = np.asarray(frequency_I, np.float64), np.asarray(time_I, np.float64)
        weight = np.ones_like(frequency) if weight_I is None else np.asarray(weight_I, np.float64)
        if frequency.ndim != 1 or not frequency.shape == time.shape == weight.shape:
            raise TokscaleError(
                f"frequencies are of shape {frequency.shape}, times of shape {time.shape} and "
                f"weights of shape {weight.shape}; expected one of each per group"
            )
        known_I = ~np.isfinite(time) | (time > 0)
        positive_I = np.isfinite(frequency + weight) & (frequency > 0) & (weight > 0)
        if not (known_I & positive_I).all():
            raise UndefinedError(
                "frequencies, learning times or weights are not positive; leave those groups out"
            )
        censored_I: Mask = ~np.isfinite(time) | (time > end)
        commonest = float(frequency[censored_I].max()) if censored_I.any() else 0.0
        kept_I = ~censored_I & (frequency > commonest)
        frequency, time, weight = frequency[kept_I], time[kept_I], weight[kept_I]
        if len(time) < MIN_GROUPS:
            raise UndefinedError(
                f"{len(time)} groups were learned within the run, and are commoner than all "
                f"others; expected {MIN_GROUPS} or more; split the groups, or train for longer"
            )
        if np.ptp(frequency) == 0:
            raise UndefinedError(
                "all groups have the same frequency, so there is no slope; group by something else"
            )
        return cls(np.log(frequency), np.log(time), weight / weight.sum(), int((~kept_I).sum()))

    def line(self) -> tuple[float, float]:
        """Return the slope of the weighted straight line through the logarithms, and its error."""
        away_I = self.x_I - self.weight_I @ self.x_I
        spread = float(self.weight_I @ away_I**2)
        slope = float((self.weight_I * away_I) @ self.y_I) / spread
        residual_I = self.y_I - self.weight_I @ self.y_I - slope * away_I
        square = float(self.weight_I @ residual_I**2) / (self.n - 2)
        return slope, math.sqrt(square / spread)

    def best(self) -> _Law:
        """Return the law with the least mean square over all b."""
        grid = np.geomspace(*B_BOUNDS, _N_EXPONENTS)
        start = int(np.argmin([self.at(float(b)).square for b in grid]))
        low, high = grid[max(start - 1, 0)], grid[min(start + 1, len(grid) - 1)]
        found = minimize_scalar(
            lambda b: self.at(float(b)).square, bounds=(low, high), options={"xatol": 1e-6}
        )
        return min((self.at(float(found.x)), self.at(float(grid[start]))), key=lambda p: p.square)

    def at(self, b: float) -> _Law:
        """Return the best law with this b.

        With q the frequency over its mean in the logarithm, and s the onset's share of the time at
        q = 1, the law is ln(time) = level + ln(s + (1 - s) q^-b); the level is a mean.
        """
        centred_I = self.x_I - self.weight_I @ self.x_I
        power_I = np.exp(-b * centred_I)

        def shape_I(logit: float) -> Floats:
            share = expit(logit)
            return np.asarray(np.log(share + expit(-logit) * power_I))

        def square(logit: float) -> float:
            residual_I = self.y_I - shape_I(logit)
            return float(self.weight_I @ (residual_I - self.weight_I @ residual_I) ** 2)

        grid = np.linspace(*_ONSETS, _N_ONSETS)
        start = int(np.argmin([square(float(logit)) for logit in grid]))
        low, high = grid[max(start - 1, 0)], grid[min(start + 1, len(grid) - 1)]
        found = minimize_scalar(square, bounds=(low, high), options={"xatol": 1e-4})
        logit = float(found.x if found.fun < square(float(grid[start])) else grid[start])
        level = float(np.exp(self.weight_I @ (self.y_I - shape_I(logit))))
        scale = level * float(expit(-logit)) * np.exp(b * (self.weight_I @ self.x_I))
        onset = 0.0 if start == 0 else level * float(expit(logit))
        return _Law(b, square(logit), onset, float(scale))


def _interval(groups: _Groups, best: _Law) -> tuple[float, float]:
    """Return the 95% profile interval of b, within `B_BOUNDS`."""
    freedom = groups.n - 3
    rise = 1 + float(f_distribution.ppf(0.95, 1, freedom)) / freedom
    level = max(best.square, _ROUNDING) * rise

    def above(b: float) -> float:
        return groups.at(b).square - level

    low, high = B_BOUNDS
    first = low if above(low) <= 0 else float(brentq(above, low, best.b, xtol=1e-4))
    last = high if above(high) <= 0 else float(brentq(above, best.b, high, xtol=1e-4))
    return min(first, best.b), max(last, best.b)
