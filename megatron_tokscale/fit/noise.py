"""Noise estimated from the residuals, and standard errors that allow for its autocorrelation.

Successive probes share part of their noise: a wandering weight affects several of them. The noise
is modelled as an autoregression of order one, r_k = phi r_{k-1} + white noise, with phi from the
token's own residuals. Two consequences, both Bartlett's (1946): the variance of an estimate whose
influence on the probes has the lag-one autocorrelation rho is (1 + phi rho)/(1 - phi rho) times its
variance with white noise, and K probes are worth K (1 - phi)/(1 + phi) independent ones for a slow
change. The model and the estimate of phi are our choice; benchmarks/results/fit_accuracy.md has the
phi found for planted noise, and the coverage of the intervals.

Shapes: N tokens, K probe steps, J parameters (floor, M drops, M midpoints, M widths).
"""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from megatron_tokscale.fit import kernels
from megatron_tokscale.fit.varpro import Search, Trajectories, basis

_MOST_AUTOCORRELATION = 0.95
"""Largest lag-one autocorrelation; at it, 40 probes are worth one. Few residuals can estimate a
value near one by chance, with which no token would have a class."""
_SINGULAR = 1e-4
"""Share of a tangent's length outside of the earlier tangents below which it counts as spanned by
them: in float32 such a remainder is mostly rounding error."""
_ITERATIONS = 3  # alternations between phi and the noise, which depend on each other
_TINY = 1e-30  # least sum of squares in a denominator


@dataclass(frozen=True)
class Residuals:
    """The residuals of a fit, its tangents, and the estimated noise.

    Attributes:
        residual_KN: losses less the model, 0 where missing.
        s_KN: the first sigmoid, 0 where a loss is missing.
        tangent_JKN: orthonormal vectors along which the model can move; 0 if there are fewer.
        weight_JJN: weights that combine a row of ones, the sigmoids and the further rows of
            `varpro.basis` into the tangents.
        lag_one_JJN: sums of products of the tangents at successive probes, symmetric.
        phi_N: lag-one autocorrelation, between 0 and 0.95.
        variance_N: the noise's variance.
    """

    residual_KN: Tensor
    s_KN: Tensor
    tangent_JKN: Tensor
    weight_JJN: Tensor
    lag_one_JJN: Tensor
    phi_N: Tensor
    variance_N: Tensor

    @classmethod
    def from_fit(cls, search: Search, data: Trajectories) -> Self:
        """Estimate the noise from the residuals of a fit.

        A fit absorbs the projection of the noise on its tangents, which biases the residuals' sums
        of squares and of lag-one products low. The expected loss is added back; it depends on phi,
        so this is repeated.
        """
        space = _tangents_on_cpu if data.on_cpu else _tangents
        residual_KN, s_KN, tangent_JKN, weight_JJN, lag_one_JJN, product_N = space(search, data)
        own_JN = lag_one_JJN.diagonal().T
        count_N, present_JN = data.count_N, weight_JJN.diagonal().T.ne(0)
        pairs_N = count_N - 1
        if data.weight_KN is not None:
            pairs_N = _lag_one(data.weight_KN, data.weight_KN)
        ratio_N = product_N / search.sse_N.clamp_min(_TINY)
        phi_N = torch.zeros_like(ratio_N)
        for _ in range(_ITERATIONS):
            followed_JN = inflation(phi_N, own_JN) * present_JN
            left_N = (count_N - followed_JN.sum(dim=0)).clamp_min(1)
            phi_N = (ratio_N * left_N + (followed_JN * own_JN).sum(dim=0)) / pairs_N
            phi_N = phi_N.clamp(0, _MOST_AUTOCORRELATION)
        followed_JN = inflation(phi_N, own_JN) * present_JN
        variance_N = search.sse_N / (count_N - followed_JN.sum(dim=0)).clamp_min(1)
        return cls(residual_KN, s_KN, tangent_JKN, weight_JJN, lag_one_JJN, phi_N, variance_N)


Tangents = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def _tangents(search: Search, data: Trajectories) -> Tangents:
    """Return residuals, first sigmoid, tangents, their weights and lag-one products, in torch.

    The last tensor is the residuals' sum of lag-one products.
    """
    *rows, residual_KN = basis(search.theta_PN, search.anchor_MN, search.linear_LN, data)
    s_KN = rows[0]
    ones_KN = torch.ones_like(residual_KN) if data.weight_KN is None else data.weight_KN
    tangent_JKN, weight_JJN = _orthonormal([ones_KN, *rows])
    lag_one_JJN = _lag_one_products(tangent_JKN)
    product_N = _lag_one(residual_KN, residual_KN)
    return residual_KN, s_KN, tangent_JKN, weight_JJN, lag_one_JJN, product_N


