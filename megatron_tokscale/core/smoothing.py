"""A cubic smoothing spline whose smoothness follows from the noise: `SmoothingSpline`.

The spline f minimises sum_k (y_k - f(x_k))^2 + smoothing * integral of f''^2. It is also the
posterior mean of f for values y_k = f(x_k) + noise, where f is a straight line with a flat prior
plus an integrated Brownian motion, and smoothing = noise variance / variance of the motion
(Wahba 1978). So both variances are parameters of a mixed model, and restricted maximum likelihood
(REML) estimates them (Wahba 1985, "generalized maximum likelihood"). In the basis of Demmler and
Reinsch (1975) the coordinates of the values are independent with variances
noise * (1 + gamma / smoothing), so the likelihood has one parameter beside the noise. The posterior
variance of f is the error; it includes the bias of the smoothing on average over x (Wahba 1983).

Shapes: K values, J distinct x, P = J - 2 coordinates outside of the straight lines, G grid points,
S smoothing parameters of a search.
"""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Self

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import brentq, minimize_scalar
from scipy.stats import chi2

from megatron_tokscale.core.arrays import Floats, Integers
from megatron_tokscale.core.errors import UndefinedError

LEAST_POINTS = 4
"""Least number of distinct x: a straight line takes two of them, and a variance needs two more (our
choice)."""
_SEARCH = 200  # values of the smoothing on a logarithmic grid: neighbours differ by 30% at most
_BEYOND = 10.0
"""The search ends where the smoothest coordinate is shrunk by this factor, and the roughest one by
1 + 1/10; beyond, the curve is a straight line, or goes through every value, and the likelihood is
flat (our choice)."""
_ROUNDING = 1e-14  # least noise as a share of the values' departures from a straight line
_RESOLUTION = 1e-13  # least smoothing, as a share of the largest gamma, in double precision


