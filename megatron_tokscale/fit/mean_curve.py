"""The curve through the means of a dataset: smooth but for jumps, kinks and single outliers.

The smooth part is the smoothing spline of `core.smoothing`. A smoothing spline alone would round a
sharp step off and leave much of it in the residuals. So a jump of the level between two probes, a
kink of the slope at a probe, and an outlier at one probe are tried at every place. The one that
raises the likelihood most is added, with the smoothness chosen again, until none raises it by more
than chance would (intervention analysis; de Jong and Penzer 1998, with a forward search of ours).

Shapes: T probes, P = T - 2 coordinates, C candidates, A accepted candidates, S smoothing
parameters.
"""

from dataclasses import dataclass
from typing import Self

import numpy as np
from scipy.stats import chi2

from megatron_tokscale.core.arrays import Floats, Integers
from megatron_tokscale.core.spline_basis import SplineBasis

_LEVEL = 0.05
"""Chance to accept a candidate on a smooth curve with independent noise; our choice."""
_SEARCH = 50  # smoothing parameters of the search
_MOST_ACCEPTED = 0.25, 25
"""Most accepted candidates, as a share of the probes and by number; our choice. More would leave no
residuals to tell noise by, and take long."""


@dataclass(frozen=True)
class MeanCurve:
    """A mean loss curve and what departs from it.

    Attributes:
        departure_T: mean loss minus curve; an outlier departs wholly.
        noise_variance: variance of the departures' noise, without the outliers.
        jumps: probes before which the level jumps, by index.
        kinks: probes at which the slope changes.
        outliers: probes with an outlier.
    """

    departure_T: Floats
    noise_variance: float
    jumps: tuple[int, ...]
    kinks: tuple[int, ...]
    outliers: tuple[int, ...]

    @classmethod
    def from_means(cls, x_T: Floats, mean_T: Floats) -> Self:
        """Fit the curve to the means at distinct, ascending x."""
        search = _Search.of(x_T, mean_T)
        accepted: list[int] = []
        share, number = _MOST_ACCEPTED
        most = min(int(share * len(x_T)), number)
        threshold = float(chi2.isf(_LEVEL / search.n_candidates, 1))
        while len(accepted) < most:
            deviance, best, gain = search.try_all(accepted)
            if gain < threshold or not np.isfinite(deviance):
                break
            accepted.append(best)
        departure_T, variance = search.departures(accepted)
        return cls(departure_T, variance, *search.places(accepted))


