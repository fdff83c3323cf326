"""Locality: widths of the transitions, beside those of tokens that follow their group's curve.

If learning is local, a token falls in a narrow window of x. The null model destroys only this
locality: every token follows the mean curve of its group, the tokens of its dataset of about its
frequency (`group_curves`). A null model with one mean curve for all tokens would not do: where the
groups fall at different times, tokens without any step of their own are narrower than the mean of
all. Observed and null tokens go through the same fit, on the probes after the unigram phase, which
all tokens go through together (docs/architecture.md 6).

Resamples of documents do not show two errors, which come from draws of their own: that of the null
model's curves, and that of the common noise that the fitter leaves in the losses.

Shapes: N tokens, K probe steps, D datasets, W bins of widths, B draws of common noise, R resamples
(the first is the data as they are), U units.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Self

import numpy as np

from megatron_tokscale.core.arrays import (
    Floats,
    Floats32,
    Integers,
    Integers16,
    Integers32,
    Mask,
)
from megatron_tokscale.fit import SigmoidFits, TokenClass, fit_sigmoids
from megatron_tokscale.results.estimate import Estimate
from megatron_tokscale.results.evidence import Locality, WidthQuartiles, WidthSample
from megatron_tokscale.results.primary import LOCALITY
from megatron_tokscale.results.verdict import ClaimTest
from megatron_tokscale.spectrum.density import finite_range
from megatron_tokscale.spectrum.evidence.group_curves import GroupCurves

TEN_NINETY = 2 * math.log(9)
"""10-90% width of a sigmoid of width one."""

WIDTH_BINS = 40  # bins of the histograms: enough to show a shape, with tokens in each (our choice)
_HALVINGS = 2  # of the documents, for the null model's error: each costs a fit (our choice)
_QUARTILES = {"p25": 0.25, "p50": 0.5, "p75": 0.75}
_INSIDE, _RATIO = "fall in windows", "ratio of the medians"
COMMON_DRAWS = 4
"""Draws of the common noise that is left: each costs two fits (our choice). The intervals that they
give cover 91 to 97% (benchmarks/results/evidence.md); with Student's t they would be too wide."""
_COMMON_TOKENS = 2_000  # fitted in each: common noise moves all tokens alike (our choice)


@dataclass(frozen=True)
class CommonNoise:
    """Draws of the common noise that the fitter leaves in a sample's losses.

    Attributes:
        left_BDK: the draws for each dataset, in nats (`fit.common_shifts.draw_left_over`).
        dataset_N: dataset of each token.
    """

    left_BDK: Floats
    dataset_N: Integers16

    def rows(self, kept_N: Mask | Integers) -> "CommonNoise":
        """Return the draws with the given tokens."""
        return CommonNoise(self.left_BDK, self.dataset_N[kept_N])


@dataclass(frozen=True)
class FittedSample:
    """Tokens with a fit and losses at all probes, and the widths of their transitions.

    Only falling tokens with a trusted midpoint are counted. A token with fewer than two probes in
    its transition counts with its fitted width, which is then below the probes' spacing.

    Attributes:
        fits: fits of the tokens.
        loss_NK: their losses in nats.
        unit_N: their resampling units.
    """

    fits: SigmoidFits
    loss_NK: Floats32
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
        """Return quartiles of the counted tokens' widths in units of x, weighted by their drops."""
        order = np.argsort(self.width_N)
        unit_N, width_N = self.unit_N[self.counted_N][order], self.width_N[order]
        below_RN = np.cumsum(weight_RU[:, unit_N] * self.drop_N[order], axis=1)
        return {name: _crossing(below_RN, width_N, share) for name, share in _QUARTILES.items()}

    def fall_in_windows(self, weight_RU: Floats) -> Floats:
        """Return the counted tokens' fall inside their own 10-90% windows, over the fall of all.

        The fall of all tokens is from the first to the last finite probe. By definition, a perfect
        sigmoid has 0.8 of its fall in its window. So the number shows deviations from sigmoids, and
        has a meaning only beside the widths.
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

    def numbers(self, weight_RU: Floats) -> dict[str, Floats]:
        """Return the quartiles of the widths, and the fall in windows, by name."""
        return {**self.quartiles(weight_RU), _INSIDE: self.fall_in_windows(weight_RU)}

    def result(self, weight_RU: Floats, error: Mapping[str, float] | None = None) -> WidthSample:
        """Return the sample's numbers with their intervals.

        Args:
            weight_RU: weights of the resamples.
            error: relative standard errors that common noise adds, by number; none by default.
        """
        low, high = finite_range(self.fits.x_K)
        numbers = self.numbers(weight_RU)
        if error is not None:
            rng = np.random.default_rng(1)
            numbers = {
                name: _with_error(value_R, error[name] * rng.standard_normal(len(value_R)))
                for name, value_R in numbers.items()
            }

        def in_units_of(unit: float) -> WidthQuartiles:
            return WidthQuartiles(
                **{
                    name: Estimate.from_resamples(numbers[name] / unit, least=0)
                    for name in _QUARTILES
                }
            )

        return WidthSample(
            tokens=len(self.fits),
            falling=int(self.counted_N.sum()),
            class_shares={
                each.label: float(self.fits.is_class(each).mean()) if len(self.fits) else math.nan
                for each in TokenClass
                if each is not TokenClass.UNFITTED
            },
            width_x=in_units_of(1.0),
            width_decades=in_units_of(math.log(10)),
            width_of_range=in_units_of(high - low),
            fall_in_windows=Estimate.from_resamples(numbers[_INSIDE]),
        )

    def histogram(self, edges_W: Floats) -> Floats:
        """Return the share of the counted tokens' drop per bin of the 10-90% width (units of x)."""
        width_N = np.clip(self.width_N, edges_W[0], edges_W[-1])
        share_W, _ = np.histogram(width_N, edges_W, weights=self.drop_N)
        return np.asarray(share_W / max(self.drop_N.sum(), 1e-300))