@dataclass(frozen=True)
class SmoothingSpline:
    """A smoothing spline of K values: a linear estimate of their curve, and of its slope.

    Attributes:
        x_J: distinct x, ascending.
        group_K: index into `x_J` of the x of each value; values at the same x are averaged.
        count_J: number of values at each x.
        smoothing: the smoothing parameter, in units of x^3.
        noise: standard deviation of a value's noise: the median of its posterior.
        noise_interval: its 95% interval.
        noise_variance: mean of the posterior of the noise's variance. It averages over the
            smoothing parameters; at the best one, which takes some noise for curve where the noise
            happens to look smooth, the variance is too low.
    """

    x_J: Floats
    group_K: Integers
    count_J: Integers
    smoothing: float
    noise: float
    noise_interval: tuple[float, float]
    noise_variance: float
    _basis: "SplineBasis" = field(repr=False)

    @classmethod
    def from_values(
        cls, x_K: ArrayLike, value_K: ArrayLike, smoothing: float | None = None
    ) -> Self:
        """Fit a spline to values with equal, independent noise; REML chooses the smoothness.

        Args:
            x_K: finite x in any order; several values may have the same x.
            value_K: finite values.
            smoothing: the smoothing parameter; None for the one of the largest likelihood.

        Raises:
            UndefinedError: fewer than four distinct x.
        """
        x_J, group_K, count_J = np.unique(
            np.asarray(x_K, np.float64), return_inverse=True, return_counts=True
        )
        if len(x_J) < LEAST_POINTS:
            raise UndefinedError(
                f"{len(x_J)} points are too few for a smooth curve; expected at least "
                f"{LEAST_POINTS} distinct x; train on, or probe more often"
            )
        basis = SplineBasis.over(x_J, count_J)
        evidence = _Evidence.from_values(basis, group_K, np.asarray(value_K, np.float64))
        scaled = evidence.best() if smoothing is None else smoothing / basis.length**3
        low, median, high = evidence.noise_quantiles((0.025, 0.5, 0.975))
        return cls(
            x_J=x_J,
            group_K=group_K,
            count_J=count_J,
            smoothing=scaled * basis.length**3,
            noise=median,
            noise_interval=(low, high),
            noise_variance=evidence.mean_noise_variance(),
            _basis=basis,
        )

    @property
    def freedom(self) -> float:
        """Effective degrees of freedom: the trace of the matrix from values to fitted values."""
        gamma_P = self._basis.gamma_P
        return float(2 + (gamma_P / (gamma_P + self._scaled)).sum())

    def weights(self, x_G: ArrayLike) -> Floats:
        """Return the matrix from the K values to the curve at `x_G`; beyond them it is straight."""
        return self._spread(self._operator(np.asarray(x_G, np.float64), 0)[0])

    def slope_weights(self, x_G: ArrayLike) -> Floats:
        """Return the matrix from the K values to the curve's slope at `x_G`."""
        return self._spread(self._operator(np.asarray(x_G, np.float64), 1)[0])

    def error(self, x_G: ArrayLike) -> Floats:
        """Return the standard error of the curve: the square root of its posterior variance."""
        return self._operator(np.asarray(x_G, np.float64), 0)[1]

    def slope_error(self, x_G: ArrayLike) -> Floats:
        """Return the standard error of the curve's slope."""
        return self._operator(np.asarray(x_G, np.float64), 1)[1]

    def lag_one_correlation(self, value_K: ArrayLike) -> float:
        """Return the correlation of neighbouring residuals, less that of independent noise.

        The residuals of a smooth curve correlate even if the noise does not: independent noise
        leaves residuals of covariance (I - A)^2, A the matrix to fitted values.
        """
        mean_J, root_J = self._means(np.asarray(value_K, np.float64)), np.sqrt(self.count_J)
        rough_JJ = np.eye(len(self.x_J)) - self._fitted_JJ
        residual_J = rough_JJ @ (root_J * mean_J)
        expected_JJ = rough_JJ @ rough_JJ
        square, product = (residual_J**2).sum(), (residual_J[1:] * residual_J[:-1]).sum()
        if not square > 0:
            return float("nan")
        of_white = np.trace(expected_JJ, offset=1) / np.trace(expected_JJ)
        return float(product / square - of_white)

    @property
    def _scaled(self) -> float:
        """Smoothing parameter for x that is scaled to the range [0, 1]."""
        return self.smoothing / self._basis.length**3

    @property
    def _fitted_JJ(self) -> Floats:
        """Matrix from weighted means to weighted fitted values; symmetric."""
        basis = self._basis
        kept_P = basis.gamma_P / (basis.gamma_P + self._scaled)
        return np.asarray(
            basis.line_J2 @ basis.line_J2.T + (basis.rough_JP * kept_P) @ basis.rough_JP.T
        )

    def _means(self, value_K: Floats) -> Floats:
        return np.bincount(self.group_K, value_K, len(self.x_J)) / self.count_J

    def _spread(self, weight_GJ: Floats) -> Floats:
        """Return the weights of single values from those of the weighted means."""
        return np.asarray((weight_GJ / np.sqrt(self.count_J))[:, self.group_K])

    def _operator(self, x_G: Floats, order: int) -> tuple[Floats, Floats]:
        """Return weights of the weighted means, and the posterior standard deviation.

        `order` is that of the derivative: 0 for the curve, 1 for its slope. The part of the curve
        beyond the straight line that the values' own line predicts has covariance `k_GP` with the
        coordinates, in units of the motion's variance (universal kriging, Cressie 1993, 3.4).
        """
        basis, smoothing = self._basis, self._scaled
        u_G = (x_G - self.x_J[0]) / basis.length
        line_GJ = basis.line_weights(u_G, order)
        c_GJ = _motion_covariance(u_G, basis.u_J, order) * basis.root_J
        k_GP = (c_GJ - line_GJ @ basis.motion_JJ) @ basis.rough_JP
        shrunk_GP = k_GP / (basis.gamma_P + smoothing)
        weight_GJ = line_GJ + shrunk_GP @ basis.rough_JP.T
        own_G = np.maximum(u_G, 0) ** (3 - 2 * order) / (3 if order == 0 else 1)
        motion_G = own_G - 2 * (line_GJ * c_GJ).sum(axis=1)
        motion_G += ((line_GJ @ basis.motion_JJ) * line_GJ).sum(axis=1)
        posterior_G = np.maximum(motion_G - (k_GP * shrunk_GP).sum(axis=1), 0) / smoothing
        variance_G = self.noise_variance * ((line_GJ**2).sum(axis=1) + posterior_G)
        scale = basis.length**-order
        return weight_GJ * scale, np.sqrt(variance_G) * scale


