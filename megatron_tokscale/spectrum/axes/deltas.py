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
    run_P, u_P, step = points.run_P, points.u_P, 1e-3
    late_I = np.zeros(points.n_runs)
    for _ in range(_STEPS):
        x_P = points.x_P - late_I[run_P]
        at_P, before_P, after_P = model.predict(
            np.concatenate([x_P, x_P - step, x_P + step]), np.tile(u_P, 3)
        )[0].reshape(3, -1)
        fall_P = (before_P - after_P) / (2 * step)
        # A curve that is later by d lies above by d times its fall per unit of x.
        above_I = np.bincount(run_P, (loss_P - at_P) * fall_P, points.n_runs)
        with np.errstate(invalid="ignore", divide="ignore"):
            late_I += above_I / np.bincount(run_P, fall_P**2, points.n_runs)
    delta_I = late_I - model.kappa * points.u_I
    return np.asarray(delta_I - np.nanmean(delta_I[points.u_I == 0]))


def seed_noise(delta_I: Floats, u_I: Floats) -> float:
    """Return the standard deviation of delta between runs of one size; NaN without such runs."""
    squares, freedom = 0.0, 0
    for u in np.unique(u_I):
        of_size = delta_I[(u_I == u) & np.isfinite(delta_I)]
        squares += float(((of_size - of_size.mean()) ** 2).sum()) if len(of_size) else 0.0
        freedom += max(len(of_size) - 1, 0)
    return float(np.sqrt(squares / freedom)) if freedom else float("nan")
