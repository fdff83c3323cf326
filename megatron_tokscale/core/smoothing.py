"""A cubic smoothing spline whose smoothness follows from the noise: `SmoothingSpline`.

The spline f minimises sum_k (y_k - f(x_k))^2 + smoothing * integral of f''^2. It is also the
posterior mean of f for values y_k = f(x_k) + noise, where f is a straight line with a flat prior
plus an integrated Brownian motion, and smoothing = noise variance / variance of the motion
(Wahba 1978). So both variances are parameters of a mixed model, and restricted maximum likelihood
(REML) estimates them (Wahba 1985, "generalized maximum likelihood"). In the basis of Demmler and
Reinsch (1975) the coordinates of the values are independent with variances
noise * (1 + gamma / smoothing), so the likelihood has one parameter beside the noise. The posterior
variance of f is the error; it includes the bias of the smoothing on average over x (Wahba 1983). It
is averaged over the smoothing parameters by their likelihood: few values leave several of them
likely.

Shapes: K values, J distinct x, P = J - 2 coordinates outside of the straight lines, G grid points,
S smoothing parameters of a search.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Self

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import brentq, minimize_scalar
from scipy.stats import chi2

from megatron_tokscale.core.arrays import Floats, Integers
from megatron_tokscale.core.errors import UndefinedError
from megatron_tokscale.core.spline_basis import SplineBasis, motion_covariance

LEAST_POINTS = 4
"""Least number of distinct x: a straight line takes two of them, and a variance needs two more (our
choice)."""
_NO_WEIGHT = 1e-5  # posterior weight of a smoothing parameter below which it does not count
_ROUNDING = 1e-14  # least noise as a share of the values' departures from a straight line


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
    _basis: SplineBasis = field(repr=False)
    _evidence: "_Evidence" = field(repr=False)

    @classmethod
    def from_values(
        cls, x_K: ArrayLike, value_K: ArrayLike, smoothing: float | None = None
    ) -> Self:
        """Fit a spline to values with equal, independent noise; REML chooses the smoothness.

        Args:
            x_K: finite x in any order; several values may have the same x.
            value_K: finite values.
            smoothing: the smoothing parameter, if it is known; None for the one of the largest
                likelihood.

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
        scaled = None if smoothing is None else smoothing / basis.length**3
        evidence = _Evidence.from_values(basis, group_K, np.asarray(value_K, np.float64), scaled)
        low, median, high = evidence.noise_quantiles((0.025, 0.5, 0.975))
        return cls(
            x_J=x_J,
            group_K=group_K,
            count_J=count_J,
            smoothing=evidence.best() * basis.length**3,
            noise=median,
            noise_interval=(low, high),
            noise_variance=evidence.mean_noise_variance(),
            _basis=basis,
            _evidence=evidence,
        )

    @property
    def freedom(self) -> float:
        """Effective degrees of freedom: the trace of the matrix from values to fitted values."""
        gamma_P = self._basis.gamma_P
        return float(2 + (gamma_P / (gamma_P + self._scaled)).sum())

    def weights(self, x_G: ArrayLike) -> Floats:
        """Return the matrix from the K values to the curve at `x_G`; beyond them it is straight."""
        return self._spread(self._predictor(x_G, 0).weights(self._scaled))

    def slope_weights(self, x_G: ArrayLike) -> Floats:
        """Return the matrix from the K values to the curve's slope at `x_G`."""
        return self._spread(self._predictor(x_G, 1).weights(self._scaled))

    def slope_error(self, x_G: ArrayLike) -> Floats:
        """Return the standard error of the slope: the root of its posterior mean square error.

        It includes that the smoothing parameter is known with an error only, if it is not given.
        """
        return self._predictor(x_G, 1).error(self._scaled, self._evidence)

    @property
    def straight_p_value(self) -> float:
        """Return the p-value of "the curve is a straight line", by the restricted likelihoods.

        The variance of the motion cannot be below 0, so twice the logarithm of their ratio is 0 or
        chi-squared with one degree of freedom, at equal odds (Self and Liang 1987); for few values
        the test is a little conservative (Crainiceanu and Ruppert 2004).
        """
        deviance_S = self._evidence.deviance(self._basis.search_S)
        ratio = float(deviance_S[-1] - deviance_S.min())
        return float(chi2.sf(ratio, 1) / 2) if ratio > 0 else 1.0

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

    def _predictor(self, x_G: ArrayLike, order: int) -> "_Predictor":
        u_G = (np.asarray(x_G, np.float64) - self.x_J[0]) / self._basis.length
        return _Predictor.at(self._basis, u_G, order)


