"""Least-squares fit of floor_g + drop_g h(x; own_g, common) to the losses of all groups.

Residuals are relative. Floor and drop have a closed form. The other two parameters are searched on
grids that close in on the minimum, for all groups and resamples at once.

Shapes: K probe steps, G groups, R data sets, B blocks of probes, P values of a group's own
parameter, Q values of the parameter that groups may share.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import numpy as np
from scipy.special import expit

from megatron_tokscale.core.arrays import Floats, Mask
from megatron_tokscale.results.laws.one_third import ONE_THIRD

_FLAT = 1e-12  # relative determinant of a curve that does not change over the probes
_LEAST_EXPONENT, _GREATEST_EXPONENT = 0.01, 5.0  # wider than the exponents of any loss; our choice
_N_EXPONENTS = 120  # exponents in the grid, 5% apart
_LEAST_WIDTH = 0.05  # least width in units of ln tau: narrower than the probes' spacing; our choice
_N_MIDPOINTS, _N_WIDTHS = 48, 10  # points of the grids; our choice: cost against missed minima
_ROUNDS = 14  # rounds of refinement: the last step is 0.65^14 = 1/400 of the spacing
_SHRINK = 0.65  # factor of the step per round: slow enough to follow a narrow valley


@dataclass(frozen=True)
class GroupModel:
    """Model floor_g + drop_g curve(x; own_g, common) of all groups.

    Attributes:
        curve: function of x, the own and the common parameter.
        own_P: even grid of the group's own parameter; of one value if it is not fitted.
        common_Q: even grid of the other parameter; of one value if it is not fitted.
        shared: all groups share the other parameter.
    """

    curve: Callable[[Floats, Floats, Floats], Floats]
    own_P: Floats
    common_Q: Floats
    shared: bool

    def n_parameters(self, n_groups: int) -> int:
        """Return the number of fitted parameters over all groups."""
        free = len(self.common_Q) > 1
        per_group = 2 + (len(self.own_P) > 1) + (free and not self.shared)
        return per_group * n_groups + (free and self.shared)


def group_models(length: float) -> dict[str, GroupModel]:
    """Return the models of `group_test` for probes over `length` units of x from 0 on."""
    none_P = np.zeros(1)
    third_Q = np.log([ONE_THIRD])
    exponent_Q = np.linspace(np.log(_LEAST_EXPONENT), np.log(_GREATEST_EXPONENT), _N_EXPONENTS)
    midpoint_P = np.linspace(0, length, _N_MIDPOINTS)
    greatest = max(length / (2 * np.log(9)), 2 * _LEAST_WIDTH)
    width_Q = np.linspace(np.log(_LEAST_WIDTH), np.log(greatest), _N_WIDTHS)
    return {
        "one third": GroupModel(_power, none_P, third_Q, True),
        "one slope": GroupModel(_power, none_P, exponent_Q, True),
        "own slopes": GroupModel(_power, none_P, exponent_Q, False),
        "own times": GroupModel(_sigmoid, midpoint_P, width_Q, True),
        "own times and widths": GroupModel(_sigmoid, midpoint_P, width_Q, False),
    }


def _power(x: Floats, shift: Floats, log_exponent: Floats) -> Floats:
    """Return tau^-exponent; its shift is never fitted, as scale_g takes it up."""
    return np.asarray(np.exp(np.exp(log_exponent) * (shift - x)))


def _sigmoid(x: Floats, midpoint: Floats, log_width: Floats) -> Floats:
    return np.asarray(expit((midpoint - x) / np.exp(log_width)))


@dataclass(frozen=True)
class GroupFit:
    """Parameters of a model and relative residuals, for every data set and group."""

    own_RG: Floats
    common_RG: Floats
    floor_RG: Floats
    drop_RG: Floats
    residual_RGK: Floats


@dataclass(frozen=True)
class GroupLosses:
    """Losses of groups at x, with the groups' weights.

    A squared relative residual is a squared residual weighted by loss^-2.
    """

    x_K: Floats
    loss_RGK: Floats
    weight_G: Floats

    def fit(self, model: GroupModel, held_out_K: Mask | None = None) -> GroupFit:
        """Search the model's grids, then ever finer ones around the best."""
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
            error_RGPQ = _best_floor_and_drop(
                _Moments.from_curves(h_RGPQK, loss_RGK[:, :, None, None])
            ).error
            own_RG, common_RG = self._best(model.shared, own_RGP, common_RGQ, error_RGPQ)
        h_RGK = model.curve(self.x_K, own_RG[..., None], common_RG[..., None])
        linear = _best_floor_and_drop(_Moments.from_curves(h_RGK[:, :, kept_K], loss_RGK))
        fitted_RGK = linear.floor[..., None] + linear.drop[..., None] * h_RGK
        residual_RGK = fitted_RGK / self.loss_RGK - 1
        return GroupFit(own_RG, common_RG, linear.floor, linear.drop, residual_RGK)

    def error(self, fit: GroupFit) -> float:
        """Return the mean squared relative residual of the first data set, over all probes."""
        return float(self.weight_G @ (fit.residual_RGK[0] ** 2).mean(axis=-1))

    def held_out_errors(self, model: GroupModel, n_blocks: int) -> Floats:
        """Return (R, B) mean squared relative residuals at each inner block, fitted without it."""
        block_K = np.arange(len(self.x_K)) * n_blocks // len(self.x_K)
        blocks = [block_K == block for block in range(1, n_blocks - 1)]
        return np.stack([self._held_out_error(model, held_out_K) for held_out_K in blocks], axis=1)

    def _held_out_error(self, model: GroupModel, held_out_K: Mask) -> Floats:
        residual_RGK = self.fit(model, held_out_K).residual_RGK[:, :, held_out_K]
        return np.asarray((residual_RGK**2).mean(axis=-1) @ self.weight_G)

    def _best(
        self, shared: bool, own_RGP: Floats, common_RGQ: Floats, error_RGPQ: Floats
    ) -> tuple[Floats, Floats]:
        """Return own and common parameters of least error, the second over all groups if shared."""
        error_RGQ = error_RGPQ.min(axis=2)
        if shared:
            total_RQ = np.einsum("rgq,g->rq", error_RGQ, self.weight_G)
            error_RGQ = np.broadcast_to(total_RQ[:, None], error_RGQ.shape)
        q_RG1 = error_RGQ.argmin(axis=2)[..., None]
        p_RG1 = np.take_along_axis(error_RGPQ.argmin(axis=2), q_RG1, axis=2)
        own_RG = np.take_along_axis(own_RGP, p_RG1, axis=2)[..., 0]
        return own_RG, np.take_along_axis(common_RGQ, q_RG1, axis=2)[..., 0]


