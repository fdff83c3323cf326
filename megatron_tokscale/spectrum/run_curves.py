"""The resampled curves of a run: spectra, slopes, reconstructions and outcomes, and their arrays.

Shapes: N tokens, K probe steps, G grid points, D datasets, C bins of x, W bins of widths, F groups
and I bins of frequency, U resampling units, R resamples (the first is the data as they are).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Self

import numpy as np

from megatron_tokscale.core.arrays import Floats, Integers
from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.core.resampling import Units
from megatron_tokscale.results import FittedRun
from megatron_tokscale.results.estimate import Estimate, Undefined, defined_or_reason
from megatron_tokscale.results.evidence import SlopeNoise
from megatron_tokscale.results.scored_range import ScoredRange
from megatron_tokscale.results.spectrum import DatasetCounts, SpectrumArrays, SpectrumSummary
from megatron_tokscale.spectrum.density import Bins, LearningTimeSpectrum
from megatron_tokscale.spectrum.derivative import SlopeEstimator
from megatron_tokscale.spectrum.events import Outcome
from megatron_tokscale.spectrum.evidence.locality import WidthHistograms
from megatron_tokscale.spectrum.evidence.reconstruction import (
    NAMES,
    Comparison,
    compare,
    slope_noise,
)
from megatron_tokscale.spectrum.frequency import FrequencyMeans
from megatron_tokscale.spectrum.scored_range import certain_end, certain_part
from megatron_tokscale.spectrum.sums import DocumentSums, Resampled
from megatron_tokscale.spectrum.survival import (
    Outcomes,
    OutcomeSums,
    median_time,
    product_limit,
)

_UNITS = {
    "x": "natural logarithm of time; -inf at step 0",
    "density": "events per unit of x, integrates to one",
    "drop_weighted": "nats per unit of x, mean over all fitted tokens",
    "unlearned": "share of the drops that is not learned, Kaplan-Meier",
    "measured": "-dL/dx, nats per unit of x",
}


@dataclass(frozen=True)
class Part:
    """Resampled means and outcomes of all tokens, or of the tokens of one dataset.

    Attributes:
        means: resampled means.
        outcomes: resampled outcomes.
        spectrum: spectra of the resamples; the arrays have a leading R.
    """

    means: Resampled
    outcomes: Outcomes
    spectrum: LearningTimeSpectrum

    @classmethod
    def from_sums(
        cls,
        x_K: Floats,
        sums: DocumentSums,
        outcomes: OutcomeSums,
        weight_RU: Floats,
        scored: ScoredRange,
    ) -> Self:
        """Return the part that each row of weights draws."""
        means = sums.resampled(x_K, weight_RU, from_x=scored.from_x)
        count_RC, drop_RC = np.nan_to_num(means.count_RC), np.nan_to_num(means.drop_RC)
        n_tokens = int(means.tokens_R[0])
        spectrum = LearningTimeSpectrum.from_bins(x_K, count_RC, drop_RC, n_tokens)
        return cls(means, outcomes.resampled(weight_RU), spectrum)

    def unlearned(self, scored: ScoredRange, x_G: Floats) -> Floats:
        """Return the share of the drops that is not learned by `x_G`, (R, G); NaN behind the range.

        It is Kaplan and Meier's estimate; the censored tokens count with their expected drops.
        """
        x_C, surviving_RC = self._surviving(
            scored, self.means.drop_RC, self.outcomes.expected_R[:, None]
        )
        within_G = np.where(x_G <= scored.to_x, x_G, np.nan)
        return np.stack([np.interp(within_G, x_C, row_C) for row_C in surviving_RC])

    def counts(self, name: str, scored: ScoredRange) -> DatasetCounts:
        """Return what became of the tokens."""
        found = self.outcomes
        censored_R1 = found.share(Outcome.CENSORED)[:, None]
        x_C, surviving_RC = self._surviving(scored, self.means.count_RC, censored_R1)
        median_R = median_time(x_C, surviving_RC)
        median: Estimate | Undefined = Estimate.from_resamples(median_R)
        if not np.isfinite(median_R[0]):
            median = Undefined("fewer than half of the tokens are learned by the end")
        return DatasetCounts(
            name=name,
            n_tokens=int(self.means.tokens_R[0]),
            n_events=found.count(Outcome.LEARNED),
            censored=found.count(Outcome.CENSORED),
            known=found.count(Outcome.KNOWN),
            forgotten=found.count(Outcome.FORGOTTEN),
            learned_nats=Estimate.from_resamples(found.learned_R, least=0),
            expected_nats=Estimate.from_resamples(found.expected_R, least=0),
            median_x=median,
        )

    def _surviving(
        self, scored: ScoredRange, event_RC: Floats, censored_R1: Floats
    ) -> tuple[Floats, Floats]:
        """Return the upper ends of the bins up to the end, and the share that survives each."""
        end_C = Bins.over(self.means.x_K).edges[1:]
        learned = np.searchsorted(end_C, scored.to_x) + 1
        event_RC = np.nan_to_num(event_RC[:, :learned])
        censored_RC = np.zeros_like(event_RC)
        censored_RC[:, -1:] = np.nan_to_num(censored_R1)
        return end_C[:learned], product_limit(event_RC, censored_RC)


@dataclass(frozen=True)
class RunCurves:
    """Resampled curves, spectra and reconstructions of a run.

    Attributes:
        scored: the scored range.
        certain: its part in which events are certain, for R².
        whole: all tokens.
        by_dataset: the tokens of each dataset.
        shown: reconstructions of all tokens against their measured slope, over all probes.
        overall: the same in the range `certain`.
        held_out: reconstructions of one half of the documents against the slope of the other half,
            in the range `certain`.
    """

    scored: ScoredRange
    certain: ScoredRange
    whole: Part
    by_dataset: list[Part]
    shown: Comparison
    overall: Comparison
    held_out: Comparison

    @classmethod
    def from_sums(
        cls,
        source: FittedRun,
        scored: ScoredRange,
        sums: DocumentSums,
        outcomes: OutcomeSums,
        units: Units,
        weight_RU: Floats,
        seed: int,
    ) -> Self:
        """Return the curves of all resamples of the documents.

        Raises:
            TokscaleError: the mean loss does not change.
            UndefinedError: fewer than four finite probes.
        """
        x_K = source.x_K
        whole = Part.from_sums(x_K, sums, outcomes, weight_RU, scored)
        loss_RK, curves = whole.means.loss_RK, whole.means.curves()
        if not np.ptp(loss_RK[0]) > 0:
            raise TokscaleError(
                f"the mean loss of {source.run.path} is the same at all probes; a spectrum needs "
                "one that changes; train on"
            )
        certain = certain_part(scored, x_K, whole.means.width_R[0])
        compare_certain = partial(compare, x_K, from_x=certain.from_x, to_x=certain.to_x)
        shown, overall = compare(x_K, curves, loss_RK), compare_certain(curves, loss_RK)
        half_U = units.half(seed)
        model, target = (
            sums.resampled(x_K, weight_RU * each_U, from_x=scored.from_x)
            for each_U in (half_U, ~half_U)
        )
        # One unit has no halves, and a half may have no token that misses no loss.
        whole_only = None if np.isfinite(target.loss_RK[0]).any() else overall.estimator
        held_out = compare_certain(model.curves(), target.loss_RK, estimator=whole_only)
        by_dataset = [
            Part.from_sums(x_K, sums, outcomes, units.of_dataset(weight_RU, d), scored)
            for d in range(len(source.run.tokens.datasets))
        ]
        return cls(scored, certain, whole, by_dataset, shown, overall, held_out)

    def dataset_noise(self, names: Sequence[str]) -> dict[str, SlopeNoise | Undefined]:
        """Return the noise of the mean loss of each dataset in the range `certain`, by its name."""
        x_K, x_G = self.whole.means.x_K, self.overall.x_G

        def noise_of(loss_RK: Floats) -> SlopeNoise:
            estimator = SlopeEstimator.from_curve(
                x_K, loss_RK[0], from_x=self.certain.from_x, to_x=self.certain.to_x
            )
            return slope_noise(estimator, loss_RK, x_G)

        return {
            name: defined_or_reason(partial(noise_of, part.means.loss_RK))
            for name, part in zip(names, self.by_dataset, strict=True)
        }

    def summary(self, source: FittedRun, checksum: str) -> SpectrumSummary:
        """Return the content of spectrum.json beside a spectrum.npz with this checksum."""
        means, names = self.whole.means, source.run.tokens.datasets
        return SpectrumSummary(
            fit=source.fit.identity,
            arrays_crc32=checksum,
            units=_UNITS | {"interval": f"95%, over {source.fit.identity.unit_kind}"},
            scored=self.scored,
            certain_to_x=certain_end(means.x_K, means.width_R[0]),
            overall=self.whole.counts("all", self.scored),
            fall=Estimate.from_resamples(means.loss_RK[:, 0] - means.loss_RK[:, -1]),
            bandwidth_x=self.whole.spectrum.bandwidth,
            common_width_x=Estimate.from_resamples(means.width_R, least=0),
            datasets=tuple(
                part.counts(name, self.scored)
                for name, part in zip(names, self.by_dataset, strict=True)
            ),
        )

    def arrays(
        self, step_K: Integers, widths: WidthHistograms, frequency: FrequencyMeans
    ) -> SpectrumArrays:
        """Return the arrays of spectrum.npz."""
        means, parts = self.whole.means, self.by_dataset
        x_K, x_G, slopes = means.x_K, self.shown.x_G, self.shown.estimator
        measured_DRG = np.stack(
            [slopes.slopes(np.nan_to_num(part.means.loss_RK), x_G) for part in parts]
        )
        measured_DRG[~np.isfinite([part.means.loss_RK for part in parts]).any(axis=2)] = np.nan
        full, kernel, spectrum = (self.shown.by_name[name].derivative_G for name in NAMES)
        unlearned_RG = self.whole.unlearned(self.scored, x_G)
        bins = Bins.over(x_K)
        return SpectrumArrays(
            step_K=step_K,
            x_K=x_K,
            mean_loss_K=means.loss_RK[0],
            mean_loss_RK=means.loss_RK,
            mean_loss_DK=np.stack([part.means.loss_RK[0] for part in parts]),
            mean_loss_RDK=np.stack([part.means.loss_RK for part in parts], axis=1),
            x_G=x_G,
            density_G=self.whole.spectrum.density_G[0],
            density_interval_2G=_interval(self.whole.spectrum.density_G),
            density_DG=np.stack([part.spectrum.density_G[0] for part in parts]),
            drop_weighted_G=self.whole.spectrum.drop_weighted_G[0],
            drop_weighted_interval_2G=_interval(self.whole.spectrum.drop_weighted_G),
            drop_weighted_DG=np.stack([part.spectrum.drop_weighted_G[0] for part in parts]),
            unlearned_G=unlearned_RG[0],
            unlearned_interval_2G=_interval(unlearned_RG),
            measured_G=self.shown.measured_G,
            measured_se_G=slopes.error(x_G),
            measured_interval_2G=_interval(self.shown.measured_RG),
            measured_DG=measured_DRG[:, 0],
            measured_interval_D2G=np.stack([_interval(part_RG) for part_RG in measured_DRG]),
            full_G=full,
            kernel_G=kernel,
            spectrum_G=spectrum,
            x_C=bins.x_C[bins.inside_C],
            drop_RC=means.drop_RC[:, bins.inside_C].astype(np.float32),
            width_edges_W=widths.edges_W,
            width_observed_W=widths.observed_W,
            width_null_W=widths.null_W,
            frequency_loss_RFK=frequency.loss_RFK,
            frequency_share_F=frequency.share_F,
            frequency_I=frequency.frequency_I,
            frequency_time_I=frequency.time_I,
            frequency_events_I=frequency.events_I,
        )


def _interval(value_RG: Floats) -> Floats:
    """Return the 2.5% and 97.5% percentiles of the resamples; NaN without resamples."""
    drawn_RG = value_RG[1:][~np.isnan(value_RG[1:]).any(axis=1)]
    if not len(drawn_RG):
        return np.full((2, value_RG.shape[1]), np.nan)
    return np.asarray(np.quantile(drawn_RG, [0.025, 0.975], axis=0))
