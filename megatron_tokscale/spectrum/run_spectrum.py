"""`spectrum_run`: from a run's fits to spectrum.npz, spectrum.json and reconstruction.json.

Shapes: N tokens, K probe steps, G grid points, D datasets, C bins, U resampling units, R resamples
(the first is the data as they are), J classes, F groups of tokens by frequency.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_tokscale import __version__
from megatron_tokscale.core.arrays import Floats, Floats32, Integers
from megatron_tokscale.core.checked import write_arrays, write_result
from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.core.resampling import Units
from megatron_tokscale.core.schemas import SPECTRUM_SCHEMA
from megatron_tokscale.fit import SigmoidFits
from megatron_tokscale.laws.plain import or_reason, plain
from megatron_tokscale.results import FittedRun, heading, non_finite
from megatron_tokscale.results.estimate import Estimate
from megatron_tokscale.results.fitted import Block
from megatron_tokscale.spectrum.density import Bins, LearningTimeSpectrum
from megatron_tokscale.spectrum.derivative import derivative_weights, measured_derivative
from megatron_tokscale.spectrum.evidence.forward import predict_forward
from megatron_tokscale.spectrum.evidence.locality import Widths
from megatron_tokscale.spectrum.evidence.reconstruction import Comparison, compare
from megatron_tokscale.spectrum.frequency import FrequencySums
from megatron_tokscale.spectrum.groups import groupings
from megatron_tokscale.spectrum.sums import CLASSES, DocumentSums, Resampled
from megatron_tokscale.store import Run

_HELD_OUT_NOTE = (
    "Fitted on one half of the documents, measured on the other half of the same run. The mean "
    "curves of the halves agree, so this is nearly algebra: low would be news, high is not."
)


def spectrum_run(
    run: Run,
    *,
    n_resamples: int = 200,
    null_tokens: int = 20_000,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Spectra, measured derivative and reconstructions of a fitted run, into RUN/analysis.

    Writes spectrum.npz (arrays), spectrum.json (what they are) and reconstruction.json (how well
    the fits reconstruct the measured derivative; the widths of the transitions beside their null;
    what a fit of the first part says of the last factor of two).
    Every number has a 95% interval over documents. The tokens are read once, by blocks.

    Args:
        run: an opened run with RUN/analysis/fits.parquet.
        n_resamples: bootstrap resamples of the documents.
        null_tokens: tokens (drawn by `seed`) that are fitted again, as mean-curve tokens and on the
            first part of the run.
        seed: of the draws, of the null's noise, of the split of documents and of the bootstrap.
        progress: called with a word on what is done next.

    Returns:
        The content of reconstruction.json.

    Raises:
        TokscaleError: the run is not fitted, was fitted on other probes, has no token that is
            fitted at all probes, or too few probes.
    """
    say = progress or (lambda _: None)
    source = FittedRun.open(run)
    source.check_complete()
    tokens = run.probe_set
    units = Units.from_documents(tokens.dataset_N, tokens.document_N, seed)
    weight_RU = units.weights(n_resamples, seed)
    sample = drawn(run.n_tokens, null_tokens, seed)
    say("sums over the documents")
    kept: list[tuple[SigmoidFits, Floats32]] = []
    frequency = FrequencySums(tokens, units)
    blocks = _keeping(source.blocks(), sample, kept, frequency)
    sums = DocumentSums.from_blocks(
        source.x_K, ((fits, loss_NK, units.unit_N[at]) for at, fits, loss_NK in blocks), len(units)
    )
    say("reconstructions")
    whole = sums.resampled(source.x_K, weight_RU)
    if not np.ptp(whole.loss_RK[0]) > 0:
        raise TokscaleError(
            f"the mean loss of {run.path} is the same at all probes; a spectrum needs one that "
            "changes; train on"
        )
    overall = compare(source.x_K, whole.curves(), whole.loss_RK)
    first_U = units.half(seed)
    model, target = (
        sums.resampled(source.x_K, weight_RU * half_U) for half_U in (first_U, ~first_U)
    )
    held_out = compare(source.x_K, model.curves(), target.loss_RK)
    say("widths and their null")
    sample_fits = SigmoidFits.concatenate([fits for fits, _ in kept])
    sample_NK = np.concatenate([loss_NK for _, loss_NK in kept])
    sample_units = replace(units, unit_N=units.unit_N[sample])
    widths = Widths.from_fits(sample_fits, sample_NK, sample_units.unit_N, seed)
    say("forward in time")
    finite_N = np.isfinite(sample_NK).all(axis=1)
    forward = or_reason(
        lambda: predict_forward(
            source.x_K,
            sample_NK[finite_N],
            replace(sample_units, unit_N=sample_units.unit_N[finite_N]),
            {name: each.rows(sample[finite_N]) for name, each in groupings(tokens).items()},
            weight_RU,
            seed,
        )
    )
    arrays, about = _spectra(run, source.x_K, sums, units.dataset_U, weight_RU, overall)
    arrays |= (
        widths.histograms()
        | frequency.arrays(weight_RU)
        | {
            "step_K": run.step_K,
            "half_measured_G": held_out.measured_G,
            **{f"half_{name}_G": r.derivative_G for name, r in held_out.by_name.items()},
        }
    )
    # All that can be refused comes before the first file is written.
    evidence = {
        "documents": units.documents,
        "non_finite": non_finite(source.fit),
        "same_tokens": overall.scores(),
        "other_documents": {**held_out.scores(), "note": _HELD_OUT_NOTE},
        "falls": overall.falls(),
        "fall_before_first_finite_probe": _fall_before(source.x_K, whole.loss_RK),
        "classes": class_shares(sums, weight_RU),
        "widths": widths.result(weight_RU),
        "forward": forward,
        "settings": {"n_resamples": n_resamples, "null_tokens": len(sample), "seed": seed},
    }
    about, evidence = plain(about), plain(evidence)
    made_of = {
        "schema_version": SPECTRUM_SCHEMA,
        "version": __version__,
        **heading(source.fit),
        "arrays_crc32": write_arrays(run.paths.spectrum_arrays, arrays),
    }
    write_result(run.paths.spectrum, {**made_of, **about})
    return write_result(run.paths.reconstruction, {**made_of, **evidence})