def _tangents_on_cpu(search: Search, data: Trajectories) -> Tangents:
    """Return the values of `_tangents`, from compiled loops."""
    n_tangents, n_tokens = 3 * (len(search.theta_PN) // 2) + 1, len(data)
    inputs = (
        each.contiguous().numpy() for each in (search.theta_PN, search.linear_LN, search.anchor_MN)
    )
    shape = (n_tokens, len(data.y_KN))
    residual_NK, s_NK = (search.sse_N.new_empty(shape) for _ in range(2))
    tangent_NJK = search.sse_N.new_empty(n_tokens, n_tangents, shape[1])
    weight_JJN, lag_one_JJN = (
        search.sse_N.new_empty(n_tangents, n_tangents, n_tokens) for _ in range(2)
    )
    product_N = search.sse_N.new_empty(n_tokens)
    filled = (residual_NK, s_NK, tangent_NJK, weight_JJN, lag_one_JJN, product_N)
    kernels.tangents(*inputs, *data.as_numpy(), _SINGULAR, *(each.numpy() for each in filled))
    return residual_NK.T, s_NK.T, tangent_NJK.permute(1, 2, 0), weight_JJN, lag_one_JJN, product_N


def inflation(phi: Tensor, rho: Tensor) -> Tensor:
    """Return the variance of an estimate over its variance with white noise."""
    return (1 + phi * rho) / (1 - phi * rho)


def effective_count(count_N: Tensor, phi_N: Tensor) -> Tensor:
    """Return the number of independent probes that a token's probes are worth for a slow change."""
    return count_N * (1 - phi_N) / (1 + phi_N)


def standard_errors(search: Search, found: Residuals) -> Tensor:
    """Return standard errors of floor, drops, midpoints and widths, se_JN; units of losses and x_K.

    They come from (J^T J)^-1 and the residual variance, each times the `inflation` by the noise's
    autocorrelation. A direction that the losses do not distinguish from others counts as fixed.
    """
    # Influence of the losses on each parameter, in the basis of the tangents.
    n_sigmoids = len(search.theta_PN) // 2
    slope_JN = torch.cat([torch.ones_like(search.linear_LN), -search.drop_MN, search.drop_MN])
    influence_JJN = found.weight_JJN.transpose(0, 1) / slope_JN[:, None]
    midpoint_MN, log_width_MN = search.theta_PN.chunk(2)
    width_MN = log_width_MN.exp()[:, None]
    offset_MN = (midpoint_MN - search.anchor_MN)[:, None]
    by_q, by_log_width = influence_JJN[1 + n_sigmoids :].chunk(2)
    by_midpoint = width_MN * by_q + offset_MN * by_log_width
    # Its variance, for the lag-one autocorrelation of that influence.
    variances = []
    for row_JN in torch.cat(
        [influence_JJN[: 1 + n_sigmoids], by_midpoint, width_MN * by_log_width]
    ):
        squared_N = row_JN.square().sum(dim=0)
        lagged_N = ((found.lag_one_JJN * row_JN).sum(dim=1) * row_JN).sum(dim=0)
        rho_N = lagged_N / squared_N.clamp_min(_TINY)
        variances.append(squared_N * inflation(found.phi_N, rho_N) * found.variance_N)
    return torch.stack(variances).sqrt_()


def _lag_one(one_KN: Tensor, other_KN: Tensor) -> Tensor:
    """Return the sum over the probes of one row times the other row one probe later."""
    return (one_KN[:-1] * other_KN[1:]).sum(dim=0)


def _lag_one_products(rows_JKN: Tensor) -> Tensor:
    """Return the mean of `_lag_one` in both directions, for all pairs of rows."""
    size = len(rows_JKN)
    table = rows_JKN.new_empty(size, size, rows_JKN.shape[2])
    for i, row_KN in enumerate(rows_JKN):
        table[i, i] = _lag_one(row_KN, row_KN)
        for j, other_KN in enumerate(rows_JKN[:i]):
            both_KN = row_KN[:-1] * other_KN[1:]
            both_KN.addcmul_(row_KN[1:], other_KN[:-1])
            table[i, j] = table[j, i] = both_KN.sum(dim=0) / 2
    return table


def _orthonormal(rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Return orthonormal combinations of the rows, and their weights, by modified Gram-Schmidt.

    A row that earlier ones span to 1e-4 gives zero.
    """
    made_JKN = rows[0].new_empty(len(rows), *rows[0].shape)
    weight_JJN = rows[0].new_zeros(len(rows), len(rows), rows[0].shape[1])
    for i, row_KN in enumerate(rows):
        weight_JJN[i, i] = 1
        before_N = row_KN.square().sum(dim=0)
        left_KN = row_KN
        for j in range(i):
            along_N = (left_KN * made_JKN[j]).sum(dim=0)
            left_KN = torch.addcmul(left_KN, made_JKN[j], along_N, value=-1)
            weight_JJN[i] -= along_N * weight_JJN[j]
        left_N = left_KN.square().sum(dim=0) if i else before_N
        length_N = torch.where(left_N > _SINGULAR**2 * before_N, left_N.rsqrt(), 0)
        torch.mul(left_KN, length_N, out=made_JKN[i])
        weight_JJN[i] *= length_N
    return made_JKN, weight_JJN
