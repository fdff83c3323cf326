"""Predictions of runs that the fit did not see, and the spread of numbers over runs.

Shapes: I runs, P points.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize
from scipy.stats import t as student

from megatron_tokscale.core.arrays import Floats
from megatron_tokscale.core.errors import UndefinedError
from megatron_tokscale.results.estimate import Estimate
from megatron_tokscale.spectrum.axes.curves import Points

_RATES = ((-1.5, -1.5), (-3.0, -1.0), (-0.5, -0.5))  # starts of ln a and ln b (our choice)

type Predict = Callable[[Floats, Floats], Floats]
"""A fitted law: losses in nats, by clock and u."""


@dataclass(frozen=True)
class LeftOut:
    """Errors of a law that is fitted without one run, and predicts that run's mean curve.

    Attributes:
        error_I: mean absolute error over the probes of each run, in nats.
        last_I: predicted last loss of each run, in nats.
        measured_I: measured last loss.
    """

    error_I: Floats
    last_I: Floats
    measured_I: Floats

    @classmethod
    def of(
        cls, points: Points, loss_P: Floats, fit: Callable[[Points, Floats], Predict]
    ) -> "LeftOut":
        """Fit the law R times and predict the run that was left out.

        Raises:
            UndefinedError: the other runs do not determine the law.
        """
        errors, lasts, measured = [], [], []
        for run in np.unique(points.run_P):
            others_P = points.without(int(run))
            predict = fit(points.rows(others_P), loss_P[others_P])
            loss_K = loss_P[~others_P]
            predicted_K = predict(points.x_P[~others_P], points.u_P[~others_P])
            errors.append(float(np.abs(predicted_K - loss_K).mean()))
            lasts.append(float(predicted_K[-1]))
            measured.append(float(loss_K[-1]))
        return cls(np.array(errors), np.array(lasts), np.array(measured))

    @property
    def error(self) -> float:
        """Return the mean absolute error over runs and their probes, in nats."""
        return float(self.error_I.mean())

    def r2(self) -> Estimate:
        """Return R^2 of the last losses with its interval over runs (`over_runs`)."""
        squares_I = (self.last_I - self.measured_I) ** 2
        spread_I = (self.measured_I - self.measured_I.mean()) ** 2
        value_I = [
            1 - np.delete(squares_I, run).sum() / np.delete(spread_I, run).sum()
            for run in range(len(squares_I))
        ]
        value = float(1 - squares_I.sum() / spread_I.sum())
        return over_runs(value, np.array(value_I), most=1)


def over_runs(value: float, left_out_I: Floats, most: float = np.inf) -> Estimate:
    """Return the 95% interval of a number over runs by the jackknife (Tukey 1958).

    A bootstrap of a handful of runs often draws one size only; leaving one run out never does. The
    half-length is Student's quantile with R - 1 degrees of freedom times the jackknife's error.

    Args:
        value: the number from all runs.
        left_out_I: the number without each run; NaN where it is not defined.
        most: the largest value that the number can have.
    """
    known_I = left_out_I[np.isfinite(left_out_I)]
    count = len(known_I)
    if count < max(len(left_out_I), 3):
        return Estimate(value)
    error = np.sqrt((count - 1) / count * ((known_I - known_I.mean()) ** 2).sum())
    half = float(student.ppf(0.975, count - 1) * error)
    return Estimate(value, value - half, min(value + half, max(most, value)), value)


def both_spreads(documents: Estimate, runs: Estimate, most: float = np.inf) -> Estimate:
    """Return the interval over documents and runs: on each side, the root of the summed squares.

    The two are independent. Without an interval over runs there is none over both; a run of one
    document has its interval over runs alone.
    """
    if not (documents.has_interval and runs.has_interval):
        return Estimate(documents.value) if not runs.has_interval else runs
    low = np.hypot(documents.value - documents.low, runs.value - runs.low)
    high = np.hypot(documents.high - documents.value, runs.high - runs.value)
    value = documents.value
    highest = min(float(value + high), max(most, value))
    return Estimate(value, float(value - low), highest, documents.uncorrected)


def fit_additive(points: Points, loss_P: Floats) -> Predict:
    """Fit L = E + A e^(-a u) + B e^(-b x), Chinchilla's form, by least squares.

    Raises:
        UndefinedError: fewer than five points.
    """
    if len(points.x_P) < 5:
        raise UndefinedError(f"{len(points.x_P)} losses are too few for five constants")
    middle = float(points.x_P.mean())

    def columns(rates: Floats, x_P: Floats, u_P: Floats) -> Floats:
        size, time = np.exp(np.clip(rates, -7, 3))
        return np.stack([np.ones_like(x_P), np.exp(-size * u_P), np.exp(-time * (x_P - middle))], 1)

    def solve(rates: Floats) -> tuple[Floats, float]:
        matrix = columns(rates, points.x_P, points.u_P)
        constants = np.linalg.lstsq(matrix, loss_P)[0]
        return constants, float(((matrix @ constants - loss_P) ** 2).sum())

    def squares(rates: Floats) -> float:
        return solve(rates)[1]

    tries = [minimize(squares, np.array(start), method="Nelder-Mead") for start in _RATES]
    best = min(tries, key=lambda found: float(found.fun)).x
    constants = solve(best)[0]
    return lambda x, u: np.asarray(columns(best, x, u) @ constants)