def drawn(n_tokens: int, count: int, seed: int) -> Integers:
    """At most `count` tokens, ascending."""
    if n_tokens <= count:
        return np.arange(n_tokens)
    chosen = np.random.default_rng(seed).choice(n_tokens, count, replace=False)
    return np.sort(chosen)


def _keeping(
    blocks: Iterator[Block],
    sample: Integers,
    kept: list[Any],
    frequency: FrequencySums,
) -> Iterator[Block]:
    """Pass the blocks on, keep the sampled tokens of each, and sum by frequency."""
    for at, fits, loss_NK in blocks:
        frequency.add(at, fits, loss_NK)
        rows = sample[(sample >= at.start) & (sample < at.stop)] - at.start
        kept.append((fits.rows(rows), loss_NK[rows]))
        yield at, fits, loss_NK


def _spectra(
    run: Run,
    x_K: Floats,
    sums: DocumentSums,
    dataset_U: NDArray[np.int16],
    weight_RU: Floats,
    overall: Comparison,
) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    """The arrays of spectrum.npz and what spectrum.json says of them."""
    datasets = run.probe_set.datasets
    whole = sums.resampled(x_K, weight_RU)
    parts = [sums.resampled(x_K, weight_RU * (dataset_U == d)) for d in range(len(datasets))]
    spectra = [_spectrum(each) for each in (whole, *parts)]
    weights_KG = derivative_weights(x_K, overall.x_G).T
    density, drop_weighted = spectra[0].density_G, spectra[0].drop_weighted_G
    measured_DRG = np.stack([np.nan_to_num(part.loss_RK) @ weights_KG for part in parts])
    arrays: dict[str, NDArray[Any]] = {
        "x_K": x_K,
        "x_G": overall.x_G,
        "mean_loss_K": whole.loss_RK[0],
        "mean_loss_RK": whole.loss_RK,
        "density_G": density[0],
        "density_interval_2G": _band(density),
        "drop_weighted_G": drop_weighted[0],
        "drop_weighted_interval_2G": _band(drop_weighted),
        "x_C": Bins.over(x_K).x_C,
        "drop_RC": whole.drop_RC.astype(np.float32),
        "measured_G": overall.measured_G,
        "measured_se_G": measured_derivative(x_K, whole.loss_RK[0], overall.x_G)[1],
        "measured_interval_2G": _band(overall.measured_RG),
        **{f"{name}_G": r.derivative_G for name, r in overall.by_name.items()},
        "mean_loss_DK": np.stack([part.loss_RK[0] for part in parts]),
        "mean_loss_RDK": np.stack([part.loss_RK for part in parts], axis=1),
        "density_DG": np.stack([each.density_G[0] for each in spectra[1:]]),
        "drop_weighted_DG": np.stack([each.drop_weighted_G[0] for each in spectra[1:]]),
        "measured_DG": measured_DRG[:, 0],
        "measured_interval_D2G": np.stack([_band(part_RG) for part_RG in measured_DRG]),
    }
    about = {
        "units": {
            "x": "natural logarithm of time; -inf at step 0",
            "density": "events per unit of x, integrates to one",
            "drop_weighted": "nats per unit of x, mean over all fitted tokens",
            "measured": "-dL/dx, nats per unit of x",
            "interval": "95%, over documents",
        },
        "n_tokens": spectra[0].n_tokens,
        "n_events": spectra[0].n_events,
        **Estimate.from_resamples(whole.drop_RC.sum(axis=1), least=0).entry(
            "drop_of_events_nats_per_token"
        ),
        **Estimate.from_resamples(whole.loss_RK[:, 0] - whole.loss_RK[:, -1]).entry(
            "fall_nats_per_token"
        ),
        "bandwidth_x": spectra[0].bandwidth,
        **Estimate.from_resamples(whole.width_R, least=0).entry("common_width_x"),
        "datasets": [
            {"name": name, "n_tokens": each.n_tokens, "n_events": each.n_events}
            for name, each in zip(datasets, spectra[1:], strict=True)
        ],
    }
    return arrays, about