@dataclass(frozen=True)
class WidthHistograms:
    """Shares of the falling tokens' drop per bin of the 10-90% width.

    Attributes:
        edges_W: edges of the bins in units of x, one more than the bins.
        observed_W: shares of the watched tokens.
        null_W: shares of the null model's tokens.
    """

    edges_W: Floats
    observed_W: Floats
    null_W: Floats


@dataclass(frozen=True)
class Widths:
    """A sample of tokens, and the null model's sample made from it.

    Attributes:
        observed: the tokens.
        null: the tokens of the null model.
        null_error: relative standard error of the null model's median width. Resamples of documents
            do not show it, as they keep the groups' curves: it comes from halves of the documents
            with curves of their own.
        common_error: relative standard errors that the common noise left in the losses gives the
            numbers of the observed tokens and the ratio of the median widths, by name.
    """

    observed: FittedSample
    null: FittedSample
    null_error: float
    common_error: Mapping[str, float]

    @classmethod
    def from_losses(
        cls,
        x_K: Floats,
        loss_NK: Floats32,
        group_N: Integers,
        unit_N: Integers32,
        seed: int,
        common: CommonNoise | None = None,
    ) -> Self:
        """Fit the tokens that miss no loss; draw their null model, and fit it as well.

        Args:
            x_K: the probes that count.
            loss_NK: losses in nats at these probes.
            group_N: group of each token, whose mean curve the null model follows.
            unit_N: resampling unit of each token.
            seed: seed of the null model's noise.
            common: draws of the common noise at these probes; none by default.
        """
        whole_N = np.isfinite(loss_NK).all(axis=1)
        loss_NK, unit_N = np.ascontiguousarray(loss_NK[whole_N]), unit_N[whole_N]
        group_N, rng = group_N[whole_N], np.random.default_rng(seed)
        observed = FittedSample(fit_sigmoids(x_K, loss_NK), loss_NK, unit_N)
        model = GroupCurves.from_losses(observed.fits, loss_NK, group_N).with_scaled_noise(rng)
        null = _fitted(model, unit_N, rng)
        null_error = _null_error(observed, group_N, model, rng)
        common_error = dict.fromkeys((*_QUARTILES, _INSIDE, _RATIO), 0.0)
        if common is not None and common.left_BDK.any():
            common_error = _common_error(observed, group_N, model, common.rows(whole_N), seed)
        return cls(observed, null, null_error, common_error)

    def result(self, weight_RU: Floats) -> Locality:
        """Return the numbers of both samples, and the test of the ratio of their median widths.

        The numbers of the null model have no intervals.
        """
        medians = [each.quartiles(weight_RU)["p50"] for each in (self.observed, self.null)]
        error = math.hypot(self.null_error, self.common_error[_RATIO])
        error_R = np.random.default_rng(0).standard_normal(len(weight_RU)) * error
        ratio_R = _with_error(medians[0] / medians[1], error_R)
        low, high = finite_range(self.observed.fits.x_K)
        return Locality(
            from_x=low,
            to_x=high,
            observed=self.observed.result(weight_RU, self.common_error),
            group_null=self.null.result(weight_RU[:1]),
            test=ClaimTest.of(LOCALITY, Estimate.from_resamples(ratio_R, least=0)),
        )

    def histograms(self) -> WidthHistograms:
        """Return the histograms of the widths of both samples."""
        edges_W = width_edges(self.observed.fits.x_K)
        return WidthHistograms(
            edges_W, self.observed.histogram(edges_W), self.null.histogram(edges_W)
        )


