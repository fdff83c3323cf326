"""Curves of groups fitted at once: floor_g + drop_g h(x; own_g, common), least relative squares.

The linear part has a closed form; so all groups and resamples are fitted at once, on grids of the
rest that close in on the minimum.

Shapes: K probe steps, G groups, R data sets, B blocks of probes, P values of a group's own
parameter, Q of the one that groups may share.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.special import expit

from megatron_tokscale.core.arrays import Floats, Mask
from megatron_tokscale.laws.one_third.lr_sum import ONE_THIRD

_FLAT = 1e-12
_LEAST_EXPONENT, _GREATEST_EXPONENT, _N_EXPONENTS = 0.01, 5.0, 120
_LEAST_WIDTH = 0.05
_N_MIDPOINTS, _N_WIDTHS = 48, 10
_ROUNDS = 14
_SHRINK = 0.65  # of the step per round: slow enough to follow a narrow valley


@dataclass(frozen=True)
class Model:
    """floor_g + drop_g curve(x; own_g, common), with even grids of what is not linear in it."""

    curve: Callable[[Floats, Floats, Floats], Floats]
    own_P: Floats
    common_Q: Floats
    shared: bool

    def n_parameters(self, n_groups: int) -> int:
        """Fitted numbers over all groups."""
        free = len(self.common_Q) > 1
        per_group = 2 + (len(self.own_P) > 1) + (free and not self.shared)
        return per_group * n_groups + (free and self.shared)


def models_over(length: float) -> dict[str, Model]:
    """The models of `group_test` for probes over `length` units of x from 0 on."""
    none_P = np.zeros(1)
    third_Q = np.log([ONE_THIRD])
    exponent_Q = np.linspace(np.log(_LEAST_EXPONENT), np.log(_GREATEST_EXPONENT), _N_EXPONENTS)
    midpoint_P = np.linspace(0, length, _N_MIDPOINTS)
    greatest = max(length / (2 * np.log(9)), 2 * _LEAST_WIDTH)
    width_Q = np.linspace(np.log(_LEAST_WIDTH), np.log(greatest), _N_WIDTHS)
    return {
        "one third": Model(_power, none_P, third_Q, True),
        "one slope": Model(_power, none_P, exponent_Q, True),
        "own slopes": Model(_power, none_P, exponent_Q, False),
        "own times": Model(_sigmoid, midpoint_P, width_Q, True),
        "own times and widths": Model(_sigmoid, midpoint_P, width_Q, False),
    }


def _power(x: Floats, shift: Floats, log_exponent: Floats) -> Floats:
    """tau^-exponent; its shift is never free, as scale_g takes it up."""
    return np.asarray(np.exp(np.exp(log_exponent) * (shift - x)))


def _sigmoid(x: Floats, midpoint: Floats, log_width: Floats) -> Floats:
    return np.asarray(expit((midpoint - x) / np.exp(log_width)))


@dataclass(frozen=True)
class Fit:
    """A model's parameters and relative residuals, for every data set and group."""

    own_RG: Floats
    common_RG: Floats
    floor_RG: Floats
    drop_RG: Floats
    residual_RGK: Floats


