"""`spectrum_run`: from a run's fits to spectrum.npz, spectrum.json and reconstruction.json.

Shapes: N tokens, K probe steps, G grid points, D datasets, C bins.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_tokscale import __version__
from megatron_tokscale.errors import TokscaleError
from megatron_tokscale.files import whole_or_absent, write_json
from megatron_tokscale.fit import SigmoidFits, fits_path, read_metadata
from megatron_tokscale.spectrum.density import Array, Events, LearningTimeSpectrum, default_grid
from megatron_tokscale.spectrum.derivative import measured_derivative
from megatron_tokscale.spectrum.reconstruction import Comparison, full_derivative, reconstruct
from megatron_tokscale.spectrum.widths import (
    mean_curve_fits,
    transition_widths,
    width_edges,
    width_histogram,
)
from megatron_tokscale.store import Run

SCHEMA_VERSION = 1
_VALUES_PER_READ = 2**24
_HELD_OUT_NOTE = (
    "Fitted on one half of the documents, measured on the other half of the same run. The mean "
    "curves of the halves agree, so this is nearly algebra: low would be news, high is not."
)


def spectrum_run(
    run: Run,
    *,
    null_tokens: int = 20_000,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Spectra, measured derivative and reconstructions of a fitted run, into RUN/analysis.

    Writes spectrum.npz (arrays), spectrum.json (what they are) and reconstruction.json (how well
    the fits reconstruct the measured derivative; the widths of the transitions beside their null).

    Args:
        run: an opened run with RUN/analysis/fits.parquet.
        null_tokens: tokens (drawn by `seed`) on which widths and their null are compared.
        seed: of the draw, of the null's noise and of the split of documents into halves.
        progress: called with a word on what is done next.

    Returns:
        The content of reconstruction.json.

    Raises:
        TokscaleError: the run is not fitted, or was fitted on other probes.
    """
    say = progress or (lambda _: None)
    fits, time = _load_fits(run)
    say("mean loss curves")
    half_N = document_half(run.probe_set.domain_N, run.probe_set.document_N, seed)
    sample = _draw(run.n_tokens, null_tokens, seed)
    means, loss_NK = _read_once(run, half_N, sample)
    say("reconstructions")
    overall = reconstruct(fits, means.overall())
    held_out = reconstruct(fits, means.of_half(1), tokens_N=half_N == 0)
    say("widths and their null")
    observed = fits.rows(sample)
    null, null_NK = mean_curve_fits(observed, loss_NK, seed)
    edges_C = width_edges(fits.x_K)

    arrays, about = _spectra(run, fits, means, overall)
    arrays |= {
        "step_K": run.step_K,
        "half_measured_G": held_out.measured_G,
        **{f"half_{name}_G": r.derivative_G for name, r in held_out.by_name.items()},
        "width_edges_C": edges_C,
        "width_observed_C": width_histogram(observed, edges_C),
        "width_null_C": width_histogram(null, edges_C),
    }
    heading = {
        "schema_version": SCHEMA_VERSION,
        "version": __version__,
        "time": time,
        "probe_fingerprint": run.probe_set.fingerprint,
    }
    result = {
        **heading,
        "same_tokens": _scores(overall),
        "other_documents": {**_scores(held_out), "note": _HELD_OUT_NOTE},
        "fall_before_first_finite_probe": _fall_before(fits.x_K, means.overall()),
        "widths": {
            "observed": transition_widths(observed, loss_NK),
            "mean_curve_null": transition_widths(null, null_NK),
        },
        "settings": {"null_tokens": len(sample), "seed": seed},
    }
    with whole_or_absent(run.analysis / "spectrum.npz") as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, **arrays)
    write_json(run.analysis / "spectrum.json", {**heading, **about})
    write_json(run.analysis / "reconstruction.json", result)
    return result


def document_half(
    domain_N: NDArray[np.integer[Any]], document_N: NDArray[np.integer[Any]], seed: int
) -> NDArray[np.int8]:
    """0 or 1 per token by a keyed hash (splitmix64) of its (domain, document)."""
    with np.errstate(over="ignore"):
        z = document_N.astype(np.uint64) + (domain_N.astype(np.uint64) << np.uint64(40))
        z += np.uint64(seed + 1) * np.uint64(0x9E3779B97F4A7C15)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            z = (z ^ (z >> np.uint64(shift))) * np.uint64(factor)
        z ^= z >> np.uint64(31)
    return (z & np.uint64(1)).astype(np.int8)


@dataclass(frozen=True)
class _Means:
    """Sums of losses at the probes by dataset and half, over the tokens with finite losses."""

    sum_DHK: Array
    tokens_DH: Array

    def overall(self) -> Array:
        return np.asarray(self.sum_DHK.sum(axis=(0, 1)) / max(self.tokens_DH.sum(), 1))

    def of_half(self, half: int) -> Array:
        total_K, tokens = self.sum_DHK[:, half].sum(axis=0), self.tokens_DH[:, half].sum()
        return np.asarray(total_K / max(tokens, 1))

    def by_dataset(self) -> Array:
        tokens_D = self.tokens_DH.sum(axis=1)
        return np.asarray(self.sum_DHK.sum(axis=1) / np.maximum(tokens_D, 1)[:, None])


