"""`axis_run`: the spectrum along D or M, from the last losses of several runs with one probe set.

A token's losses over runs of growing size take the place of those over probes. Few runs fix few
parameters, so the tokens share one width, and the runs' noise is independent. Then, across the
axes: do the learning times along T of one run say which groups of tokens gain along this axis?

Shapes: N tokens, K runs by ascending size, U resampling units, R resamples.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from megatron_tokscale import __version__
from megatron_tokscale.arrays import Floats, Floats32
from megatron_tokscale.checked import write_arrays, write_result
from megatron_tokscale.errors import TokscaleError
from megatron_tokscale.fit import SigmoidFits, fit_sigmoids, shared_width
from megatron_tokscale.laws.plain import or_reason
from megatron_tokscale.resampling import Estimate, Units
from megatron_tokscale.results import AXIS_SCHEMA, FittedRun
from megatron_tokscale.spectrum.density import LearningTimeSpectrum
from megatron_tokscale.spectrum.groups import groupings, learning_times
from megatron_tokscale.spectrum.reconstruction import compare
from megatron_tokscale.spectrum.run import class_shares
from megatron_tokscale.spectrum.sums import DocumentSums
from megatron_tokscale.spectrum.transfer import PERMUTATIONS, Alignment, TransferSums
from megatron_tokscale.store import Run, check_same_tokens

LEAST_RUNS = 5
_SIZES = {
    "parameters": "parameters",
    "non-embedding": "non_embedding",
    "flops": "flops_per_token",
}

Axis = Literal["D", "M"]
Size = Literal["parameters", "non-embedding", "flops"]


def axis_run(
    runs: Sequence[Run],
    axis: Axis,
    out: Path,
    *,
    size: Size = "non-embedding",
    source: Run | None = None,
    n_resamples: int = 200,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Spectrum, reconstructions and the test across axes, to OUT/axis.json and axis.npz.

    Args:
        runs: five or more runs with one probe set, in any order, of different sizes.
        axis: "D", tokens that a run was trained on; "M", the size of its model.
        out: folder to write into.
        size: what M is: parameters, non-embedding parameters, or FLOPs per token.
        source: a fitted run whose learning times along T are tested; None for none.
        n_resamples: bootstrap resamples of the documents.
        seed: of the bootstrap and the permutations.
        progress: called with a word on what is done next.

    Returns:
        The content of axis.json.

    Raises:
        TokscaleError: fewer than five runs, other probe sets, sizes that are unknown or the same,
            or no token that has all losses.
    """
    say = progress or (lambda _: None)
    runs, x_K = _ordered(runs, axis, size)
    fitted = None
    if source is not None:
        check_same_tokens([runs[0], source])
        fitted = FittedRun.open(source)
    tokens = runs[0].probe_set
    say("last losses of the runs")
    loss_NK = np.stack([run.read_losses_at(int(run.step_K[-1])) for run in runs], axis=1)
    say("fit over runs")
    width = shared_width(x_K, loss_NK, white_noise=True)
    fits = fit_sigmoids(x_K, loss_NK, width=width, white_noise=True)
    units = Units.of(tokens.domain_N, tokens.document_N, seed)
    weight_RU = units.weights(n_resamples, seed)
    sums = DocumentSums.of(x_K, [(fits, loss_NK, units.unit_N)], len(units))
    whole = sums.resampled(x_K, weight_RU)
    overall = compare(x_K, whole.curves(), whole.loss_RK)
    first_U = units.half(seed)
    model, target = (sums.resampled(x_K, weight_RU * half) for half in (first_U, ~first_U))
    held_out = compare(x_K, model.curves(), target.loss_RK)
    result: dict[str, Any] = {
        "schema_version": AXIS_SCHEMA,
        "version": __version__,
        "axis": axis,
        "size": "tokens" if axis == "D" else size,
        "probe_fingerprint": tokens.fingerprint,
        "runs": [
            {"name": run.path.name, "size": float(np.exp(x)), "loss": float(loss)}
            for run, x, loss in zip(runs, x_K, whole.loss_RK[0], strict=True)
        ],
        "documents": units.documents,
        "shared_width_x": width,
        **Estimate.of(whole.loss_RK[:, 0] - whole.loss_RK[:, -1]).entry("fall"),
        "same_tokens": overall.scores(),
        "other_documents": held_out.scores(),
        "falls": overall.falls(),
        "classes": class_shares(sums, weight_RU),
        "across": None,
        "settings": {"n_resamples": n_resamples, "permutations": PERMUTATIONS, "seed": seed},
    }
    if fitted is not None:
        say(f"learning times along T of {fitted.run.path.name}")
        result["across"] = _across(fitted, fits, loss_NK, whole.loss_RK[0], units, weight_RU, seed)
    spectrum = LearningTimeSpectrum.of_bins(
        x_K, whole.count_RC, whole.drop_RC, int(whole.tokens_R[0])
    )
    arrays = {
        "x_K": x_K,
        "mean_loss_RK": whole.loss_RK,
        "x_G": overall.x_G,
        "density_RG": spectrum.density_G,
        "drop_weighted_RG": spectrum.drop_weighted_G,
        "measured_RG": overall.measured_RG,
        **{f"{name}_G": each.derivative_G for name, each in overall.by_name.items()},
    }
    result["arrays_crc32"] = write_arrays(out / "axis.npz", arrays)
    return write_result(out / "axis.json", result)


