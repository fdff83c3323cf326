"""Predictions of runs that the fit did not see, and the spread of numbers over runs.

Shapes: I runs, P points.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize

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
        """Return R^2 of the last losses with its interval over runs."""
        squares_I = (self.last_I - self.measured_I) ** 2
        spread_I = (self.measured_I - self.measured_I.mean()) ** 2
        value_I = [
            1 - np.delete(squares_I, run).sum() / np.delete(spread_I, run).sum()
            for run in range(len(squares_I))
        ]
        value = float(1 - squares_I.sum() / spread_I.sum())
        return Estimate.from_jackknife(value, np.array(value_I), most=1)


def both_spreads(
    documents: Estimate, runs: Estimate, cells: Estimate | None = None, most: float = np.inf
) -> Estimate:
    """Return the interval over documents and runs.

    On each side its squared length is documents + runs - cells (Cameron, Gelbach and Miller 2011):
    the noise of each document in each run is in both intervals, and is counted once. It is at least
    the longer of the two. Without an interval over runs there is none over both; a run of one
    document has its interval over runs alone.

    Args:
        documents: the interval over documents.
        runs: the interval over runs.
        cells: the interval if every run has documents of its own; None to count that noise twice.
        most: the largest value that the number can have.
    """
    if not (documents.has_interval and runs.has_interval):
        return Estimate(documents.value) if not runs.has_interval else runs
    cell = cells if cells is not None and cells.has_interval else Estimate(0.0, 0.0, 0.0)
    low = _joined(*(each.value - each.low for each in (documents, runs, cell)))
    high = _joined(*(each.high - each.value for each in (documents, runs, cell)))
    value = documents.value
    highest = min(value + high, max(most, value))
    return Estimate(value, value - low, highest, documents.uncorrected)


def _joined(documents: float, runs: float, cells: float) -> float:
    """Return the length of one side of the interval over documents and runs."""
    squares = documents**2 + runs**2 - cells**2
    return float(np.sqrt(max(squares, documents**2, runs**2)))


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
