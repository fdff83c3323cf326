"""Fit of the multi-power law to loss curves: Huber loss on log residuals, from many starts.

Shapes: I losses of a curve, J changes of its learning rate, P = 7 parameters (L0, ln A, alpha,
ln B, ln C, beta, gamma), in units of the lowest loss, the peak learning rate and the geometric mean
of the summed learning rates. In these units the parameters are near one.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Self

import numpy as np
from scipy.optimize import minimize, nnls

from megatron_tokscale.core.arrays import Floats, Integers
from megatron_tokscale.core.errors import UndefinedError
from megatron_tokscale.laws.multi_power.schedule import LearningRateSchedule, loss_drop
from megatron_tokscale.laws.power_law.huber import DELTA

GROUP = 16  # steps whose changes are merged: this moves no loss of the authors by 1e-4 nats
_DESCENTS = 4  # descents from the best starts; our choice: cost against missed minima
# The grid of starts, about the authors' parameters (docs/references.md 8.2); our choice.
_ALPHAS = (0.2, 0.4, 0.6, 1.0)
_SPEEDS = (3.0, 30.0, 300.0, 3000.0, 30_000.0)
_BETAS, _GAMMAS = (0.2, 0.5, 1.0, 2.0), (0.0, 0.5, 1.0)
_AT_ONCE = 1e30  # a speed C at which G = 1
_NO_LEVEL = 1e-6  # stands for zero, whose logarithm is infinite, if a start lacks a term

Point = Floats
Bounds = tuple[tuple[float, float], ...]
_BOUNDS: Bounds = (
    (0.0, 1.0),
    (-20.0, 20.0),
    (1e-3, 10.0),
    (-20.0, 20.0),
    (-20.0, 20.0),
    (1e-3, 20.0),
    (-1.0, 4.0),
)
"""Bounds of the parameters in their order, wider than any published value (our choice)."""


@dataclass(frozen=True)
class HeldDrop:
    """Parameters of the loss drop that are held fixed (our choice; see `fit_multi_power`).

    Attributes:
        rest: B as a share of the B of the law with G = 1, in which a lower learning rate has its
            full gain at once.
        beta: exponent of the approach to that gain.
        gamma: exponent of the learning rate in the approach; with 0, the approach depends on the
            summed learning rate alone.

    Raises:
        UndefinedError: rest or beta is not positive.
    """

    rest: float = 0.95
    beta: float = 2.0
    gamma: float = 0.0

    def __post_init__(self) -> None:
        if not (self.rest > 0 and self.beta > 0):
            raise UndefinedError(
                f"{self} has no loss drop; expected a positive rest and beta; give larger ones"
            )


HELD = HeldDrop()


@dataclass(frozen=True)
class Problem:
    """Fitted curves, and the units of the parameters.

    Attributes:
        schedules: learning-rate schedule of each curve, in units of `peak` and `middle`.
        log_losses: logarithm of each curve's losses, in units of `lowest`.
        lowest: lowest loss of all curves, in nats.
        peak: peak learning rate of all curves.
        middle: geometric mean of the summed learning rates at all losses.
    """

    schedules: tuple[LearningRateSchedule, ...]
    log_losses: tuple[Floats, ...]
    lowest: float
    peak: float
    middle: float

    @classmethod
    def from_curves(cls, curves: Sequence[tuple[Floats, Integers, Floats]]) -> Self:
        """Return the problem of curves: (rates of all steps, steps with a loss, these losses)."""
        schedules = [
            LearningRateSchedule.from_rates(rate_T, step_I, GROUP) for rate_T, step_I, _ in curves
        ]
        lowest = min(float(loss_I.min()) for _, _, loss_I in curves if len(loss_I))
        peak = max(float(rate_T.max()) for rate_T, _, _ in curves)
        middle = float(np.exp(np.log(np.concatenate([s.sum_I for s in schedules])).mean()))
        return cls(
            schedules=tuple(_in_units(schedule, peak, middle) for schedule in schedules),
            log_losses=tuple(np.log(loss_I / lowest) for _, _, loss_I in curves),
            lowest=lowest,
            peak=peak,
            middle=middle,
        )

    def solve(self, held: HeldDrop | None) -> tuple[Point, bool]:
        """Return the best point, and whether it is a minimum inside the bounds."""
        if held is None:
            return self._best(_BOUNDS, _BETAS, _GAMMAS, _SPEEDS)
        # First fit the law with G = 1, then the law whose B is the share `rest` of its B.
        shape = (*_BOUNDS[:4], _fixed(np.log(_AT_ONCE)), _fixed(held.beta), _fixed(held.gamma))
        at_once, found = self._best(shape, (held.beta,), (held.gamma,), (_AT_ONCE,))
        log_b = float(at_once[3]) + np.log(held.rest)
        shape = (*_BOUNDS[:3], _fixed(log_b), _BOUNDS[4], *shape[5:])
        best, converged = self._best(shape, (held.beta,), (held.gamma,), _SPEEDS)
        return best, found and converged

    def objective(self, point: Point) -> tuple[float, Floats]:
        """Return the sum of the Huber losses over delta, and its gradient."""
        value, slope_P = 0.0, np.zeros(len(point))
        for schedule, log_loss_I in zip(self.schedules, self.log_losses, strict=True):
            loss_I, slope_IP = _losses_and_slopes(schedule, point)
            residual_I = np.log(loss_I) - log_loss_I
            clipped_I = np.clip(residual_I, -DELTA, DELTA)
            value += float(clipped_I @ (residual_I - clipped_I / 2)) / DELTA
            slope_P += (clipped_I / (loss_I * DELTA)) @ slope_IP
        return value, slope_P

    def _best(
        self,
        bounds: Bounds,
        betas: Sequence[float],
        gammas: Sequence[float],
        speeds: Sequence[float],
    ) -> tuple[Point, bool]:
        shapes = product(speeds, betas, gammas)
        starts = [start for shape in shapes for start in self._starts(*shape)]
        low_P, high_P = np.array(bounds).T
        starts.sort(key=lambda start: start[0])
        minima = [
            minimize(
                self.objective,
                np.clip(start_P, low_P, high_P),
                jac=True,
                method="L-BFGS-B",
                bounds=bounds,
                options={"maxiter": 2000, "ftol": 1e-12, "gtol": 1e-6},
            )
            for _, start_P in starts[:_DESCENTS]
        ]
        best = min(minima, key=lambda minimum: float(minimum.fun))
        free_P = low_P < high_P
        inside = ((best.x > low_P) & (best.x < high_P))[free_P].all()
        return np.asarray(best.x), bool(best.success and inside)

    def _starts(self, speed: float, beta: float, gamma: float) -> list[tuple[float, Point]]:
        """Return a start and its error for each alpha of the grid: L0, A and B by least squares."""
        relative_I = np.exp(-np.concatenate(self.log_losses))
        sum_I = np.concatenate([schedule.sum_I for schedule in self.schedules])
        drops = [loss_drop(schedule, speed, beta, gamma)[:, 0] for schedule in self.schedules]
        starts = []
        for alpha in _ALPHAS:
            terms_I3 = np.stack([np.ones_like(sum_I), sum_I**-alpha, -np.concatenate(drops)], 1)
            levels, error = nnls(terms_I3 * relative_I[:, None], np.ones_like(sum_I))
            log_a, log_b = np.log(np.maximum(levels[1:], _NO_LEVEL))
            point = np.array([levels[0], log_a, alpha, log_b, np.log(speed), beta, gamma])
            starts.append((float(error), point))
        return starts


def _fixed(value: float) -> tuple[float, float]:
    return float(value), float(value)


def _in_units(schedule: LearningRateSchedule, peak: float, middle: float) -> LearningRateSchedule:
    return replace(
        schedule,
        sum_I=schedule.sum_I / middle,
        fall_J=schedule.fall_J / peak,
        log_rate_J=schedule.log_rate_J - np.log(peak),
        before_J=schedule.before_J / middle,
    )


def _losses_and_slopes(schedule: LearningRateSchedule, point: Point) -> tuple[Floats, Floats]:
    """Return the law's losses and their derivatives (I, P)."""
    floor, log_a, alpha, log_b, log_c, beta, gamma = point
    reducible_I = np.exp(log_a - alpha * np.log(schedule.sum_I))
    drop_I4 = np.exp(log_b) * loss_drop(schedule, np.exp(log_c), beta, gamma)
    slope_IP = np.column_stack(
        [
            np.ones_like(reducible_I),
            reducible_I,
            -reducible_I * np.log(schedule.sum_I),
            -drop_I4,
        ]
    )
    return floor + reducible_I - drop_I4[:, 0], slope_IP