def _spectrum(part: Resampled) -> LearningTimeSpectrum:
    """The spectrum of every resample; the arrays have a leading R."""
    count_RC, drop_RC = np.nan_to_num(part.count_RC), np.nan_to_num(part.drop_RC)
    return LearningTimeSpectrum.from_bins(part.x_K, count_RC, drop_RC, int(part.tokens_R[0]))


def _band(value_RG: Floats) -> Floats:
    """2.5% and 97.5% of the resamples."""
    if len(value_RG) < 2:
        return np.full((2, value_RG.shape[1]), np.nan)
    return np.asarray(np.quantile(value_RG[1:], [0.025, 0.975], axis=0))


def class_shares(sums: DocumentSums, weight_RU: Floats) -> dict[str, Any]:
    """Share of the tokens, and of the whole fall, by class."""
    class_RJ, fall_RJ = weight_RU @ sums.class_UJ, weight_RU @ sums.fall_UJ
    with np.errstate(divide="ignore", invalid="ignore"):
        share_RJ = class_RJ / class_RJ.sum(axis=1, keepdims=True)
        fall_share_RJ = fall_RJ / fall_RJ.sum(axis=1, keepdims=True)
    return {
        each.label: Estimate.from_resamples(share_RJ[:, j], 0, 1).entry("share")
        | Estimate.from_resamples(fall_share_RJ[:, j]).entry("fall_share")
        for j, each in enumerate(CLASSES)
    }


def _fall_before(x_K: Floats, loss_RK: Floats) -> dict[str, Any] | None:
    """Mean loss at step 0 minus that at the first finite probe: a fall that is on no axis."""
    first = int(np.isfinite(x_K).argmax())
    return (
        Estimate.from_resamples(loss_RK[:, 0] - loss_RK[:, first]).entry("nats") if first else None
    )
