"""`axis_run`: the loss along D or M, from the last losses of several runs with one probe set.

The mean loss of each run, its fall from run to run and its slope over the axis need no fit. The
test across the axes asks: do the learning times of one run along T predict which groups of tokens
fall along this axis?

Shapes: N tokens, K runs by ascending size, G grid points, U resampling units, R resamples.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_tokscale.core.arrays import Floats, Floats32, Integers32, Mask
from megatron_tokscale.core.checked import write_typed_result
from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.core.progress import NoProgress, Progress
from megatron_tokscale.core.resampling import Units
from megatron_tokscale.core.schemas import AXIS_SCHEMA
from megatron_tokscale.core.seed import DEFAULT_SEED
from megatron_tokscale.core.writable import unwritable
from megatron_tokscale.results import FittedRun
from megatron_tokscale.results.axis import (
    AcrossAxes,
    AxisArrays,
    AxisOfRuns,
    AxisSummary,
    ModelSize,
    SizedRun,
)
from megatron_tokscale.results.estimate import Estimate, defined_or_reason
from megatron_tokscale.results.npz import write_npz
from megatron_tokscale.results.skill import GroupTest
from megatron_tokscale.results.transfer import TransferSettings
from megatron_tokscale.spectrum.density import default_grid
from megatron_tokscale.spectrum.derivative import SlopeEstimator
from megatron_tokscale.spectrum.evidence.transfer import PERMUTATIONS, Alignment, TransferSums
from megatron_tokscale.spectrum.groups import groupings, learning_times
from megatron_tokscale.spectrum.sums import loss_sums
from megatron_tokscale.store import Run, check_same_tokens

LEAST_RUNS = 4
"""The slope over the axis needs four losses (`SlopeEstimator`); the test across axes, three."""

_SIZES = {
    "parameters": "parameters",
    "non-embedding": "non_embedding",
    "flops": "flops_per_token",
}
"""Keys of run.json by the measure of a model's size."""


def axis_run(
    runs: Sequence[Run],
    axis: AxisOfRuns,
    out: Path,
    *,
    size: ModelSize = "non-embedding",
    source: Run | None = None,
    n_resamples: int = 200,
    seed: int = DEFAULT_SEED,
    progress: Progress | None = None,
) -> AxisSummary:
    """Measure the losses over the axis, test across the axes, write OUT/axis.json and OUT/axis.npz.

    A token counts if its last losses are finite in all runs.

    Args:
        runs: four or more runs with one probe set, in any order, of different sizes.
        axis: "D", tokens that a run was trained on; "M", the size of its model.
        out: folder to write into.
        size: the measure of the size on M: parameters, non-embedding parameters, or FLOPs per
            token.
        source: a fitted run whose learning times along T are tested; without one there is no test.
        n_resamples: bootstrap resamples of the documents.
        seed: seed of the bootstrap and the permutations.
        progress: receiver of the name of each stage; None for none.

    Returns:
        The content of axis.json.

    Raises:
        TokscaleError: fewer than four runs, different probe sets, unknown or equal sizes, or no
            token with a finite loss in all runs; or `out` is no folder that this user may write
            to.
    """
    progress = progress or NoProgress()
    if reason := unwritable(out, "axis.json"):
        raise TokscaleError(
            f"{out} cannot be written to ({reason}); expected a folder for the result; choose "
            "another --out"
        )
    runs, x_K = _ordered(runs, axis, size)
    fitted = None
    if source is not None:
        check_same_tokens([runs[0], source])
        fitted = FittedRun.open(source)
    tokens = runs[0].tokens
    progress.stage("last losses of the runs")
    last = _LastLosses.read(runs)
    units = tokens.units(seed)
    weight_RU = units.weights(n_resamples, seed)
    mean_loss_RK = last.means(units.unit_N, weight_RU)
    across = None
    if fitted is not None:
        progress.stage(f"learning times along T of {fitted.run.path.name}")
        across = _across(fitted, x_K, last, mean_loss_RK[0], units, weight_RU, seed)
    x_G = default_grid(x_K)
    measured_RG = SlopeEstimator.from_curve(x_K, mean_loss_RK[0]).slopes(mean_loss_RK, x_G)
    checksum = write_npz(out / "axis.npz", AxisArrays(x_K, mean_loss_RK, x_G, measured_RG))
    summary = AxisSummary(
        axis=axis,
        size="tokens" if axis == "D" else size,
        probe_fingerprint=tokens.fingerprint,
        runs=tuple(
            SizedRun(run.path.name, float(np.exp(x)), float(loss))
            for run, x, loss in zip(runs, x_K, mean_loss_RK[0], strict=True)
        ),
        documents=units.documents,
        fall=Estimate.from_resamples(mean_loss_RK[:, 0] - mean_loss_RK[:, -1]),
        falls=tuple(
            Estimate.from_resamples(mean_loss_RK[:, k] - mean_loss_RK[:, k + 1])
            for k in range(len(runs) - 1)
        ),
        across=across,
        settings=TransferSettings(n_resamples, PERMUTATIONS, seed),
        arrays_crc32=checksum,
    )
    write_typed_result(out / "axis.json", AXIS_SCHEMA, summary)
    return summary