@dataclass(frozen=True)
class _Predictor:
    """The prediction of a curve, or of its slope, at grid points for any smoothing parameter.

    The part of the curve beyond the straight line through the values has the covariance `k_GP` with
    the coordinates of the values, and the variance `motion_G`, in units of the variance of the
    motion (universal kriging, Cressie 1993, 3.4).

    Attributes:
        basis: the basis of the spline.
        line_GJ: matrix from weighted means to their straight line.
        k_GP: see above.
        motion_G: see above.
        scale: factor from scaled x to x.
    """

    basis: SplineBasis
    line_GJ: Floats
    k_GP: Floats
    motion_G: Floats
    scale: float

    @classmethod
    def at(cls, basis: SplineBasis, u_G: Floats, order: int) -> Self:
        """Return the predictor of the derivative of an order, 0 or 1, at scaled x."""
        line_GJ = basis.line_weights(u_G, order)
        c_GJ = motion_covariance(u_G, basis.u_J, order) * basis.root_J
        of_line_GJ = line_GJ @ basis.motion_JJ
        motion_G = np.maximum(u_G, 0) ** (3 - 2 * order) / (1 if order else 3)
        motion_G += (line_GJ * (of_line_GJ - 2 * c_GJ)).sum(axis=1)
        k_GP = (c_GJ - of_line_GJ) @ basis.rough_JP
        return cls(basis, line_GJ, k_GP, motion_G, basis.length**-order)

    def weights(self, smoothing: float) -> Floats:
        """Return the matrix from weighted means to the prediction."""
        shrunk_GP = self.k_GP / (self.basis.gamma_P + smoothing)
        return np.asarray((self.line_GJ + shrunk_GP @ self.basis.rough_JP.T) * self.scale)

    def error(self, smoothing: float, evidence: "_Evidence") -> Floats:
        """Return the root of the posterior mean square error of the prediction at `smoothing`."""
        rough_GP = self.k_GP * evidence.z_P
        predicted_G = rough_GP @ (1 / (self.basis.gamma_P + smoothing))
        line_G = (self.line_GJ**2).sum(axis=1)
        square_G = np.zeros(len(line_G))
        for each, noise, weight in evidence.posterior():
            inverse_P = 1 / (self.basis.gamma_P + each)
            motion_G = np.maximum(self.motion_G - self.k_GP**2 @ inverse_P, 0)
            off_G = rough_GP @ inverse_P - predicted_G
            square_G += weight * (noise * (line_G + motion_G / each) + off_G**2)
        return np.asarray(np.sqrt(square_G) * self.scale)


@dataclass(frozen=True)
class _Evidence:
    """The restricted likelihood of the smoothing parameter.

    Attributes:
        basis: basis of the spline.
        z_P: coordinates of the values.
        within: sum of squares of the values around the means at their x.
        count: values less two, the degrees of freedom beyond the straight line.
        search_S: the smoothing parameters that are searched: one, if it is known.
    """

    basis: SplineBasis
    z_P: Floats
    within: float
    count: int
    search_S: Floats

    @classmethod
    def from_values(
        cls, basis: SplineBasis, group_K: Integers, value_K: Floats, smoothing: float | None
    ) -> Self:
        count_J = basis.root_J**2
        mean_J = np.bincount(group_K, value_K, len(count_J)) / count_J
        within = float(((value_K - mean_J[group_K]) ** 2).sum())
        z_P = basis.rough_JP.T @ (basis.root_J * mean_J)
        search_S = basis.search_S if smoothing is None else np.array([smoothing])
        return cls(basis, z_P, within, len(value_K) - 2, search_S)

    @property
    def _least_noise(self) -> float:
        """Noise variance of rounding errors in double precision."""
        total = float((self.z_P**2).sum()) + self.within
        return max(total * _ROUNDING**2, np.finfo(np.float64).tiny)

    def noise(self, smoothing_S: Floats) -> Floats:
        """Return the noise variance of the largest likelihood at each smoothing parameter."""
        shrunk_SP = smoothing_S[:, None] / (self.basis.gamma_P + smoothing_S[:, None])
        return np.asarray((shrunk_SP @ self.z_P**2 + self.within) / self.count)

    def deviance(self, smoothing_S: Floats) -> Floats:
        """Return minus twice the profile of the restricted log-likelihood, up to a constant."""
        noise_S = np.maximum(self.noise(smoothing_S), self._least_noise)
        inflation_S = np.log1p(self.basis.gamma_P / smoothing_S[:, None]).sum(axis=1)
        return np.asarray(self.count * np.log(noise_S) + inflation_S)

    def best(self) -> float:
        """Return the smoothing parameter of the largest restricted likelihood."""
        search_S = self.search_S
        if len(search_S) == 1:
            return float(search_S[0])
        at = int(self.deviance(search_S).argmin())
        low, high = (search_S[max(at - 1, 0)], search_S[min(at + 1, len(search_S) - 1)])
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
        return sum(noise * weight for _, noise, weight in self.posterior())

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

    def posterior(self) -> Iterator[tuple[float, float, float]]:
        """Yield the smoothing parameters that count: each, its mean noise variance, its weight."""
        noise_S, weight_S = self._posterior
        mean_S = noise_S * self.count / max(self.count - 2, 1)
        for s in np.flatnonzero(weight_S > _NO_WEIGHT):
            yield float(self.search_S[s]), float(mean_S[s]), float(weight_S[s])

    @cached_property
    def _posterior(self) -> tuple[Floats, Floats]:
        """Noise variance at each smoothing parameter of the search, and the weights of these."""
        deviance_S = self.deviance(self.search_S)
        weight_S = np.exp(-0.5 * (deviance_S - deviance_S.min()))
        noise_S = np.maximum(self.noise(self.search_S), self._least_noise)
        return noise_S, weight_S / weight_S.sum()
