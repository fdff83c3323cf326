"""Least-squares fit of floor_g + drop_g h(x; own_g, common) to the losses of all groups.

Residuals are relative. For a given curve h, the best floor and drop have a closed form. The two
parameters of h are searched on grids that close in on the minimum, for all groups and resamples at
once: `own`, the midpoint of a group's drop, and `common`, the logarithm of an exponent or of a
width, which all groups may share.

Shapes: K probe steps, G groups, R data sets, B blocks of probes, P values of `own`, Q values of
`common`.
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
_ROUNDS = 14  # rounds of refinement: the last step is 0.65^14 = 1/400 of the grid's spacing
_SHRINK = 0.65  # factor of the step per round: slow enough to follow a narrow valley; our choice


@dataclass(frozen=True)
class GroupModel:
    """Model floor_g + drop_g curve(x; own_g, common) of all groups.

    Attributes:
        curve: function of x, `own` and `common`.
        own_P: even grid of `own`; a single value if it is not fitted.
        common_Q: even grid of `common`; a single value if it is not fitted.
        shared: whether all groups have the same value of `common`.
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
    """Return the models of `group_test` for probes at x from 0 to `length`."""
    not_fitted_P = np.zeros(1)
    third_Q = np.log([ONE_THIRD])
    exponent_Q = np.linspace(np.log(_LEAST_EXPONENT), np.log(_GREATEST_EXPONENT), _N_EXPONENTS)
    midpoint_P = np.linspace(0, length, _N_MIDPOINTS)
    greatest = max(length / (2 * np.log(9)), 2 * _LEAST_WIDTH)
    width_Q = np.linspace(np.log(_LEAST_WIDTH), np.log(greatest), _N_WIDTHS)
    return {
        "one third": GroupModel(_power, not_fitted_P, third_Q, True),
        "one slope": GroupModel(_power, not_fitted_P, exponent_Q, True),
        "own slopes": GroupModel(_power, not_fitted_P, exponent_Q, False),
        "own times": GroupModel(_sigmoid, midpoint_P, width_Q, True),
        "own times and widths": GroupModel(_sigmoid, midpoint_P, width_Q, False),
    }


def _power(x: Floats, shift: Floats, log_exponent: Floats) -> Floats:
    """Return tau^-exponent, tau = e^(x - shift).

    The shift is never fitted: it only multiplies the curve by a factor, as the drop does.
    """
    return np.asarray(np.exp(np.exp(log_exponent) * (shift - x)))


def _sigmoid(x: Floats, midpoint: Floats, log_width: Floats) -> Floats:
    return np.asarray(expit((midpoint - x) / np.exp(log_width)))


@dataclass(frozen=True)
class GroupFit:
    """Parameters of a model, and its relative residuals at all probes, by data set and group."""

    own_RG: Floats
    common_RG: Floats
    floor_RG: Floats
    drop_RG: Floats
    residual_RGK: Floats


