"""`spectrum_run`: make spectrum.npz, spectrum.json and reconstruction.json from a run's fits.

Shapes: N tokens, K probe steps, G grid points, D datasets, C bins, U resampling units, R resamples
(the first is the data as they are), J classes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Self

import numpy as np

from megatron_tokscale.core.arrays import Floats, Floats32, Integers
from megatron_tokscale.core.checked import write_typed_result
from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.core.progress import NoProgress, Progress
from megatron_tokscale.core.resampling import Units
from megatron_tokscale.core.schemas import SPECTRUM_SCHEMA
from megatron_tokscale.core.seed import DEFAULT_SEED
from megatron_tokscale.fit import SigmoidFits
from megatron_tokscale.results import FittedRun
from megatron_tokscale.results.estimate import Estimate, Undefined, defined_or_reason
from megatron_tokscale.results.evidence import (
    ClassShare,
    Evidence,
    ForwardPrediction,
    SlopeNoise,
    SpectrumSettings,
)
from megatron_tokscale.results.npz import write_npz
from megatron_tokscale.results.spectrum import DatasetCounts, SpectrumArrays, SpectrumSummary
from megatron_tokscale.spectrum.density import Bins, LearningTimeSpectrum
from megatron_tokscale.spectrum.derivative import SlopeEstimator
from megatron_tokscale.spectrum.evidence.forward import predict_forward
from megatron_tokscale.spectrum.evidence.locality import WidthHistograms, Widths
from megatron_tokscale.spectrum.evidence.reconstruction import (
    NAMES,
    Comparison,
    compare,
    slope_noise,
)
from megatron_tokscale.spectrum.frequency import FrequencyMeans, FrequencySums
from megatron_tokscale.spectrum.groups import groupings
from megatron_tokscale.spectrum.sums import CLASSES, DocumentSums, Resampled, TokenBlock
from megatron_tokscale.store import Run

_HELD_OUT_NOTE = (
    "Fitted on one half of the documents, measured on the other half of the same run. The mean "
    "curves of the halves agree, so a high value is nearly algebra; only a low value is evidence."
)
_UNITS = {
    "x": "natural logarithm of time; -inf at step 0",
    "density": "events per unit of x, integrates to one",
    "drop_weighted": "nats per unit of x, mean over all fitted tokens",
    "measured": "-dL/dx, nats per unit of x",
    "interval": "95%, over documents",
}


def spectrum_run(
    run: Run,
    *,
    n_resamples: int = 200,
    null_tokens: int = 20_000,
    seed: int = DEFAULT_SEED,
    progress: Progress | None = None,
) -> Evidence:
    """Write spectra, measured slope and reconstructions of a fitted run into RUN/analysis.

    There are three files: spectrum.npz with the arrays; spectrum.json with their description; and
    reconstruction.json with the agreement of the fits with the measured slope, the widths of the
    transitions beside those of the null model, and the forecast of the last factor of two in time
    from the losses before it. Every number has a 95% interval over documents. The tokens are read
    once, by blocks.

    Args:
        run: an opened run with RUN/analysis/fits.parquet.
        n_resamples: bootstrap resamples of the documents.
        null_tokens: number of tokens, drawn by `seed`, that are fitted again: as tokens of the null
            model, and on the first half of the time.
        seed: seed of the draws, the null model's noise, the split of documents and the bootstrap.
        progress: receiver of the name of each stage; None for none.

    Returns:
        The content of reconstruction.json.

    Raises:
        TokscaleError: the run is not fitted, was fitted on other probes, has no token that is
            fitted at all probes, or too few probes.
    """
    progress = progress or NoProgress()
    source = FittedRun.open(run)
    source.check_complete()
    units = run.tokens.units(seed)
    weight_RU = units.weights(n_resamples, seed)
    progress.stage("sums over the documents")
    chosen = draw_tokens(run.n_tokens, null_tokens, seed)
    sums, frequency, sample = _read_tokens(source, units, chosen)
    # The measured mean loss has the common shifts, which the fits and their losses are without.
    shift_UK = source.shift_DK[units.dataset_U]
    sums = replace(sums, loss_UK=sums.loss_UK + sums.tokens_U[:, None] * shift_UK)
    progress.stage("reconstructions")
    curves = _Curves.from_sums(source, sums, units, weight_RU, seed)
    progress.stage("widths and their null model")
    widths = Widths.from_fits(sample.fits, sample.loss_NK, sample.units.unit_N, seed)
    progress.stage("forward in time")
    forward = defined_or_reason(lambda: _forward(source, sample, weight_RU, seed))
    arrays = _arrays(run.step_K, curves, widths.histograms(), frequency.means(weight_RU))
    # Compute everything that may be refused before the first file is written.
    checksum = write_npz(run.paths.spectrum_arrays, arrays)
    evidence = Evidence(
        fit=source.fit.identity,
        arrays_crc32=checksum,
        documents=units.documents,
        non_finite=source.fit.non_finite,
        slope_noise=curves.overall.noise,
        dataset_noise=curves.dataset_noise(run.tokens.datasets),
        same_tokens=curves.overall.scores(),
        other_documents=curves.held_out.scores(),
        other_documents_note=_HELD_OUT_NOTE,
        falls=curves.overall.falls(),
        fall_before_first_finite_probe=_fall_before(source.x_K, curves.whole.loss_RK),
        classes=class_shares(sums, weight_RU),
        widths=widths.result(weight_RU),
        forward=forward,
        settings=SpectrumSettings(n_resamples, len(chosen), seed),
    )
    summary = curves.summary(source, checksum)
    write_typed_result(run.paths.spectrum, SPECTRUM_SCHEMA, summary)
    write_typed_result(run.paths.reconstruction, SPECTRUM_SCHEMA, evidence)
    return evidence


def draw_tokens(n_tokens: int, count: int, seed: int) -> Integers:
    """Draw `count` tokens, or all if there are fewer; their numbers ascend."""
    if n_tokens <= count:
        return np.arange(n_tokens)
    chosen = np.random.default_rng(seed).choice(n_tokens, count, replace=False)
    return np.sort(chosen)


@dataclass(frozen=True)
class _DrawnTokens:
    """Tokens that are fitted again.

    Attributes:
        token_N: number of each token, ascending.
        fits: their fits.
        loss_NK: their losses in nats.
        units: their resampling units.
    """

    token_N: Integers
    fits: SigmoidFits
    loss_NK: Floats32
    units: Units


def _read_tokens(
    source: FittedRun, units: Units, chosen: Integers
) -> tuple[DocumentSums, FrequencySums, _DrawnTokens]:
    """Return the sums over all tokens, and the chosen tokens, from one pass over the blocks."""
    frequency = FrequencySums(source.run.tokens, units)
    kept: list[tuple[SigmoidFits, Floats32]] = []

    def blocks() -> Iterator[TokenBlock]:
        for at, fits, loss_NK in source.blocks():
            frequency.add(at, fits, loss_NK)
            rows = chosen[(chosen >= at.start) & (chosen < at.stop)] - at.start
            kept.append((fits.rows(rows), loss_NK[rows]))
            yield fits, loss_NK, units.unit_N[at]

    sums = DocumentSums.from_blocks(source.x_K, blocks(), len(units))
    drawn = _DrawnTokens(
        chosen,
        SigmoidFits.concatenate([fits for fits, _ in kept]),
        np.concatenate([loss_NK for _, loss_NK in kept]),
        replace(units, unit_N=units.unit_N[chosen]),
    )
    return sums, frequency, drawn


@dataclass(frozen=True)
class _Curves:
    """Resampled curves, spectra and reconstructions of a run.

    Attributes:
        whole: resampled means over all tokens.
        by_dataset: resampled means over the tokens of each dataset.
        spectrum: spectra of the resamples.
        dataset_spectra: spectra of the resamples of each dataset.
        overall: reconstructions of all tokens against their measured slope.
        held_out: reconstructions of one half of the documents against the slope of the other half.
    """

    whole: Resampled
    by_dataset: list[Resampled]
    spectrum: LearningTimeSpectrum
    dataset_spectra: list[LearningTimeSpectrum]
    overall: Comparison
    held_out: Comparison

    @classmethod
    def from_sums(
        cls, source: FittedRun, sums: DocumentSums, units: Units, weight_RU: Floats, seed: int
    ) -> Self:
        """Return the curves of all resamples of the documents.

        Raises:
            TokscaleError: the mean loss does not change.
            UndefinedError: fewer than four finite probes.
        """
        x_K = source.x_K
        whole = sums.resampled(x_K, weight_RU)
        if not np.ptp(whole.loss_RK[0]) > 0:
            raise TokscaleError(
                f"the mean loss of {source.run.path} is the same at all probes; a spectrum needs "
                "one that changes; train on"
            )
        overall = compare(x_K, whole.curves(), whole.loss_RK)
        half_U = units.half(seed)
        model, target = (sums.resampled(x_K, weight_RU * each_U) for each_U in (half_U, ~half_U))
        whole_only = None if (~half_U).any() else overall.estimator  # one unit has no halves
        held_out = compare(x_K, model.curves(), target.loss_RK, estimator=whole_only)
        by_dataset = [
            sums.resampled(x_K, weight_RU * (units.dataset_U == d))
            for d in range(len(source.run.tokens.datasets))
        ]
        spectra = [_spectrum(each) for each in by_dataset]
        return cls(whole, by_dataset, _spectrum(whole), spectra, overall, held_out)

    def dataset_noise(self, names: Sequence[str]) -> dict[str, SlopeNoise | Undefined]:
        """Return the noise of the mean loss of each dataset, by its name, over the same range."""
        x_K, x_G = self.whole.x_K, self.overall.x_G

        def noise_of(part: Resampled) -> SlopeNoise:
            estimator = SlopeEstimator.from_curve(x_K, part.loss_RK[0], from_x=x_G[0], to_x=x_G[-1])
            return slope_noise(estimator, part.loss_RK, x_G)

        return {
            name: defined_or_reason(partial(noise_of, part))
            for name, part in zip(names, self.by_dataset, strict=True)
        }

    def summary(self, source: FittedRun, checksum: str) -> SpectrumSummary:
        """Return the content of spectrum.json beside a spectrum.npz with this checksum."""
        loss_RK, names = self.whole.loss_RK, source.run.tokens.datasets
        return SpectrumSummary(
            fit=source.fit.identity,
            arrays_crc32=checksum,
            units=_UNITS,
            n_tokens=self.spectrum.n_tokens,
            n_events=self.spectrum.n_events,
            drop_of_events=Estimate.from_resamples(self.whole.drop_RC.sum(axis=1), least=0),
            fall=Estimate.from_resamples(loss_RK[:, 0] - loss_RK[:, -1]),
            bandwidth_x=self.spectrum.bandwidth,
            common_width_x=Estimate.from_resamples(self.whole.width_R, least=0),
            datasets=tuple(
                DatasetCounts(name, each.n_tokens, each.n_events)
                for name, each in zip(names, self.dataset_spectra, strict=True)
            ),
        )


def _spectrum(part: Resampled) -> LearningTimeSpectrum:
    """Return the spectrum of every resample; the arrays have a leading R."""
    count_RC, drop_RC = np.nan_to_num(part.count_RC), np.nan_to_num(part.drop_RC)
    return LearningTimeSpectrum.from_bins(part.x_K, count_RC, drop_RC, int(part.tokens_R[0]))


def _forward(
    source: FittedRun, sample: _DrawnTokens, weight_RU: Floats, seed: int
) -> ForwardPrediction:
    """Predict the last factor of two in time from the losses of the drawn tokens before it."""
    finite_N = np.isfinite(sample.loss_NK).all(axis=1)
    token_N = sample.token_N[finite_N]
    return predict_forward(
        source.x_K,
        sample.loss_NK[finite_N],
        replace(sample.units, unit_N=sample.units.unit_N[finite_N]),
        {name: each.rows(token_N) for name, each in groupings(source.run.tokens).items()},
        weight_RU,
        seed,
    )


def _arrays(
    step_K: Integers, curves: _Curves, widths: WidthHistograms, frequency: FrequencyMeans
) -> SpectrumArrays:
    """Return the arrays of spectrum.npz."""
    whole, by_dataset, overall = curves.whole, curves.by_dataset, curves.overall
    x_K, x_G = whole.x_K, overall.x_G
    slopes = overall.estimator
    measured_DRG = np.stack(
        [slopes.slopes(np.nan_to_num(part.loss_RK), x_G) for part in by_dataset]
    )
    full, kernel, spectrum = (overall.by_name[name].derivative_G for name in NAMES)
    half_full, half_kernel, half_spectrum = (
        curves.held_out.by_name[name].derivative_G for name in NAMES
    )
    return SpectrumArrays(
        step_K=step_K,
        x_K=x_K,
        mean_loss_K=whole.loss_RK[0],
        mean_loss_RK=whole.loss_RK,
        mean_loss_DK=np.stack([part.loss_RK[0] for part in by_dataset]),
        mean_loss_RDK=np.stack([part.loss_RK for part in by_dataset], axis=1),
        x_G=x_G,
        density_G=curves.spectrum.density_G[0],
        density_interval_2G=_interval(curves.spectrum.density_G),
        density_DG=np.stack([each.density_G[0] for each in curves.dataset_spectra]),
        drop_weighted_G=curves.spectrum.drop_weighted_G[0],
        drop_weighted_interval_2G=_interval(curves.spectrum.drop_weighted_G),
        drop_weighted_DG=np.stack([each.drop_weighted_G[0] for each in curves.dataset_spectra]),
        measured_G=overall.measured_G,
        measured_se_G=slopes.error(x_G),
        measured_interval_2G=_interval(overall.measured_RG),
        measured_DG=measured_DRG[:, 0],
        measured_interval_D2G=np.stack([_interval(part_RG) for part_RG in measured_DRG]),
        full_G=full,
        kernel_G=kernel,
        spectrum_G=spectrum,
        half_measured_G=curves.held_out.measured_G,
        half_full_G=half_full,
        half_kernel_G=half_kernel,
        half_spectrum_G=half_spectrum,
        x_C=Bins.over(x_K).x_C,
        drop_RC=whole.drop_RC.astype(np.float32),
        width_edges_W=widths.edges_W,
        width_observed_W=widths.observed_W,
        width_null_W=widths.null_W,
        frequency_loss_RFK=frequency.loss_RFK,
        frequency_share_F=frequency.share_F,
        frequency_I=frequency.frequency_I,
        frequency_time_I=frequency.time_I,
    )


def _interval(value_RG: Floats) -> Floats:
    """Return the 2.5% and 97.5% percentiles of the resamples; NaN without resamples."""
    if len(value_RG) < 2:
        return np.full((2, value_RG.shape[1]), np.nan)
    return np.asarray(np.quantile(value_RG[1:], [0.025, 0.975], axis=0))


def class_shares(sums: DocumentSums, weight_RU: Floats) -> dict[str, ClassShare]:
    """Return the share of the tokens, and of the whole fall, in each class by its label."""
    class_RJ, fall_RJ = weight_RU @ sums.class_UJ, weight_RU @ sums.fall_UJ
    with np.errstate(divide="ignore", invalid="ignore"):
        share_RJ = class_RJ / class_RJ.sum(axis=1, keepdims=True)
        fall_share_RJ = fall_RJ / fall_RJ.sum(axis=1, keepdims=True)
    return {
        each.label: ClassShare(
            share=Estimate.from_resamples(share_RJ[:, j], 0, 1),
            fall_share=Estimate.from_resamples(fall_share_RJ[:, j]),
        )
        for j, each in enumerate(CLASSES)
    }


def _fall_before(x_K: Floats, loss_RK: Floats) -> Estimate | None:
    """Return the fall of the mean loss from step 0 to the first finite probe."""
    first = int(np.isfinite(x_K).argmax())
    return Estimate.from_resamples(loss_RK[:, 0] - loss_RK[:, first]) if first else None
