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
        weight_SP = self._weights()
        root_SP = np.sqrt(weight_SP)
        z_SP, q_SPA = self._beyond(accepted, root_SP)
        # What is left of a candidate beside the accepted ones, by Pythagoras.
        along_SAC = (q_SPA * root_SP[..., None]).swapaxes(1, 2) @ self.z_PC
        whole_SC = weight_SP @ self.z_PC**2
        square_SC = whole_SC - (along_SAC**2).sum(axis=1)
        product_SC = (z_SP * root_SP) @ self.z_PC
        usable_SC = square_SC > 1e-9 * whole_SC
        explained_SC = np.where(usable_SC, product_SC**2 / np.maximum(square_SC, least), 0)
        square_S1 = (z_SP**2).sum(axis=1, keepdims=True)
        size_S1 = -np.log(weight_SP).sum(axis=1, keepdims=True)
        alone = float((n * np.log(np.maximum(square_S1, least)) + size_S1).min())
        left_SC = np.maximum(square_S1 - explained_SC, self._rounding)
        best_C = (n * np.log(left_SC) + size_S1).min(axis=0)
        best = int(best_C.argmin())
        return alone, best, float(alone - best_C[best])

    def departures(self, accepted: list[int]) -> tuple[Floats, float]:
        """Return means minus curve, and the noise variance, at the smoothing of REML."""
        freedom = len(self.z_P) - len(accepted)
        weight_SP = self._weights()
        root_SP = np.sqrt(weight_SP)
        columns_SPA = self.z_PC[:, accepted] * root_SP[..., None]
        z_SP, _ = self._beyond(accepted, root_SP)
        variance_S = np.maximum((z_SP**2).sum(axis=1), self._rounding) / max(freedom, 1)
        logarithm_S = np.linalg.slogdet(columns_SPA.swapaxes(1, 2) @ columns_SPA)[1]
        deviance_S = freedom * np.log(variance_S) - np.log(weight_SP).sum(axis=1) + logarithm_S
        best = int(deviance_S.argmin())
        weight_P, root_P, variance = weight_SP[best], root_SP[best], float(variance_S[best])
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

    def _weights(self) -> Floats:
        """Return the weights of the coordinates at each smoothing parameter, (S, P)."""
        smoothing_S1 = self.smoothing_S[:, None]
        return np.asarray(smoothing_S1 / (self.basis.gamma_P + smoothing_S1))

    def _beyond(self, accepted: list[int], root_SP: Floats) -> tuple[Floats, Floats]:
        """Return the weighted means less their parts along the accepted candidates, (S, P).

        Orthonormal columns along these are returned too, (S, P, A).
        """
        q_SPA = np.linalg.qr(self.z_PC[:, accepted] * root_SP[..., None])[0]
        z_SP1 = (self.z_P * root_SP)[..., None]
        return (z_SP1 - q_SPA @ (q_SPA.swapaxes(1, 2) @ z_SP1))[..., 0], q_SPA