def width_edges(x_K: Floats) -> Floats:
    """Return logarithmic bins of the 10-90% width, from a tenth of the spacing to 4.4 ranges."""
    low, high = finite_range(x_K)
    spacing = float(np.median(np.diff(x_K[np.isfinite(x_K)])))
    return np.geomspace(spacing / 10, TEN_NINETY * (high - low), WIDTH_BINS + 1)


def _fitted(model: GroupCurves, unit_N: Integers32, rng: np.random.Generator) -> FittedSample:
    """Return a draw of the null model with its fits."""
    null_NK = model.draw(rng)
    return FittedSample(fit_sigmoids(model.x_K, null_NK), null_NK, unit_N)


def _null_error(
    observed: FittedSample, group_N: Integers, model: GroupCurves, rng: np.random.Generator
) -> float:
    """Return the relative standard error of the null model's median width; 0 if it has none.

    Halves of the units give two medians; half their difference has the error of the whole sample's
    median (McCarthy 1969, half-sample replication).
    """
    units = np.unique(observed.unit_N)
    squares = []
    for _ in range(_HALVINGS):
        first_N = np.isin(observed.unit_N, rng.permutation(units)[: len(units) // 2])
        medians = []
        for half_N in (first_N, ~first_N):
            half = GroupCurves.from_losses(
                observed.fits.rows(half_N), observed.loss_NK[half_N], group_N[half_N]
            )
            drawn = _fitted(half.with_noise_of(model), np.zeros(half_N.sum(), np.int32), rng)
            medians.append(drawn.quartiles(np.ones((1, 1)))["p50"][0])
        squares.append((np.log(medians[0] / medians[1]) / 2) ** 2)
    error = math.sqrt(np.mean(squares))
    return error if math.isfinite(error) else 0.0


def _common_error(
    observed: FittedSample, group_N: Integers, model: GroupCurves, common: CommonNoise, seed: int
) -> dict[str, float]:
    """Return the relative standard errors that the common noise left in the losses gives.

    They are root mean squares of the changes of the logarithms when the draws are added to the
    losses. The null model has the same noise in all draws.
    """
    rng = np.random.default_rng([seed, 1])
    chosen = np.sort(rng.permutation(len(group_N))[:_COMMON_TOKENS])
    loss_NK, group_N = observed.loss_NK[chosen], np.unique(group_N[chosen], return_inverse=True)[1]
    dataset_N, unit_N = common.dataset_N[chosen], np.zeros(len(chosen), np.int32)

    def logarithms(left_DK: Floats) -> dict[str, float]:
        moved_NK = loss_NK + left_DK.astype(np.float32)[dataset_N]
        sample = FittedSample(fit_sigmoids(model.x_K, moved_NK), moved_NK, unit_N)
        curves = GroupCurves.from_losses(sample.fits, moved_NK, group_N).with_noise_of(model)
        null = _fitted(curves, unit_N, np.random.default_rng([seed, 2]))
        numbers = sample.numbers(np.ones((1, 1)))
        numbers[_RATIO] = numbers["p50"] / null.quartiles(np.ones((1, 1)))["p50"]
        with np.errstate(divide="ignore", invalid="ignore"):
            return {name: float(np.log(value_R[0])) for name, value_R in numbers.items()}

    first = logarithms(np.zeros(common.left_BDK.shape[1:]))
    drawn = [logarithms(left_DK) for left_DK in common.left_BDK]
    error = {
        name: math.sqrt(np.mean([(each[name] - value) ** 2 for each in drawn]))
        for name, value in first.items()
    }
    return {name: value if math.isfinite(value) else 0.0 for name, value in error.items()}


def _with_error(value_R: Floats, log_error_R: Floats) -> Floats:
    """Return a number's resamples with an error of its logarithm; the first stays."""
    factor_R = np.exp(log_error_R)
    factor_R[0] = 1
    return np.asarray(value_R * factor_R)


def _crossing(below_RN: Floats, value_N: Floats, share: float) -> Floats:
    """Return, for each row, the smallest value at or below which lies `share` of its weight."""
    found_R = np.full(len(below_RN), np.nan)
    if not len(value_N):
        return found_R
    for r, below_N in enumerate(below_RN):
        if below_N[-1] > 0:
            found_R[r] = value_N[np.searchsorted(below_N, (share - 1e-12) * below_N[-1])]
    return found_R


def _fall_in_window(fits: SigmoidFits, loss_NK: Floats) -> Floats:
    """Return the measured loss at the start of each token's 10-90% window minus that at its end.

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