def _around(value_RG: Floats, grid_P: Floats, shrink: float) -> Floats:
    """Return the value and one to each side, a share of the grid's spacing away, in the grid."""
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

    @classmethod
    def from_curves(cls, h_K: Floats, loss_K: Floats) -> Self:
        """Sum over curves and losses whose leading shapes broadcast."""
        y_K = 1 / loss_K
        uh_K = y_K**2 * h_K
        return cls(
            (y_K**2).sum(axis=-1),
            uh_K.sum(axis=-1),
            (uh_K * h_K).sum(axis=-1),
            y_K.sum(axis=-1),
            (y_K * h_K).sum(axis=-1),
            loss_K.shape[-1],
        )


@dataclass(frozen=True)
class _Linear:
    """Best floor and drop, neither negative, and the sum of squared relative residuals."""

    floor: Floats
    drop: Floats
    error: Floats


def _best_floor_and_drop(m: _Moments) -> _Linear:
    """Solve the normal equations of floor and drop, neither negative.

    Where one of them would be negative it is 0, and the other alone is fitted; as all sums are
    positive, the other one is then not negative. A curve that is flat at the probes has no drop.
    """
    determinant = m.u * m.uhh - m.uh**2
    curved = determinant > _FLAT * m.u * m.uhh
    drop = np.maximum(m.u * m.uyh - m.uh * m.uy, 0) / np.where(curved, determinant, np.inf)
    floor = np.maximum(m.uy - drop * m.uh, 0) / m.u
    drop = np.where(floor > 0, drop, m.uyh / m.uhh)
    return _Linear(floor, drop, np.maximum(m.uyy - floor * m.uy - drop * m.uyh, 0))


def grid_errors(model: GroupModel, x_K: Floats, loss_RGK: Floats) -> Floats:
    """Return (R, G, P, Q) sums of squared relative residuals on the model's grids."""
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
    return _best_floor_and_drop(moments).error.reshape(*loss_RGK.shape[:2], *h_PQK.shape[:2])
