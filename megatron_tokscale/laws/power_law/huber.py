"""Fit of E + B t^-alpha to a loss curve: Huber loss on log residuals, from many starts.

Besiroglu et al. fit Chinchilla's law in this way (docs/references.md 8.3); here time is the only
variable. Shapes: K probe steps.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy.optimize import minimize

from megatron_tokscale.core.arrays import Floats

DELTA = 1e-3  # log residual at which the Huber loss becomes linear (docs/references.md 8.3)
EXPONENT_BOUNDS = (1e-3, 10.0)  # wider than any published exponent; our choice
_LEVEL_BOUNDS = (-50.0, 50.0)  # bounds of ln B: keep a wild step of the descent from overflow
_FLOOR_SHARES = (0.0, 0.2, 0.4, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
"""Floors that descents start from, as shares of the lowest loss: closer together near 1, where the
exponent changes fastest (our choice)."""


@dataclass(frozen=True)
class Solution:
    """Minimum of the Huber loss: floor E, log_scale ln B and exponent alpha."""

    floor: float
    log_scale: float
    exponent: float
    converged: bool


@dataclass(frozen=True)
class Curve:
    """Logarithms of time and loss at the fitted probes.

    The optimiser's parameters are E / L, ln(B t_0^-alpha / L) and alpha, with L the lowest loss and
    t_0 the geometric mean of the times. They are near one and depend neither on the unit of time
    nor on the unit of loss. E itself is a parameter, and not ln E as in Chinchilla's fits: where a
    curve shows no floor, the descent ends at E = 0, while ln E would go to -inf.
    """

    x_K: Floats
    log_loss_K: Floats

    @cached_property
    def _centred_K(self) -> Floats:
        return self.x_K - self.x_K.mean()

    @cached_property
    def _log_lowest(self) -> float:
        return float(self.log_loss_K.min())

    def solve(self) -> Solution:
        """Return the best of the minima reached from a grid of floors.

        For a given floor, ln(L - E) is linear in x. A straight line gives the two other parameters
        of a start, so a grid in one dimension is enough.
        """
        minima = [self._descend(self._start(share)) for share in _FLOOR_SHARES]
        return self._solution(*min(minima, key=lambda minimum: minimum[1]))

    def solve_near(self, start: Solution) -> Solution:
        """Return the minimum reached from `start`."""
        return self._solution(*self._descend(self._parameters(start)))

    def predict(self, solution: Solution) -> Floats:
        """Return the law's log losses at the curve's times."""
        return np.asarray(
            np.log(solution.floor + np.exp(solution.log_scale - solution.exponent * self.x_K))
        )

    def _start(self, floor: float) -> Floats:
        reducible_K = np.log(np.exp(self.log_loss_K - self._log_lowest) - floor)
        slope, level = np.polyfit(self._centred_K, reducible_K, 1)
        return np.array([floor, level, np.clip(-slope, *EXPONENT_BOUNDS)])

    def _descend(self, start: Floats) -> tuple[Floats, float, bool]:
        best = minimize(
            _objective,
            start,
            args=(self._centred_K, self.log_loss_K - self._log_lowest),
            jac=True,
            method="L-BFGS-B",
            bounds=[(0, None), _LEVEL_BOUNDS, EXPONENT_BOUNDS],
            options={"maxiter": 1000, "ftol": 1e-12, "gtol": 1e-6},
        )
        return np.asarray(best.x), float(best.fun), bool(best.success)

    def _solution(self, parameters: Floats, _: float, success: bool) -> Solution:
        floor, level, exponent = parameters.tolist()
        low, high = EXPONENT_BOUNDS
        return Solution(
            floor=float(floor * np.exp(self._log_lowest)),
            log_scale=float(level + self._log_lowest + exponent * self.x_K.mean()),
            exponent=exponent,
            converged=success and low < exponent < high,
        )

    def _parameters(self, solution: Solution) -> Floats:
        floor = solution.floor * np.exp(-self._log_lowest)
        level = solution.log_scale - self._log_lowest - solution.exponent * self.x_K.mean()
        return np.array([floor, level, solution.exponent])


def _objective(parameters: Floats, centred_K: Floats, log_loss_K: Floats) -> tuple[float, Floats]:
    """Return the sum of the Huber losses over delta, and its gradient.

    The sum is taken, not the mean: with the mean, L-BFGS meets its tolerance before the minimum
    (docs/references.md 8.3).
    """
    floor, level, exponent = parameters
    reducible_K = np.exp(level - exponent * centred_K)
    loss_K = floor + reducible_K
    residual_K = np.log(loss_K) - log_loss_K
    clipped_K = np.clip(residual_K, -DELTA, DELTA)
    value = (clipped_K * (residual_K - clipped_K / 2)).sum() / DELTA
    slope_K = clipped_K / (loss_K * DELTA)
    pull_K = slope_K * reducible_K
    return float(value), np.array([slope_K.sum(), pull_K.sum(), -pull_K @ centred_K])
