"""The shift of each run's clock against the shift model, given the model's shape and floor.

Shapes: I runs, P points.
"""

import numpy as np

from megatron_tokscale.core.arrays import Floats
from megatron_tokscale.spectrum.axes.curves import Points
from megatron_tokscale.spectrum.axes.shift import ShiftModel

_STEPS = 3  # Gauss-Newton steps; a run is a fraction of a unit away from the model


def run_deltas(model: ShiftModel, points: Points, loss_P: Floats) -> Floats:
    """Return how much later each run is than the largest, in x, (I,); NaN for a run without points.

    The shift is that of least squares between the run's mean curve and the model's, whose floor is
    kept. It is relative to the mean shift of the largest runs.
    """
    delta_I = np.full(points.n_runs, np.nan)
    for run in np.unique(points.run_P):
        own_P = points.run_P == run
        delta_I[run] = _delta(model, points.x_P[own_P], float(points.u_I[run]), loss_P[own_P])
    return np.asarray(delta_I - np.nanmean(delta_I[points.u_I == 0]))


def seed_noise(delta_I: Floats, u_I: Floats) -> float:
    """Return the standard deviation of delta between runs of one size; NaN without such runs."""
    squares, freedom = 0.0, 0
    for u in np.unique(u_I):
        of_size = delta_I[(u_I == u) & np.isfinite(delta_I)]
        squares += float(((of_size - of_size.mean()) ** 2).sum()) if len(of_size) else 0.0
        freedom += max(len(of_size) - 1, 0)
    return float(np.sqrt(squares / freedom)) if freedom else float("nan")


def _delta(model: ShiftModel, x_K: Floats, u: float, loss_K: Floats) -> float:
    """Return the shift of one run against the largest."""
    u_K, late, step = np.full(len(x_K), u), 0.0, 1e-3
    for _ in range(_STEPS):
        residual_K = loss_K - model.predict(x_K - late, u_K)[0]
        ahead_K = model.predict(x_K - late + step, u_K)[0]
        fall_K = (model.predict(x_K - late - step, u_K)[0] - ahead_K) / (2 * step)
        # A curve that is later by d lies above by d times its fall per unit of x.
        late += float(residual_K @ fall_K / max(fall_K @ fall_K, 1e-12))
    return late - model.kappa * u