@dataclass(frozen=True)
class SplineBasis:
    """The basis of Demmler and Reinsch for distinct x, scaled to the range [0, 1].

    Attributes:
        length: range of x.
        u_J: scaled x.
        root_J: square root of the number of values at each x.
        line_J2: orthonormal basis of the weighted straight lines.
        triangle_22: the matrix that turns it into the weighted lines 1 and u.
        rough_JP: orthonormal basis of all else; the coordinates of the values are independent.
        gamma_P: variance of the motion's coordinates.
        motion_JJ: covariance of the weighted motion at the x.
    """

    length: float
    u_J: Floats
    root_J: Floats
    line_J2: Floats
    triangle_22: Floats
    rough_JP: Floats
    gamma_P: Floats
    motion_JJ: Floats

    @classmethod
    def over(cls, x_J: Floats, count_J: Integers) -> Self:
        """Return the basis for distinct, ascending x with so many values each."""
        length = float(np.ptp(x_J))
        u_J, root_J = (x_J - x_J[0]) / length, np.sqrt(count_J)
        lines_J2 = np.stack([np.ones_like(u_J), u_J], axis=1) * root_J[:, None]
        q_JJ, r_J2 = np.linalg.qr(lines_J2, mode="complete")
        motion_JJ = root_J[:, None] * _motion_covariance(u_J, u_J, 0) * root_J
        rest_JP = q_JJ[:, 2:]
        gamma_P, vector_PP = np.linalg.eigh(rest_JP.T @ motion_JJ @ rest_JP)
        gamma_P = np.maximum(gamma_P, np.finfo(np.float64).eps * gamma_P[-1])
        rough_JP = rest_JP @ vector_PP
        return cls(length, u_J, root_J, q_JJ[:, :2], r_J2[:2], rough_JP, gamma_P, motion_JJ)

    @cached_property
    def search_S(self) -> Floats:
        """Smoothing parameters for scaled x, from "through every value" to "straight line"."""
        highest = self.gamma_P[-1] * _BEYOND
        lowest = max(self.gamma_P[0] / _BEYOND, self.gamma_P[-1] * _RESOLUTION)
        return np.geomspace(lowest, highest, _SEARCH)

    def line_weights(self, u_G: Floats, order: int) -> Floats:
        """Return the matrix from weighted means to their straight line, or to its slope, at u."""
        powers_G2 = np.stack([np.full_like(u_G, 1 - order), u_G ** (1 - order)], axis=1)
        return np.asarray(np.linalg.solve(self.triangle_22.T, powers_G2.T).T @ self.line_J2.T)


