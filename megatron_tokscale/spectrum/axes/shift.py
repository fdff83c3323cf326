"""The shift model: a larger model learns the same earlier, and learns what a smaller never does.

Let x be the clock (ln of time), u the ln size of a run less that of the largest, and G the mean
curve of the largest run. The mean loss of a run is (our choice of form)

    L(x, u) = T - (1 + floor u) (T - G(x + kappa u))        if the top T is known
    L(x, u) = G(x + kappa u) - floor u                      otherwise.

kappa is the shift: a run that is smaller by a factor e is late by kappa on the clock, a factor
e^kappa in time. The second term is what a smaller run never learns. With a top (the loss before
training, or after the unigram phase), it is the share `floor` of all that G has fallen so far, per
unit of ln size; without one, it is `floor` nats. G is a natural cubic spline of s = x + kappa u,
fitted to all runs together. Given kappa, the rest is a linear problem (with a top, after a few
Gauss-Newton steps); kappa minimizes the squares.

The cells of tokens (one cell of all tokens, or groups) share kappa; each has a G and a floor of its
own.

Shapes: P points, C cells, M knots, S values of s.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import numpy as np
from scipy.interpolate import CubicSpline
from scipy.optimize import minimize_scalar

from megatron_tokscale.core.arrays import Floats, Mask
from megatron_tokscale.spectrum.axes.curves import Points

KNOTS: Final = 24
"""Most knots of G (our choice): the form of a curve without the noise of its probes."""
_POINTS_PER_KNOT: Final = 4
_MOST_SHIFT: Final = 3.0  # kappa is sought from -3 to 3; sizes differ by a few e-folds (our choice)
_SCAN: Final = 41  # values of kappa that are tried first: the squares may have several minima
_NEAR: Final = 0.25  # half-width of the search around a known kappa, for resamples
_RIDGE: Final = 1e-12  # of the trace: keeps the equations solvable where a column is empty
_TOLERANCE: Final = 1e-3  # of kappa: far below its error
_MOVES: Final = 8  # times that the search around a known kappa may go on from the end it ran into
_STEPS: Final = 4  # Gauss-Newton steps for a floor with a top


@dataclass(frozen=True)
class ShiftModel:
    """A fitted shift model.

    Attributes:
        kappa: shift of the clock per unit of ln size.
        floor_C: per unit of ln size, the share (with a top) or the nats (without) that a smaller
            run never learns.
        knot_M: knots of G on s.
        value_CM: G at the knots, in nats.
        top_C: the top of each cell, in nats; NaN for an unknown top.
        squares: sum of the squared residuals.
    """

    kappa: float
    floor_C: Floats
    knot_M: Floats
    value_CM: Floats
    top_C: Floats
    squares: float

    def shape(self, s_S: Floats) -> Floats:
        """Return G at the clock of the largest run, (C, S) in nats."""
        return np.asarray(self.value_CM @ natural_spline(self.knot_M, s_S).T)

    def predict(self, x_S: Floats, u_S: Floats) -> Floats:
        """Return the mean losses at clocks and sizes, (C, S) in nats."""
        shape_CS = self.shape(x_S + self.kappa * u_S)
        return shape_CS + self.floor_C[:, None] * u_S * self._never(shape_CS)

    def slopes(self, x_S: Floats, u_S: Floats) -> tuple[Floats, Floats]:
        """Return the two parts of -dL/du, (C, S) each: learned earlier, and never by the smaller.

        The first is kappa times -dL/dx of the model, and the second is the slope of the floor.
        """
        step = 1e-4
        at_S = x_S + self.kappa * u_S
        all_CS = self.shape(np.concatenate([at_S, at_S - step, at_S + step]))
        shape_CS, before_CS, after_CS = np.split(all_CS, 3, axis=1)
        fall_CS = (before_CS - after_CS) / (2 * step)
        scale_CS = np.where(self.known_C[:, None], 1 + self.floor_C[:, None] * u_S, 1.0)
        return (
            np.asarray(self.kappa * scale_CS * fall_CS),
            np.asarray(-self.floor_C[:, None] * self._never(shape_CS)),
        )

    @property
    def known_C(self) -> Mask:
        """Return the mask of the cells with a known top."""
        return np.isfinite(self.top_C)

    def _never(self, shape_CS: Floats) -> Floats:
        """Return the factor of floor * u in the loss."""
        return np.where(self.known_C[:, None], shape_CS - self.top_C[:, None], -1.0)


def natural_spline(knot_M: Floats, s_S: Floats) -> Floats:
    """Return the values at `s_S` of the natural cubic splines that are 1 at one knot, (S, M).

    Beyond the first and the last knot a spline goes on as a straight line.
    """
    spline = _cardinal(tuple(knot_M.tolist()))
    inside_S = np.clip(s_S, knot_M[0], knot_M[-1])
    value_SM = spline(inside_S)
    outside = inside_S != s_S
    if outside.any():
        beyond_S = (s_S - inside_S)[outside]
        value_SM[outside] += beyond_S[:, None] * spline(inside_S[outside], 1)
    return np.asarray(value_SM)


@lru_cache(maxsize=64)
def _cardinal(knots: tuple[float, ...]) -> CubicSpline:
    """Return the natural cubic splines that are 1 at one knot: one for each."""
    return CubicSpline(knots, np.eye(len(knots)), bc_type="natural")


def fit_shift(
    points: Points,
    loss_CP: Floats,
    top_C: Floats,
    *,
    kappa: float | None = None,
    near: float | None = None,
    with_floor: bool = True,
) -> ShiftModel:
    """Fit the shift model to the mean losses of cells by least squares; each probe counts once.

    Args:
        points: the probes of all runs.
        loss_CP: mean loss of each cell at each probe, in nats.
        top_C: top of each cell, in nats; NaN for an unknown top.
        kappa: a known shift; None to fit it.
        near: a shift to search around, as in a resample; None to search everywhere.
        with_floor: False for the plain shift, the model without a floor.

    Raises:
        UndefinedError: the points hold no shift (`Points.check`).
    """
    points.check()

    def model(value: float) -> ShiftModel:
        return _given_kappa(points, loss_CP, top_C, float(value), with_floor=with_floor)

    if kappa is not None:
        return model(kappa)
    if near is None:
        values = np.linspace(-_MOST_SHIFT, _MOST_SHIFT, _SCAN)
        squares = [model(value).squares for value in values]
        near, half = values[int(np.argmin(squares))], values[1] - values[0]
    else:
        half = _NEAR
    for _ in range(_MOVES):
        found = minimize_scalar(
            lambda value: model(value).squares,
            bounds=(near - half, near + half),
            method="bounded",
            options={"xatol": _TOLERANCE},
        )
        if abs(found.x - near) < half - 10 * _TOLERANCE:
            break
        near = float(found.x)  # the minimum lies outside of the interval: go on from its end
    return model(found.x)


def _given_kappa(
    points: Points, loss_CP: Floats, top_C: Floats, kappa: float, *, with_floor: bool
) -> ShiftModel:
    """Return the least-squares model at one value of kappa."""
    s_P, u_P = points.x_P + kappa * points.u_P, points.u_P
    knot_M = _knots(s_P)
    basis_PM = natural_spline(knot_M, s_P)
    floor_C, value_CM, squares = np.zeros(len(loss_CP)), [], 0.0
    for c, (loss_P, top) in enumerate(zip(loss_CP, top_C, strict=True)):
        value_M, floor_C[c], residual_P = _cell(basis_PM, u_P, loss_P, float(top), with_floor)
        value_CM.append(value_M)
        squares += float(residual_P @ residual_P)
    return ShiftModel(kappa, floor_C, knot_M, np.stack(value_CM), top_C, squares)


def _cell(
    basis_PM: Floats, u_P: Floats, loss_P: Floats, top: float, with_floor: bool
) -> tuple[Floats, float, Floats]:
    """Return G at the knots, the floor and the residuals of one cell."""
    if not with_floor:
        value_M = _solve(basis_PM, loss_P)
        return value_M, 0.0, loss_P - basis_PM @ value_M
    if not np.isfinite(top):
        column_PM = np.column_stack([basis_PM, -u_P])
        *value, found = _solve(column_PM, loss_P)
        return np.array(value), float(found), loss_P - column_PM @ [*value, found]
    # L - T = (1 + floor u) (G - T) is bilinear: linearized at the last G and floor, then solved.
    found, below_M = 0.0, _solve(basis_PM, loss_P - top)
    for _ in range(_STEPS):
        below_P = basis_PM @ below_M
        scaled_PM = basis_PM * (1 + found * u_P)[:, None]
        columns = np.column_stack([scaled_PM, u_P * below_P])
        target_P = loss_P - top + found * u_P * below_P
        *below, found = _solve(columns, target_P)
        below_M = np.array(below)
    residual_P = loss_P - top - (1 + found * u_P) * (basis_PM @ below_M)
    return below_M + top, float(found), residual_P


def _solve(matrix_PM: Floats, target_P: Floats) -> Floats:
    """Return the least-squares solution by the normal equations, with a ridge of rounding's size.

    The columns are bounded and nearly orthogonal, so that the normal equations lose nothing; they
    take a tenth of the time of a singular value decomposition.
    """
    gram_MM = matrix_PM.T @ matrix_PM
    gram_MM[np.diag_indices_from(gram_MM)] += _RIDGE * gram_MM.trace()
    return np.asarray(np.linalg.solve(gram_MM, matrix_PM.T @ target_P))


def _knots(s_P: Floats) -> Floats:
    """Return knots that divide the points evenly: at most one for every four."""
    count = int(np.clip(len(s_P) // _POINTS_PER_KNOT, 3, KNOTS))
    return np.unique(np.quantile(s_P, np.linspace(0, 1, count)))