@dataclass(frozen=True)
class Losses:
    """Losses of groups at x. Squared relative residuals weigh a squared residual by loss^-2."""

    x_K: Floats
    loss_RGK: Floats
    weight_G: Floats

    def fit(self, model: Model, held_out_K: Mask | None = None) -> Fit:
        """The best parameters on the model's grids, then on ever finer ones around the best."""
        kept_K = np.ones(len(self.x_K), bool) if held_out_K is None else ~held_out_K
        x_K, loss_RGK = self.x_K[kept_K], self.loss_RGK[:, :, kept_K]
        many = (*loss_RGK.shape[:2], 1)
        own_RGP, common_RGQ = np.tile(model.own_P, many), np.tile(model.common_Q, many)
        error_RGPQ = grid_errors(model, x_K, loss_RGK)
        own_RG, common_RG = self._best(model.shared, own_RGP, common_RGQ, error_RGPQ)
        for shrink in _SHRINK ** np.arange(1, _ROUNDS + 1):
            own_RGP = _around(own_RG, model.own_P, shrink)
            common_RGQ = _around(common_RG, model.common_Q, shrink)
            h_RGPQK = model.curve(x_K, own_RGP[..., None, None], common_RGQ[..., None, :, None])
            error_RGPQ = _solve(_Moments.from_curves(h_RGPQK, loss_RGK[:, :, None, None])).error
            own_RG, common_RG = self._best(model.shared, own_RGP, common_RGQ, error_RGPQ)
        h_RGK = model.curve(self.x_K, own_RG[..., None], common_RG[..., None])
        linear = _solve(_Moments.from_curves(h_RGK[:, :, kept_K], loss_RGK))
        fitted_RGK = linear.floor[..., None] + linear.drop[..., None] * h_RGK
        residual_RGK = fitted_RGK / self.loss_RGK - 1
        return Fit(own_RG, common_RG, linear.floor, linear.drop, residual_RGK)

    def error(self, fit: Fit) -> float:
        """Mean squared relative residual of the first data set, over all probes."""
        return float(self.weight_G @ (fit.residual_RGK[0] ** 2).mean(axis=-1))

    def held_out_errors(self, model: Model, n_blocks: int) -> Floats:
        """(R, B) mean squared relative residuals at each inner block, fitted without it."""
        block_K = np.arange(len(self.x_K)) * n_blocks // len(self.x_K)
        blocks = [block_K == block for block in range(1, n_blocks - 1)]
        return np.stack([self._held_out_error(model, held_out_K) for held_out_K in blocks], axis=1)

    def _held_out_error(self, model: Model, held_out_K: Mask) -> Floats:
        residual_RGK = self.fit(model, held_out_K).residual_RGK[:, :, held_out_K]
        return np.asarray((residual_RGK**2).mean(axis=-1) @ self.weight_G)

    def _best(
        self, shared: bool, own_RGP: Floats, common_RGQ: Floats, error_RGPQ: Floats
    ) -> tuple[Floats, Floats]:
        """Own and common parameters of least error, the second over all groups if `shared`."""
        error_RGQ = error_RGPQ.min(axis=2)
        if shared:
            total_RQ = np.einsum("rgq,g->rq", error_RGQ, self.weight_G)
            error_RGQ = np.broadcast_to(total_RQ[:, None], error_RGQ.shape)
        q_RG1 = error_RGQ.argmin(axis=2)[..., None]
        p_RG1 = np.take_along_axis(error_RGPQ.argmin(axis=2), q_RG1, axis=2)
        own_RG = np.take_along_axis(own_RGP, p_RG1, axis=2)[..., 0]
        return own_RG, np.take_along_axis(common_RGQ, q_RG1, axis=2)[..., 0]


def _around(value_RG: Floats, grid_P: Floats, shrink: float) -> Floats:
    """The value and one to each side, a share of the grid's spacing away and within the grid."""
    if len(grid_P) == 1:
        return value_RG[..., None]
    step = (grid_P[1] - grid_P[0]) * shrink
    around_RGP = value_RG[..., None] + step * np.array([-1, 0, 1])
    return np.asarray(np.clip(around_RGP, grid_P[0], grid_P[-1]))


@dataclass(frozen=True)
class _Moments:
    """Sums over probes, with u = loss^-2: of u, u h, u h^2, u loss, u loss h, u loss^2."""

    u: Floats
    uh: Floats
    uhh: Floats
    uy: Floats
    uyh: Floats
    uyy: int

    @staticmethod
    def from_curves(h_K: Floats, loss_K: Floats) -> "_Moments":
        """Of curves and losses whose leading shapes broadcast."""
        y_K = 1 / loss_K
        uh_K = y_K**2 * h_K
        return _Moments(
            (y_K**2).sum(axis=-1),
            uh_K.sum(axis=-1),
            (uh_K * h_K).sum(axis=-1),
            y_K.sum(axis=-1),
            (y_K * h_K).sum(axis=-1),
            loss_K.shape[-1],
        )


@dataclass(frozen=True)
class _Linear:
    """The best floor and drop, neither negative, and the sum of squared relative residuals."""

    floor: Floats
    drop: Floats
    error: Floats


def _solve(m: _Moments) -> _Linear:
    """Normal equations; where one parameter would be negative it is 0 and the other alone is best.

    Sums are positive, so the other one is not negative then. A curve that is flat at the probes has
    no drop.
    """
    determinant = m.u * m.uhh - m.uh**2
    curved = determinant > _FLAT * m.u * m.uhh
    drop = np.maximum(m.u * m.uyh - m.uh * m.uy, 0) / np.where(curved, determinant, np.inf)
    floor = np.maximum(m.uy - drop * m.uh, 0) / m.u
    drop = np.where(floor > 0, drop, m.uyh / m.uhh)
    return _Linear(floor, drop, np.maximum(m.uyy - floor * m.uy - drop * m.uyh, 0))


def grid_errors(model: Model, x_K: Floats, loss_RGK: Floats) -> Floats:
    """(R, G, P, Q) sums of squared relative residuals on the model's grids, by matrix products."""
    h_PQK = model.curve(x_K, model.own_P[:, None, None], model.common_Q[:, None])
    h_KJ = h_PQK.reshape(-1, len(x_K)).T
    y_RGK = 1 / loss_RGK
    u_RGK = y_RGK**2
    moments = _Moments(
        u_RGK.sum(axis=-1, keepdims=True),
        u_RGK @ h_KJ,
        u_RGK @ h_KJ**2,
        y_RGK.sum(axis=-1, keepdims=True),
        y_RGK @ h_KJ,
        len(x_K),
    )
    return _solve(moments).error.reshape(*loss_RGK.shape[:2], *h_PQK.shape[:2])