@dataclass(frozen=True)
class GroupLosses:
    """Losses of groups at x, and the groups' weights, which sum to one."""

    x_K: Floats
    loss_RGK: Floats
    weight_G: Floats

    def fit(self, model: GroupModel, held_out_K: Mask | None = None) -> GroupFit:
        """Return the fit of a model: search its grids, then finer and finer grids around the best.

        Args:
            model: the model.
            held_out_K: mask of the probes that are left out of the fit; None fits all probes.
        """
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
                _Sums.from_curves(h_RGPQK, loss_RGK[:, :, None, None])
            ).error
            own_RG, common_RG = self._best(model.shared, own_RGP, common_RGQ, error_RGPQ)
        h_RGK = model.curve(self.x_K, own_RG[..., None], common_RG[..., None])
        linear = _best_floor_and_drop(_Sums.from_curves(h_RGK[:, :, kept_K], loss_RGK))
        fitted_RGK = linear.floor[..., None] + linear.drop[..., None] * h_RGK
        residual_RGK = fitted_RGK / self.loss_RGK - 1
        return GroupFit(own_RG, common_RG, linear.floor, linear.drop, residual_RGK)

    def error(self, fit: GroupFit) -> float:
        """Return the mean squared relative residual of the first data set, over all probes."""
        return float(self.weight_G @ (fit.residual_RGK[0] ** 2).mean(axis=-1))

    def held_out_errors(self, model: GroupModel, n_blocks: int) -> Floats:
        """Return (R, B) errors at each block of probes but the first and the last.

        The error at a block is the mean squared relative residual of the fit to all other probes.
        """
        block_K = np.arange(len(self.x_K)) * n_blocks // len(self.x_K)
        blocks = [block_K == block for block in range(1, n_blocks - 1)]
        return np.stack([self._held_out_error(model, held_out_K) for held_out_K in blocks], axis=1)

    def _held_out_error(self, model: GroupModel, held_out_K: Mask) -> Floats:
        residual_RGK = self.fit(model, held_out_K).residual_RGK[:, :, held_out_K]
        return np.asarray((residual_RGK**2).mean(axis=-1) @ self.weight_G)

    def _best(
        self, shared: bool, own_RGP: Floats, common_RGQ: Floats, error_RGPQ: Floats
    ) -> tuple[Floats, Floats]:
        """Return the `own` and `common` of least error, by data set and group.

        If `common` is shared, it has the least weighted error over all groups.
        """
        error_RGQ = error_RGPQ.min(axis=2)
        if shared:
            total_RQ = np.einsum("rgq,g->rq", error_RGQ, self.weight_G)
            error_RGQ = np.broadcast_to(total_RQ[:, None], error_RGQ.shape)
        q_RG1 = error_RGQ.argmin(axis=2)[..., None]
        p_RG1 = np.take_along_axis(error_RGPQ.argmin(axis=2), q_RG1, axis=2)
        own_RG = np.take_along_axis(own_RGP, p_RG1, axis=2)[..., 0]
        return own_RG, np.take_along_axis(common_RGQ, q_RG1, axis=2)[..., 0]


def _around(value_RG: Floats, grid_P: Floats, shrink: float) -> Floats:
    """Return each value with two neighbours, `shrink` times the grid's spacing to either side.

    Neighbours outside of the grid are moved to its end.
    """
    if len(grid_P) == 1:
        return value_RG[..., None]
    step = (grid_P[1] - grid_P[0]) * shrink
    around_RGP = value_RG[..., None] + step * np.array([-1, 0, 1])
    return np.asarray(np.clip(around_RGP, grid_P[0], grid_P[-1]))


@dataclass(frozen=True)
class _Sums:
    """Sums over probes, each weighted by loss^-2, which makes the residuals relative.

    Attributes:
        u: sum of the weights.
        uh: sum of the curve h.
        uhh: sum of h^2.
        uy: sum of the losses.
        uyh: sum of loss times h.
        uyy: sum of loss^2, which is the number of probes.
    """

    u: Floats
    uh: Floats
    uhh: Floats
    uy: Floats
    uyh: Floats
    uyy: int

    @classmethod
    def from_curves(cls, h_K: Floats, loss_K: Floats) -> Self:
        """Return the sums over probes of curves and losses, whose leading shapes broadcast."""
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


def _best_floor_and_drop(s: _Sums) -> _Linear:
    """Solve the normal equations of floor and drop, neither negative.

    Where the solution for one of them is negative, it is set to 0, and the other alone is fitted.
    The other one is then not negative, as all sums are positive. The drop of a curve that is flat
    at the probes is 0.
    """
    determinant = s.u * s.uhh - s.uh**2
    curved = determinant > _FLAT * s.u * s.uhh
    drop = np.maximum(s.u * s.uyh - s.uh * s.uy, 0) / np.where(curved, determinant, np.inf)
    floor = np.maximum(s.uy - drop * s.uh, 0) / s.u
    drop = np.where(floor > 0, drop, s.uyh / s.uhh)
    return _Linear(floor, drop, np.maximum(s.uyy - floor * s.uy - drop * s.uyh, 0))


def grid_errors(model: GroupModel, x_K: Floats, loss_RGK: Floats) -> Floats:
    """Return (R, G, P, Q) sums of squared relative residuals on the model's grids."""
    h_PQK = model.curve(x_K, model.own_P[:, None, None], model.common_Q[:, None])
    h_KJ = h_PQK.reshape(-1, len(x_K)).T
    y_RGK = 1 / loss_RGK
    u_RGK = y_RGK**2
    sums = _Sums(
        u_RGK.sum(axis=-1, keepdims=True),
        u_RGK @ h_KJ,
        u_RGK @ h_KJ**2,
        y_RGK.sum(axis=-1, keepdims=True),
        y_RGK @ h_KJ,
        len(x_K),
    )
    return _best_floor_and_drop(sums).error.reshape(*loss_RGK.shape[:2], *h_PQK.shape[:2])
