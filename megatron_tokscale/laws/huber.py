"""The best E + B t^-alpha for a loss curve: Huber loss on log residuals, from many starts.

As Besiroglu et al. fit Chinchilla's law (papers.md 8.3), in one variable. Shapes: K probe steps.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize

Array = NDArray[np.float64]

DELTA = 1e-3
EXPONENT_BOUNDS = (1e-3, 10.0)
_FLOOR_SHARES = (1e-4, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
_LOWEST_FLOOR = 1e-6  # of the lowest loss: below it the logarithm stands for a floor of zero


@dataclass(frozen=True)
class Solution:
    """A minimum: floor E, log_scale ln B and exponent alpha."""

    floor: float
    log_scale: float
    exponent: float
    converged: bool


@dataclass(frozen=True)
class Curve:
    """Logarithms of time and loss at the fitted probes.

    The parameters within are (ln E, ln B - alpha mean(x), alpha): with x centred the last two are
    nearly uncorrelated, and the exponent does not depend on the unit of time.
    """

    x_K: Array
    log_loss_K: Array

    @cached_property
    def _centred_K(self) -> Array:
        return self.x_K - self.x_K.mean()

    def solve(self) -> Solution:
        """The best of the minima reached from a grid of floors.

        For a given floor ln(L - E) is linear in x, so the two other parameters of a start are a
        straight line's: the grid has one dimension and leaves no corner out.
        """
        minima = [self._descend(self._start(share)) for share in _FLOOR_SHARES]
        return self._solution(*min(minima, key=lambda minimum: minimum[1]))

    def solve_near(self, start: Solution) -> Solution:
        """The minimum reached from `start`."""
        return self._solution(*self._descend(self._parameters(start)))

    def predict(self, solution: Solution) -> Array:
        """Log losses of the law at the curve's times."""
        return _log_loss(self._parameters(solution), self._centred_K)

    def _start(self, floor_share: float) -> Array:
        floor = floor_share * np.exp(self.log_loss_K.min())
        reducible_K = np.log(np.exp(self.log_loss_K) - floor)
        slope, level = np.polyfit(self._centred_K, reducible_K, 1)
        return np.array([np.log(floor), level, np.clip(-slope, *EXPONENT_BOUNDS)])

    def _descend(self, start: Array) -> tuple[Array, float, bool]:
        best = minimize(
            _objective,
            start,
            args=(self._centred_K, self.log_loss_K),
            jac=True,
            method="L-BFGS-B",
            bounds=[(self._lowest_log_floor, None), (None, None), EXPONENT_BOUNDS],
            options={"maxiter": 1000, "ftol": 1e-13, "gtol": 1e-7},
        )
        return np.asarray(best.x), float(best.fun), bool(best.success)

    @property
    def _lowest_log_floor(self) -> float:
        return float(self.log_loss_K.min() + np.log(_LOWEST_FLOOR))

    def _solution(self, parameters: Array, _: float, success: bool) -> Solution:
        log_floor, level, exponent = parameters.tolist()
        # Near zero the objective is flat in ln E and the descent stops short of its bound.
        is_zero = log_floor < self._lowest_log_floor + np.log(10)
        low, high = EXPONENT_BOUNDS
        return Solution(
            floor=0.0 if is_zero else float(np.exp(log_floor)),
            log_scale=float(level + exponent * self.x_K.mean()),
            exponent=exponent,
            converged=success and low < exponent < high,
        )

    def _parameters(self, solution: Solution) -> Array:
        log_floor = np.log(solution.floor) if solution.floor > 0 else self._lowest_log_floor
        level = solution.log_scale - solution.exponent * self.x_K.mean()
        return np.array([log_floor, level, solution.exponent])


def _log_loss(parameters: Array, centred_K: Array) -> Array:
    log_floor, level, exponent = parameters
    return np.asarray(np.logaddexp(log_floor, level - exponent * centred_K))


def _objective(parameters: Array, centred_K: Array, log_loss_K: Array) -> tuple[float, Array]:
    """Sum of the Huber losses over delta, and its gradient.

    The sum, not the mean: divided by K the steps fall under L-BFGS's tolerance before the minimum
    (papers.md 8.3).
    """
    _, level, exponent = parameters
    predicted_K = _log_loss(parameters, centred_K)
    residual_K = predicted_K - log_loss_K
    clipped_K = np.clip(residual_K, -DELTA, DELTA)
    value = (clipped_K * (residual_K - clipped_K / 2)).sum() / DELTA
    share_K = np.exp(level - exponent * centred_K - predicted_K)
    gradient = [
        clipped_K @ (1 - share_K),
        clipped_K @ share_K,
        -clipped_K @ (share_K * centred_K),
    ]
    return float(value), np.array(gradient) / DELTA
