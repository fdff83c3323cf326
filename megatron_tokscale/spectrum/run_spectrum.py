"""`spectrum_run`: make spectrum.npz, spectrum.json and reconstruction.json from a run's fits.

Shapes: N tokens, K probe steps, D datasets, B draws of common noise, U resampling units, R
resamples (the first is the data as they are), J classes.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Self

import numpy as np

from megatron_tokscale.core.arrays import Floats, Floats32, Integers, Integers16, Mask
from megatron_tokscale.core.checked import write_typed_result
from megatron_tokscale.core.progress import NoProgress, Progress
from megatron_tokscale.core.resampling import Units
from megatron_tokscale.core.schemas import SPECTRUM_SCHEMA
from megatron_tokscale.core.seed import DEFAULT_SEED
from megatron_tokscale.fit import SigmoidFits
from megatron_tokscale.fit.common_shifts import draw_left_over
from megatron_tokscale.results import FittedRun
from megatron_tokscale.results.estimate import Estimate, defined_or_reason
from megatron_tokscale.results.evidence import (
    ClassShare,
    Evidence,
    ForwardPrediction,
    SpectrumSettings,
    Twins,
)
from megatron_tokscale.results.npz import write_npz
from megatron_tokscale.results.scored_range import ScoredRange
from megatron_tokscale.spectrum.events import events_of
from megatron_tokscale.spectrum.evidence.forward import predict_forward
from megatron_tokscale.spectrum.evidence.locality import COMMON_DRAWS, CommonNoise, Widths
from megatron_tokscale.spectrum.evidence.token_groups import token_groups
from megatron_tokscale.spectrum.frequency import FrequencySums
from megatron_tokscale.spectrum.groups import groupings
from megatron_tokscale.spectrum.run_curves import RunCurves
from megatron_tokscale.spectrum.scored_range import scored_range_of
from megatron_tokscale.spectrum.sums import CLASSES, DocumentSums, TokenBlock
from megatron_tokscale.spectrum.survival import OutcomeSums
from megatron_tokscale.spectrum.twins import MOST_TOKENS, TwinTokens, make_twins
from megatron_tokscale.store import Run

_HELD_OUT_NOTE = (
    "Fitted on one half of the {}, measured on the other half of the same run. The mean curves of "
    "the halves agree, so a high value is nearly algebra; only a low value is evidence."
)


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
    reconstruction.json with the agreement of the fits with the measured slope, beside that of two
    planted twins; the widths of the transitions beside those of the null model; and the forecast of
    the last factor of two in time from the losses before it. Every number has a 95% interval over
    documents. The losses are read twice by blocks, once for the scored range, and the fits once.

    Args:
        run: an opened run with RUN/analysis/fits.parquet.
        n_resamples: bootstrap resamples of the documents.
        null_tokens: number of tokens, drawn by `seed`, that are fitted again: as twins, as tokens
            of the null model, and on the first half of the time; at most 100,000.
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
    progress.stage("scored range")
    scored = scored_range_of(run, source.x_K, run.mean_losses())
    progress.stage("sums over the tokens")
    chosen = draw_tokens(run.n_tokens, min(null_tokens, MOST_TOKENS), seed)
    pass_over = _Pass.over(source, scored, units, chosen)
    sample = pass_over.drawn
    sums = pass_over.measured(source.shift_DK[units.dataset_U])
    progress.stage("reconstructions")
    curves = RunCurves.from_sums(source, scored, sums, pass_over.outcomes, units, weight_RU, seed)
    progress.stage("twins")
    twins = defined_or_reason(
        lambda: sample.twins(curves.certain, weight_RU, seed, source.shift_DK)
    )
    progress.stage("widths and their null model")
    left_BDK = _left_over(source, pass_over.sums, units, seed)
    widths = sample.widths(scored.holds(source.x_K), left_BDK, seed)
    progress.stage("forward in time")
    forward = defined_or_reason(lambda: _forward(source, sample, weight_RU, seed))
    frequency = pass_over.frequency.means(weight_RU)
    arrays = curves.arrays(run.step_K, widths.histograms(), frequency)
    # Compute everything that may be refused before the first file is written.
    checksum = write_npz(run.paths.spectrum_arrays, arrays)
    evidence = Evidence(
        fit=source.fit.identity,
        arrays_crc32=checksum,
        n_units=units.documents,
        non_finite=source.fit.non_finite,
        scored=curves.certain,
        slope_noise=curves.overall.noise,
        dataset_noise=curves.dataset_noise(run.tokens.datasets),
        same_tokens=curves.overall.scores(),
        other_documents=curves.held_out.scores(),
        other_documents_note=_HELD_OUT_NOTE.format(units.kind),
        twins=twins,
        falls=curves.shown.falls(),
        fall_before_first_finite_probe=_fall_before(source.x_K, curves.whole.means.loss_RK),
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
        group_N: their groups.
        dataset_N: their datasets.
    """

    token_N: Integers
    fits: SigmoidFits
    loss_NK: Floats32
    units: Units
    group_N: Integers
    dataset_N: Integers16

    def twins(self, scored: ScoredRange, weight_RU: Floats, seed: int, shift_DK: Floats) -> Twins:
        """Return R² of the reconstructions of twins of these tokens, with common shifts."""
        tokens = TwinTokens(
            self.fits, self.loss_NK, self.group_N, self.units.unit_N, self.dataset_N
        )
        return make_twins(tokens, scored, weight_RU, seed, shift_DK)

    def widths(self, scored_K: Mask, left_BDK: Floats, seed: int) -> Widths:
        """Return the widths of these tokens and of their null model, fitted on the given probes.

        `left_BDK` are draws of the common noise that is left in the losses.
        """
        x_K, loss_NK = self.fits.x_K[scored_K], self.loss_NK[:, scored_K]
        common = CommonNoise(left_BDK[..., scored_K], self.dataset_N)
        return Widths.from_losses(x_K, loss_NK, self.group_N, self.units.unit_N, seed, common)


