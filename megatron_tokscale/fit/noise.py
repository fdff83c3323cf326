"""The noise of each token, estimated from its residuals, and standard errors that allow for it.

Successive probes share part of their noise: a weight of the model that wanders affects the losses
of several probes. The noise is modelled as an autoregression of order one,

    r_k = phi r_(k-1) + white noise,

where r_k is the residual at probe k, and phi the lag-one autocorrelation of the token's own
residuals. Two formulas follow (Bartlett 1946):

- An estimate is a weighted sum of the losses. If its weights have the lag-one autocorrelation rho,
  its variance is (1 + phi rho)/(1 - phi rho) times the variance with white noise (`inflation`).
- For a slow change K probes are worth K (1 - phi)/(1 + phi) independent probes
  (`effective_count`; docs/references.md 8.4).

The model and the estimate of phi are our choice. benchmarks/results/fit_accuracy.md has the phi
found for planted noise, and how often the intervals cover the truth.

A tangent is a direction in which the model's curve moves when a parameter changes: one each for
floor, drops, midpoints and widths. SSE is the sum of squared residuals.

Shapes: N tokens, K probe steps, M sigmoids per token, J = 3M + 1 tangents, and as many parameters
(floor, M drops, M midpoints, M widths).
"""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from megatron_tokscale.fit import kernels
from megatron_tokscale.fit.search import Search, Trajectories
from megatron_tokscale.fit.varpro import basis

_MOST_AUTOCORRELATION = 0.95
"""Largest phi; our choice. At it, 40 probes are worth one independent probe. Few residuals can give
a phi near 1 by chance, with which no token would have a class."""
_SINGULAR = 1e-4
"""Least share of a row's length that lies outside of the earlier tangents. Below it the row counts
as spanned by them: in float32 such a remainder is mostly rounding error."""
_ITERATIONS = 3
"""Rounds of the estimate of phi, which depends on the part of the noise that the fit absorbs, which
depends on phi. Our choice."""
_TINY = 1e-30
"""Least sum of squares in a denominator: far below every other, and not zero."""


@dataclass(frozen=True)
class Residuals:
    """The residuals of a fit, the tangents of its model, and the estimated noise.

    Attributes:
        residual_KN: losses less the model, 0 where missing.
        s_KN: the first sigmoid, 0 where a loss is missing.
        tangent_JKN: an orthonormal basis of the tangents; a vector that earlier ones span is 0.
        weight_JJN: weights of a row of ones, the sigmoids and the further rows of `varpro.basis` in
            each vector of that basis.
        lag_one_JJN: products of each two vectors of the basis at successive probes, summed over the
            probes, and averaged over which of the two comes first.
        phi_N: lag-one autocorrelation, between 0 and 0.95.
        variance_N: variance of the noise, in squared units of the scaled losses.
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

        A fit absorbs the noise along its tangents. So the residuals' sum of squares and their sum
        of lag-one products are smaller than those of the noise. The expected differences are added
        back. They depend on phi, so the estimate is repeated.
        """
        # Residuals, tangents, and the numbers of losses and of successive pairs of them.
        space = _tangents_on_cpu if data.on_cpu else _tangents
        residual_KN, s_KN, tangent_JKN, weight_JJN, lag_one_JJN, product_N = space(search, data)
        own_JN = lag_one_JJN.diagonal().T
        count_N, present_JN = data.count_N, weight_JJN.diagonal().T.ne(0)
        pairs_N = count_N - 1
        if data.weight_KN is not None:
            pairs_N = _lag_one(data.weight_KN, data.weight_KN)
        # phi and the absorbed noise, in turns; then the variance.
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
    """Return the first five fields of `Residuals`, and the residuals' sum of lag-one products."""
    *rows, residual_KN = basis(search.theta_PN, search.anchor_MN, search.linear_LN, data)
    s_KN = rows[0]
    ones_KN = torch.ones_like(residual_KN) if data.weight_KN is None else data.weight_KN
    tangent_JKN, weight_JJN = _orthonormal([ones_KN, *rows])
    lag_one_JJN = _lag_one_products(tangent_JKN)
    product_N = _lag_one(residual_KN, residual_KN)
    return residual_KN, s_KN, tangent_JKN, weight_JJN, lag_one_JJN, product_N


def _tangents_on_cpu(search: Search, data: Trajectories) -> Tangents:
    """Return what `_tangents` returns, from compiled loops."""
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
    """Return the variance of an estimate over its variance with white noise, see the file's top."""
    return (1 + phi * rho) / (1 - phi * rho)


def effective_count(count_N: Tensor, phi_N: Tensor) -> Tensor:
    """Return how many independent probes the probes of a token are worth for a slow change."""
    return count_N * (1 - phi_N) / (1 + phi_N)


def standard_errors(search: Search, found: Residuals) -> Tensor:
    """Return the standard errors of floor, drops, midpoints and widths, se_JN.

    Floor and drops are in units of the scaled losses, midpoints and widths in units of the probed
    range. The variances are the diagonal of (J^T J)^-1, where J is the Jacobian of the model, times
    the variance of the noise and the `inflation`. A direction that earlier ones span counts as
    fixed.
    """
    # Weights of the losses in each estimate, in the basis of the tangents. Midpoint and width
    # follow from q = (c - a)/w and ln w by the chain rule, with a the anchor.
    n_sigmoids = len(search.theta_PN) // 2
    slope_JN = torch.cat([torch.ones_like(search.linear_LN), -search.drop_MN, search.drop_MN])
    influence_JJN = found.weight_JJN.transpose(0, 1) / slope_JN[:, None]
    midpoint_MN, log_width_MN = search.theta_PN.chunk(2)
    width_MN = log_width_MN.exp()[:, None]
    offset_MN = (midpoint_MN - search.anchor_MN)[:, None]
    by_q, by_log_width = influence_JJN[1 + n_sigmoids :].chunk(2)
    by_midpoint = width_MN * by_q + offset_MN * by_log_width
    # Variance of each estimate, inflated by the lag-one autocorrelation rho of its weights.
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
    """Return `_lag_one` of all pairs of rows, averaged over which of the two comes first."""
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
    """Return an orthonormal basis of the rows, and the weights of the rows in each of its vectors.

    By modified Gram-Schmidt; a row that earlier ones span (see `_SINGULAR`) gives a zero vector.
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