def _load_fits(run: Run) -> tuple[SigmoidFits, str]:
    path = fits_path(run)
    if not path.is_file():
        raise TokscaleError(f"{path} is not there; run `megatron-tokscale fit {run.path}` first")
    made_of = read_metadata(path)
    if made_of.get("probe_fingerprint") != run.probe_set.fingerprint or (
        made_of.get("steps") != run.step_K.tolist()
    ):
        raise TokscaleError(
            f"{path} was fitted on other probes than the run has now; "
            f"run `megatron-tokscale fit {run.path}` again"
        )
    return SigmoidFits.load(path), str(made_of["time"])


def _draw(n_tokens: int, count: int, seed: int) -> NDArray[np.int64]:
    """At most `count` tokens, ascending."""
    if n_tokens <= count:
        return np.arange(n_tokens)
    chosen = np.random.default_rng(seed).choice(n_tokens, count, replace=False)
    return np.sort(chosen)


def _read_once(
    run: Run, half_N: NDArray[np.int8], sample: NDArray[np.int64]
) -> tuple[_Means, NDArray[np.float32]]:
    """One pass over the losses: the sums per dataset and half, and the sampled tokens' losses."""
    n_domains, n_probes = len(run.probe_set.domains), len(run.records)
    sum_FK, tokens_F = np.zeros((2 * n_domains, n_probes)), np.zeros(2 * n_domains)
    group_N = run.probe_set.domain_N.astype(np.int64) * 2 + half_N
    sampled = []
    block = max(_VALUES_PER_READ // n_probes, 1)
    for start in range(0, run.n_tokens, block):
        loss_NK = run.read_losses(start, min(start + block, run.n_tokens))
        sampled.append(loss_NK[sample[(sample >= start) & (sample < start + block)] - start])
        finite_N = np.isfinite(loss_NK).all(axis=1)
        group = group_N[start : start + block][finite_N]
        for f in np.unique(group):
            sum_FK[f] += loss_NK[finite_N][group == f].sum(axis=0, dtype=np.float64)
        tokens_F += np.bincount(group, minlength=2 * n_domains)
    means = _Means(sum_FK.reshape(n_domains, 2, n_probes), tokens_F.reshape(n_domains, 2))
    return means, np.concatenate(sampled)


def _spectra(
    run: Run, fits: SigmoidFits, means: _Means, overall: Comparison
) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    """The arrays of spectrum.npz and what spectrum.json says of them."""
    x_G = default_grid(fits.x_K)
    whole = LearningTimeSpectrum.of(fits)
    domain_N = run.probe_set.domain_N
    parts = [
        LearningTimeSpectrum.of(fits, domain_N == d) for d in range(len(run.probe_set.domains))
    ]
    mean_loss_DK = means.by_dataset()
    measured = [measured_derivative(fits.x_K, mean_K, x_G) for mean_K in mean_loss_DK]
    arrays: dict[str, NDArray[Any]] = {
        "x_K": fits.x_K,
        "mean_loss_K": means.overall(),
        "x_G": x_G,
        "density_G": whole.density_G,
        "drop_weighted_G": whole.drop_weighted_G,
        "measured_G": overall.measured_G,
        "measured_se_G": overall.measured_se_G,
        **{f"{name}_G": r.derivative_G for name, r in overall.by_name.items()},
        "full_exact_G": full_derivative(fits, x_G),
        "mean_loss_DK": mean_loss_DK,
        "density_DG": np.stack([part.density_G for part in parts]),
        "drop_weighted_DG": np.stack([part.drop_weighted_G for part in parts]),
        "measured_DG": np.stack([derivative_G for derivative_G, _ in measured]),
        "measured_se_DG": np.stack([error_G for _, error_G in measured]),
    }
    events = Events.of(fits)
    about = {
        "units": {
            "x": "natural logarithm of time; -inf at step 0",
            "density": "events per unit of x, integrates to one",
            "drop_weighted": "nats per unit of x, mean over all fitted tokens",
            "measured": "-dL/dx, nats per unit of x",
        },
        "n_tokens": whole.n_tokens,
        "n_events": whole.n_events,
        "drop_of_events_nats_per_token": float(events.drop_C.sum() / max(whole.n_tokens, 1)),
        "fall_nats_per_token": float(means.overall()[0] - means.overall()[-1]),
        "bandwidth_x": whole.bandwidth,
        "common_width_x": events.common_width if np.isfinite(events.common_width) else None,
        "domains": [
            {"name": name, "n_tokens": part.n_tokens, "n_events": part.n_events}
            for name, part in zip(run.probe_set.domains, parts, strict=True)
        ],
    }
    return arrays, about


def _scores(comparison: Comparison) -> dict[str, Any]:
    return {
        name: {"r2": _plain(r.r2), "relative_l1": _plain(r.relative_l1)}
        for name, r in comparison.by_name.items()
    }


def _plain(value: float) -> float | None:
    return value if np.isfinite(value) else None


def _fall_before(x_K: Array, mean_loss_K: Array) -> float | None:
    """Mean loss at step 0 minus that at the first finite probe: a fall that is on no axis."""
    first = int(np.isfinite(x_K).argmax())
    return float(mean_loss_K[0] - mean_loss_K[first]) if first else None