def _ordered(runs: Sequence[Run], axis: AxisOfRuns, size: ModelSize) -> tuple[list[Run], Floats]:
    """Return the runs by ascending size, and the logarithms of the sizes."""
    if len(runs) < LEAST_RUNS:
        raise TokscaleError(
            f"{len(runs)} runs are too few for a slope over the axis; expected {LEAST_RUNS} or more"
        )
    check_same_tokens(runs)
    sizes = [_size(run, axis, size) for run in runs]
    order = np.argsort(sizes, kind="stable")
    x_K = np.log(np.array(sizes, dtype=np.float64)[order])
    if (np.diff(x_K) <= 0).any():
        k = int((np.diff(x_K) <= 0).argmax())
        raise TokscaleError(
            f"{runs[order[k]].path} and {runs[order[k + 1]].path} have the same size on the "
            f"axis {axis}; leave one out"
        )
    return [runs[i] for i in order], x_K


def _size(run: Run, axis: AxisOfRuns, size: ModelSize) -> float:
    """Return the size of a run on the axis."""
    if not run.records:
        raise TokscaleError(f"{run.path} has no probes; train it, or leave it out")
    if axis == "D" and run.records[-1].consumed_tokens is None:
        raise TokscaleError(
            f"{run.path} has no record of its consumed tokens, which the axis D needs; "
            "leave the run out"
        )
    found = run.records[-1].consumed_tokens if axis == "D" else run.info.size.get(_SIZES[size])
    if not found:
        raise TokscaleError(
            f"run.json of {run.path} does not say how large its model is: an older version wrote "
            "it; leave the run out"
            if axis == "M"
            else f"the last probe of {run.path} is before training; train on, or leave the run out"
        )
    return float(found)


@dataclass(frozen=True)
class _LastLosses:
    """Last losses of all tokens in every run.

    Attributes:
        loss_NK: the losses in nats.
        whole_N: mask of the tokens with a finite loss in all runs.
    """

    loss_NK: Floats32
    whole_N: Mask

    @classmethod
    def read(cls, runs: Sequence[Run]) -> "_LastLosses":
        """Read the last losses of the runs.

        Raises:
            TokscaleError: no token has a finite loss in all runs.
        """
        loss_NK = np.stack([run.read_losses_at(int(run.step_K[-1])) for run in runs], axis=1)
        whole_N = np.isfinite(loss_NK).all(axis=1)
        if not whole_N.any():
            raise TokscaleError(
                f"no token has a finite last loss in all {len(runs)} runs; leave out the runs that "
                "have diverged"
            )
        return cls(loss_NK, whole_N)

    def means(self, unit_N: Integers32, weight_RU: Floats) -> Floats:
        """Return the mean loss of each run under each row of weights, (R, K) in nats."""
        n_units, unit_N = weight_RU.shape[1], unit_N[self.whole_N]
        tokens_U = np.bincount(unit_N, minlength=n_units).astype(np.float64)
        loss_UK = loss_sums(self.loss_NK[self.whole_N], unit_N, n_units)
        with np.errstate(invalid="ignore"):
            return np.asarray(weight_RU @ loss_UK / (weight_RU @ tokens_U)[:, None])


def _across(
    source: FittedRun,
    x_K: Floats,
    last: _LastLosses,
    mean_loss_K: Floats,
    units: Units,
    weight_RU: Floats,
    seed: int,
) -> AcrossAxes:
    """Test learning times along T on the losses of this axis, aligned by the mean loss."""
    # The source's mean loss over the tokens that count on both axes, and its learning times.
    total_K, count, times = np.zeros(len(source.x_K)), 0, []
    for at, fits, source_NK in source.blocks():
        both_N = last.whole_N[at] & fits.complete_N
        total_K += source_NK[both_N].sum(axis=0, dtype=np.float64)
        count += int(both_N.sum())
        times.append(learning_times(fits))

    def tests() -> dict[str, GroupTest]:
        alignment = Alignment.by_loss(
            source.x_K, total_K / max(count, 1), x_K, mean_loss_K, falls=True
        )
        groups = groupings(source.run.tokens, np.concatenate(times))
        sums = TransferSums(alignment, groups, units)
        for at, fits, source_NK in source.blocks():
            sums.add(at, fits, last.loss_NK[at], source_NK)
        return sums.tests(weight_RU, seed)

    return AcrossAxes(source.run.path.name, source.time, defined_or_reason(tests))
