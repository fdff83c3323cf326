"""Locality: how wide the transitions are, beside tokens that merely follow the mean curve.

If learning is local, a token falls in a narrow window of x. The null destroys just that: every
token is given the shape of the mean loss curve, with its own level and amplitude, plus noise as
large and as autocorrelated as its own, and goes through the same fit with the same classes
(design.md 6; the construction is our choice).

Shapes: N tokens, K probe steps, C bins, R resamples (the first is the data as they are), U units.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_tokscale.core.arrays import Floats, Floats32, Integers32, Mask
from megatron_tokscale.fit import SigmoidFits, TokenClass, fit_sigmoids
from megatron_tokscale.results.estimate import Estimate
from megatron_tokscale.spectrum.density import finite_range

TEN_NINETY = 2 * math.log(9)
"""10-90% width of a sigmoid of width one."""

WIDTH_BINS = 40
_QUARTILES = {"p25": 0.25, "p50": 0.5, "p75": 0.75}
_MOST_CORRELATED = 0.95
LOCAL_BELOW = 0.95
"""Of the ratio of median widths: the null's own bias is a hundredth (our choice)."""


@dataclass(frozen=True)
class Sample:
    """Tokens with a fit and losses at all probes, and what locality asks of them.

    Only falling tokens with a trusted midpoint are counted. A token with fewer than two probes in
    its transition counts with its fitted width, which is then below the probes' spacing.
    """

    fits: SigmoidFits
    loss_NK: NDArray[Any]
    unit_N: Integers32

    @cached_property
    def counted_N(self) -> Mask:
        """The falling tokens with a trusted midpoint."""
        return np.asarray(self.fits.is_class(TokenClass.FALLING) & self.fits.trusted_N)

    @cached_property
    def width_N(self) -> Floats:
        """10-90% widths of the counted tokens, in units of x."""
        return TEN_NINETY * self.fits.width_N[self.counted_N].astype(np.float64)

    @cached_property
    def drop_N(self) -> Floats:
        """Drops of the counted tokens, in nats."""
        return self.fits.drop_N[self.counted_N].astype(np.float64)

    def quartiles(self, weight_RU: Floats) -> dict[str, Floats]:
        """Quartiles of the counted tokens' widths, each token weighted by its drop."""
        order = np.argsort(self.width_N)
        unit_N, width_N = self.unit_N[self.counted_N][order], self.width_N[order]
        below_RN = np.cumsum(weight_RU[:, unit_N] * self.drop_N[order], axis=1)
        return {name: _crossing(below_RN, width_N, share) for name, share in _QUARTILES.items()}

    def fall_in_windows(self, weight_RU: Floats) -> Floats:
        """The counted tokens' fall inside their own 10-90% windows, over the fall of all.

        The fall of all is between the first and the last finite probe. By its definition a perfect
        sigmoid has 0.8 of its own in its window: the number speaks of the tokens that are not one,
        and only beside the widths.
        """
        finite_NK = self.loss_NK[:, np.isfinite(self.fits.x_K)].astype(np.float64)
        inside_N = np.zeros(len(self.fits))
        inside_N[self.counted_N] = _fall_in_window(
            self.fits.rows(self.counted_N), finite_NK[self.counted_N]
        )
        inside_U, fall_U = (
            np.bincount(self.unit_N, value_N, weight_RU.shape[1])
            for value_N in (inside_N, finite_NK[:, 0] - finite_NK[:, -1])
        )
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.asarray(weight_RU @ inside_U / (weight_RU @ fall_U))

    def result(self, weight_RU: Floats) -> dict[str, Any]:
        """The sample's numbers with their intervals, as JSON."""
        low, high = finite_range(self.fits.x_K)
        units = {"width_x": 1.0, "width_decades": math.log(10), "width_of_range": high - low}
        quartiles = self.quartiles(weight_RU)
        return {
            "tokens": len(self.fits),
            "falling": int(self.counted_N.sum()),
            "class_shares": {
                each.label: float(self.fits.is_class(each).mean()) if len(self.fits) else None
                for each in TokenClass
                if each is not TokenClass.UNFITTED
            },
            **{
                name: {
                    key: value
                    for quartile, width_R in quartiles.items()
                    for key, value in Estimate.from_resamples(width_R / unit, least=0)
                    .entry(quartile)
                    .items()
                }
                for name, unit in units.items()
            },
            **Estimate.from_resamples(self.fall_in_windows(weight_RU)).entry("fall_in_windows"),
        }

    def histogram(self, edges_C: Floats) -> Floats:
        """Share of the counted tokens' drop per bin of the 10-90% width (units of x)."""
        width_N = np.clip(self.width_N, edges_C[0], edges_C[-1])
        share_C, _ = np.histogram(width_N, edges_C, weights=self.drop_N)
        return np.asarray(share_C / max(self.drop_N.sum(), 1e-300))