@dataclass(frozen=True)
class _Search:
    """The candidates and the data in the coordinates of the spline.

    Attributes:
        basis: the basis of the spline.
        mean_T: the means.
        z_P: coordinates of the means, independent with variances 1 + gamma / smoothing.
        column_TC: candidates: T - 1 jumps, then T - 2 kinks, then T - 2 outliers.
        z_PC: their coordinates.
        smoothing_S: smoothing parameters of the search.
    """

    basis: SplineBasis
    mean_T: Floats
    z_P: Floats
    column_TC: Floats
    z_PC: Floats
    smoothing_S: Floats

    @classmethod
    def of(cls, x_T: Floats, mean_T: Floats) -> Self:
        basis = SplineBasis.over(x_T, np.ones(len(x_T), np.int64))
        u_T1 = basis.u_J[:, None]
        jumps = (u_T1 >= basis.u_J[1:]).astype(np.float64)
        kinks = np.maximum(u_T1 - basis.u_J[1:-1], 0)
        outliers = np.eye(len(x_T))[:, 1:-1]
        column_TC = np.concatenate([jumps, kinks, outliers], axis=1)
        search_S = basis.search_S[:: len(basis.search_S) // _SEARCH]
        to_P = basis.rough_JP.T
        return cls(basis, mean_T, to_P @ mean_T, column_TC, to_P @ column_TC, search_S)

    @property
    def n_candidates(self) -> int:
        """Number of candidates."""
        return int(self.column_TC.shape[1])

    def try_all(self, accepted: list[int]) -> tuple[float, int, float]:
        """Return the deviance, the best further candidate, and its gain in deviance.

        The deviance is minus twice the profile log-likelihood, at the best smoothing.
        """
        n, least = len(self.z_P), np.finfo(np.float64).tiny
        alone, best_C = np.inf, np.full(self.n_candidates, np.inf)
        for smoothing in self.smoothing_S:
            weight_P = smoothing / (self.basis.gamma_P + smoothing)
            z_P, z_PC = self._beyond(accepted, np.sqrt(weight_P))
            square, square_C = z_P @ z_P, (z_PC**2).sum(axis=0)
            usable_C = square_C > 1e-9 * (self.z_PC**2 * weight_P[:, None]).sum(axis=0)
            explained_C = np.where(usable_C, (z_P @ z_PC) ** 2 / np.maximum(square_C, least), 0)
            size = -np.log(weight_P).sum()
            alone = min(alone, float(n * np.log(max(float(square), least)) + size))
            left_C = np.maximum(square - explained_C, self._rounding)
            best_C = np.minimum(best_C, n * np.log(left_C) + size)
        best = int(best_C.argmin())
        return alone, best, float(alone - best_C[best])

    def departures(self, accepted: list[int]) -> tuple[Floats, float]:
        """Return means minus curve, and the noise variance, at the smoothing of REML."""
        freedom = len(self.z_P) - len(accepted)
        found: list[tuple[float, float, float]] = []
        for smoothing in self.smoothing_S.tolist():
            weight_P = smoothing / (self.basis.gamma_P + smoothing)
            columns_PA = self.z_PC[:, accepted] * np.sqrt(weight_P)[:, None]
            z_P, _ = self._beyond(accepted, np.sqrt(weight_P))
            variance = max(float(z_P @ z_P), self._rounding) / max(freedom, 1)
            logarithm = np.linalg.slogdet(columns_PA.T @ columns_PA)[1]
            deviance = freedom * np.log(variance) - np.log(weight_P).sum() + logarithm
            found.append((float(deviance), smoothing, variance))
        _, smoothing, variance = min(found)
        weight_P = smoothing / (self.basis.gamma_P + smoothing)
        root_P = np.sqrt(weight_P)
        effect_A = np.linalg.lstsq(
            self.z_PC[:, accepted] * root_P[:, None], self.z_P * root_P, rcond=None
        )[0]
        residual_P = weight_P * (self.z_P - self.z_PC[:, accepted] @ effect_A)
        departure_T = self.basis.rough_JP @ residual_P
        is_outlier_A = self._kind(accepted) == 2
        departure_T += self.column_TC[:, accepted][:, is_outlier_A] @ effect_A[is_outlier_A]
        return departure_T, variance

    def places(
        self, accepted: list[int]
    ) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """Return the probes of the accepted jumps, kinks and outliers, ascending."""
        n, kind_A = len(self.mean_T), self._kind(accepted)
        starts = (0, n - 1, 2 * n - 3)
        at_A = [c - starts[kind] + 1 for c, kind in zip(accepted, kind_A, strict=True)]

        def places_of(kind: int) -> tuple[int, ...]:
            return tuple(sorted(at for at, each in zip(at_A, kind_A, strict=True) if each == kind))

        return places_of(0), places_of(1), places_of(2)

    @property
    def _rounding(self) -> float:
        """Square of the rounding errors of the means."""
        return float((self.mean_T**2).sum()) * 1e-24 + np.finfo(np.float64).tiny

    def _kind(self, accepted: list[int]) -> Integers:
        n = len(self.mean_T)
        return np.searchsorted([n - 1, 2 * n - 3], accepted, side="right")

    def _beyond(self, accepted: list[int], root_P: Floats) -> tuple[Floats, Floats]:
        """Return weighted means and candidates, less their parts along the accepted ones."""
        z_P, z_PC = self.z_P * root_P, self.z_PC * root_P[:, None]
        if not accepted:
            return z_P, z_PC
        q_PA = np.linalg.qr(z_PC[:, accepted])[0]
        return z_P - q_PA @ (q_PA.T @ z_P), z_PC - q_PA @ (q_PA.T @ z_PC)