@dataclass(frozen=True)
class _Pass:
    """Sums over all tokens, and the drawn tokens, from one pass.

    Attributes:
        sums: sums over the documents.
        frequency: sums by frequency.
        outcomes: outcomes and drops by group.
        drawn: tokens that are fitted again.
    """

    sums: DocumentSums
    frequency: FrequencySums
    outcomes: OutcomeSums
    drawn: _DrawnTokens

    @classmethod
    def over(cls, source: FittedRun, scored: ScoredRange, units: Units, chosen: Integers) -> Self:
        """Read all tokens once, by blocks; keep the `chosen` tokens."""
        tokens = source.run.tokens
        groups = token_groups(tokens)
        frequency, outcomes = FrequencySums(tokens, units, scored), OutcomeSums(groups, units)
        kept: list[tuple[SigmoidFits, Floats32]] = []

        def blocks() -> Iterator[TokenBlock]:
            for at, fits, loss_NK in source.blocks():
                frequency.add(at, fits, loss_NK)
                outcomes.add(at, fits, events_of(fits, from_x=scored.from_x, to_x=scored.to_x))
                rows = chosen[(chosen >= at.start) & (chosen < at.stop)] - at.start
                kept.append((fits.rows(rows), loss_NK[rows]))
                yield fits, loss_NK, units.unit_N[at]

        sums = DocumentSums.from_blocks(source.x_K, blocks(), len(units), from_x=scored.from_x)
        drawn = _DrawnTokens(
            chosen,
            SigmoidFits.concatenate([fits for fits, _ in kept]),
            np.concatenate([loss_NK for _, loss_NK in kept]),
            replace(units, unit_N=units.unit_N[chosen]),
            groups.group_N[chosen],
            tokens.dataset_N[chosen],
        )
        return cls(sums, frequency, outcomes, drawn)

    def measured(self, shift_UK: Floats) -> DocumentSums:
        """Return the sums with the common shifts of each unit's tokens in the measured losses.

        The measured mean loss has the shifts, which the fits and their losses are without.
        """
        loss_UK = self.sums.loss_UK + self.sums.tokens_U[:, None] * shift_UK
        return replace(self.sums, loss_UK=loss_UK)


def _left_over(source: FittedRun, sums: DocumentSums, units: Units, seed: int) -> Floats:
    """Draw the common noise that the fitter left in the losses, (B, D, K), in nats."""
    datasets = source.run.tokens.datasets
    shifts = source.fit.common_shifts
    if shifts is None:
        return np.zeros((0, len(datasets), len(source.x_K)))
    of_dataset_DU = np.arange(len(datasets))[:, None] == units.dataset_U
    tokens_D1 = np.maximum(of_dataset_DU @ sums.tokens_U, 1)[:, None]
    mean_DK = of_dataset_DU @ sums.loss_UK / tokens_D1
    rng = np.random.default_rng([seed, 5])
    return draw_left_over(source.x_K, mean_DK, shifts, COMMON_DRAWS, rng)


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