def _ordered(runs: Sequence[Run], axis: Axis, size: Size) -> tuple[list[Run], Floats]:
    """The runs by ascending size, and the logarithms of the sizes."""
    if len(runs) < LEAST_RUNS:
        raise TokscaleError(
            f"{len(runs)} runs are too few for a sigmoid over runs, {LEAST_RUNS} are needed"
        )
    check_same_tokens(runs)
    sizes = [_size(run, axis, size) for run in runs]
    order = np.argsort(sizes, kind="stable")
    x_K = np.log(np.array(sizes, dtype=np.float64)[order])
    if (np.diff(x_K) <= 0).any():
        k = int((np.diff(x_K) <= 0).argmax())
        raise TokscaleError(
            f"{runs[order[k]].path} and {runs[order[k + 1]].path} have one size on the axis "
            f"{axis}; leave one out"
        )
    return [runs[i] for i in order], x_K


def _size(run: Run, axis: Axis, size: Size) -> float:
    if not run.records:
        raise TokscaleError(f"{run.path} has no probes")
    if axis == "D" and run.records[-1].consumed_tokens is None:
        raise TokscaleError(
            f"{run.path} does not know how many tokens it has consumed, which the axis D needs; "
            "leave the run out"
        )
    found = run.records[-1].consumed_tokens if axis == "D" else run.info.size.get(_SIZES[size])
    if not found:
        raise TokscaleError(
            f"run.json of {run.path} does not say how large its model is; it was written by an "
            "older version"
            if axis == "M"
            else f"the last probe of {run.path} is before training"
        )
    return float(found)


def _across(
    source: FittedRun,
    own: SigmoidFits,
    loss_NK: Floats32,
    mean_loss_K: Floats,
    units: Units,
    weight_RU: Floats,
    seed: int,
) -> dict[str, Any]:
    """Learning times along T against the losses along this axis, aligned by the mean loss."""
    total_K, count, times = np.zeros(len(source.x_K)), 0, []
    whole_N = own.complete_N
    for at, fits, source_NK in source.blocks():
        both_N = whole_N[at] & fits.complete_N
        total_K += source_NK[both_N].sum(axis=0, dtype=np.float64)
        count += int(both_N.sum())
        times.append(learning_times(fits))
    about = {"source": source.run.path.name, "time": source.time}

    def skills() -> dict[str, Any]:
        alignment = Alignment.by_loss(
            source.x_K, total_K / max(count, 1), own.x_K, mean_loss_K, falls=True
        )
        groups = groupings(source.run.probe_set, np.concatenate(times))
        sums = TransferSums(alignment, groups, units)
        for at, fits, source_NK in source.blocks():
            sums.add(at, fits, loss_NK[at], source_NK, own.rows(at), own.x_K)
        return {"groups": sums.result(weight_RU, seed)}

    return {**about, **or_reason(skills)}