@dataclass(frozen=True)
class Widths:
    """A sample of tokens, and its null."""

    observed: Sample
    null: Sample

    @staticmethod
    def from_fits(
        fits: SigmoidFits, loss_NK: NDArray[Any], unit_N: Integers32, seed: int = 0
    ) -> "Widths":
        """Fit the null of the tokens that miss no loss; `unit_N` is their resampling unit."""
        whole_N = fits.complete_N
        observed = Sample(fits.rows(whole_N), loss_NK[whole_N], unit_N[whole_N])
        null_NK = mean_curve_losses(observed.fits, observed.loss_NK, seed)
        null_fits = fit_sigmoids(fits.x_K, null_NK)
        return Widths(observed, Sample(null_fits, null_NK, observed.unit_N))

    def result(self, weight_RU: Floats) -> dict[str, Any]:
        """Both samples, and the ratio of their median widths, as JSON.

        `local`: whether the whole interval of the ratio is below 0.95; null if it is not defined.
        On mean-curve tokens the ratio is one to about a hundredth, which is as well as the null
        models noise; with many tokens so little would be significant.
        """
        medians = [each.quartiles(weight_RU)["p50"] for each in (self.observed, self.null)]
        ratio = Estimate.from_resamples(medians[0] / medians[1], least=0)
        return {
            "observed": self.observed.result(weight_RU),
            "mean_curve_null": self.null.result(weight_RU),
            **ratio.entry("median_over_null"),
            "local": bool(ratio.high < LOCAL_BELOW) if np.isfinite(ratio.high) else None,
        }

    def histograms(self) -> dict[str, Floats]:
        """The histograms of the widths, by the names in spectrum.npz."""
        edges_C = width_edges(self.observed.fits.x_K)
        return {
            "width_edges_C": edges_C,
            "width_observed_C": self.observed.histogram(edges_C),
            "width_null_C": self.null.histogram(edges_C),
        }


def width_edges(x_K: Floats) -> Floats:
    """Logarithmic bins of the 10-90% width: from a tenth of the probes' spacing to 4.4 ranges."""
    low, high = finite_range(x_K)
    spacing = float(np.median(np.diff(x_K[np.isfinite(x_K)])))
    return np.geomspace(spacing / 10, TEN_NINETY * (high - low), WIDTH_BINS + 1)


def mean_curve_losses(fits: SigmoidFits, loss_NK: NDArray[Any], seed: int = 0) -> Floats32:
    """The null's losses: token i is a_i + b_i m(x) plus its own kind of Gaussian noise.

    m is the mean loss of the tokens, a_i and b_i come from least squares on the token's own
    losses. The noise has the residual variance SSE/(K - 4) of the token's own sigmoid and is
    autoregressive of order one, with the correlation that the fit found in its residuals.
    """
    loss_NK = loss_NK.astype(np.float64)
    mean_K = loss_NK.mean(axis=0)
    shape_K = mean_K - mean_K.mean()
    level_N = loss_NK.mean(axis=1, keepdims=True)
    amplitude_N = loss_NK @ shape_K / max(float(shape_K @ shape_K), 1e-300)
    noise_N = np.sqrt(fits.sse_N.astype(np.float64) / (loss_NK.shape[1] - 4))
    phi_N = np.clip(np.nan_to_num(fits.autocorrelation_N), 0, _MOST_CORRELATED)
    noise_NK = _autoregressive(phi_N, loss_NK.shape[1], seed) * noise_N[:, None]
    null_NK = level_N + amplitude_N[:, None] * shape_K + noise_NK
    return np.asarray(null_NK, dtype=np.float32)


def _autoregressive(phi_N: NDArray[Any], n_probes: int, seed: int) -> Floats:
    """Gaussian noise of variance one, correlation phi between neighbours."""
    shock_NK = np.random.default_rng(seed).standard_normal((len(phi_N), n_probes))
    noise_NK = shock_NK.copy()
    innovation_N = np.sqrt(1 - phi_N**2)
    for k in range(1, n_probes):
        noise_NK[:, k] = phi_N * noise_NK[:, k - 1] + innovation_N * shock_NK[:, k]
    return noise_NK


def _crossing(below_RN: Floats, value_N: Floats, share: float) -> Floats:
    """The smallest value that at least `share` of each row's weight does not exceed."""
    found_R = np.full(len(below_RN), np.nan)
    if not len(value_N):
        return found_R
    for r, below_N in enumerate(below_RN):
        if below_N[-1] > 0:
            found_R[r] = value_N[np.searchsorted(below_N, (share - 1e-12) * below_N[-1])]
    return found_R


def _fall_in_window(fits: SigmoidFits, loss_NK: Floats) -> Floats:
    """Measured loss at the start of each token's 10-90% window minus that at its end.

    The window is cut at the probed range; between probes the loss is interpolated in x.
    """
    x_K = fits.x_K[np.isfinite(fits.x_K)]
    half_N = TEN_NINETY / 2 * fits.width_N.astype(np.float64)

    def loss_at(x_N: Floats) -> Floats:
        x_N = np.clip(x_N, x_K[0], x_K[-1])
        right_N = np.clip(np.searchsorted(x_K, x_N), 1, len(x_K) - 1)
        share_N = (x_N - x_K[right_N - 1]) / (x_K[right_N] - x_K[right_N - 1])
        row_N = np.arange(len(x_N))
        before, after = loss_NK[row_N, right_N - 1], loss_NK[row_N, right_N]
        return np.asarray(before + share_N * (after - before))

    return loss_at(fits.midpoint_N - half_N) - loss_at(fits.midpoint_N + half_N)