@dataclass(frozen=True)
class _Evidence:
    """The restricted likelihood of the smoothing parameter.

    Attributes:
        basis: basis of the spline.
        square_P: squared coordinates of the values.
        within: sum of squares of the values around the means at their x.
        count: values less two, the degrees of freedom beyond the straight line.
    """

    basis: SplineBasis
    square_P: Floats
    within: float
    count: int

    @classmethod
    def from_values(cls, basis: SplineBasis, group_K: Integers, value_K: Floats) -> Self:
        count_J = basis.root_J**2
        mean_J = np.bincount(group_K, value_K, len(count_J)) / count_J
        within = float(((value_K - mean_J[group_K]) ** 2).sum())
        square_P = (basis.rough_JP.T @ (basis.root_J * mean_J)) ** 2
        return cls(basis, square_P, within, len(value_K) - 2)

    @property
    def _search_S(self) -> Floats:
        return self.basis.search_S

    @property
    def _least_noise(self) -> float:
        """Noise variance of rounding errors in double precision."""
        total = float(self.square_P.sum()) + self.within
        return max(total * _ROUNDING**2, np.finfo(np.float64).tiny)

    def noise(self, smoothing_S: Floats) -> Floats:
        """Return the noise variance of the largest likelihood at each smoothing parameter."""
        shrunk_SP = smoothing_S[:, None] / (self.basis.gamma_P + smoothing_S[:, None])
        return np.asarray((shrunk_SP @ self.square_P + self.within) / self.count)

    def deviance(self, smoothing_S: Floats) -> Floats:
        """Return minus twice the profile of the restricted log-likelihood, up to a constant."""
        noise_S = np.maximum(self.noise(smoothing_S), self._least_noise)
        inflation_S = np.log1p(self.basis.gamma_P / smoothing_S[:, None]).sum(axis=1)
        return np.asarray(self.count * np.log(noise_S) + inflation_S)

    def best(self) -> float:
        """Return the smoothing parameter of the largest restricted likelihood."""
        search_S = self._search_S
        at = int(self.deviance(search_S).argmin())
        low, high = (search_S[max(at - 1, 0)], search_S[min(at + 1, _SEARCH - 1)])
        found = minimize_scalar(
            lambda log: float(self.deviance(np.exp([log]))[0]),
            bounds=(np.log(low), np.log(high)),
            method="bounded",
        )
        return float(np.exp(found.x))

    def mean_noise_variance(self) -> float:
        """Return the posterior mean of the noise variance.

        At a given smoothing the noise variance has a scaled inverse chi-squared posterior. The
        priors are flat on the logarithms of the noise and of the smoothing (our choice).
        """
        noise_S, weight_S = self._posterior
        return float(weight_S @ noise_S * self.count / max(self.count - 2, 1))

    def noise_quantiles(self, probabilities: tuple[float, ...]) -> list[float]:
        """Return quantiles of the posterior of the noise's standard deviation."""
        noise_S, weight_S = self._posterior
        if not noise_S.max() > 0:
            return [0.0] * len(probabilities)
        low, high = np.log([noise_S.min() / 1e6, noise_S.max() * 1e6]).tolist()

        def excess(log_variance: float, probability: float) -> float:
            below_S = chi2.sf(self.count * noise_S / np.exp(log_variance), self.count)
            return float(weight_S @ below_S) - probability

        return [
            float(np.exp(brentq(excess, low, high, args=(each,)) / 2)) for each in probabilities
        ]

    @cached_property
    def _posterior(self) -> tuple[Floats, Floats]:
        """Noise variance at each smoothing parameter of the search, and the weights of these."""
        deviance_S = self.deviance(self._search_S)
        weight_S = np.exp(-0.5 * (deviance_S - deviance_S.min()))
        noise_S = np.maximum(self.noise(self._search_S), self._least_noise)
        return noise_S, weight_S / weight_S.sum()


def _motion_covariance(s_G: Floats, t_J: Floats, order: int) -> Floats:
    """Return the covariance of an integrated Brownian motion from 0, or of its slope, at s and t.

    The covariance is a^2 (3 b - a) / 6, with a the smaller and b the larger of the two (Wahba
    1978); `order` 1 differentiates by s. Before 0 the motion is zero.
    """
    s_G1 = np.maximum(s_G, 0)[:, None]
    if order == 0:
        low_GJ, high_GJ = np.minimum(s_G1, t_J), np.maximum(s_G1, t_J)
        return np.asarray(low_GJ**2 * (3 * high_GJ - low_GJ) / 6)
    return np.asarray(np.where(s_G1 <= t_J, s_G1 * t_J - s_G1**2 / 2, t_J**2 / 2))
