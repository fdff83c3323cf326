"""`matrix_run`: tokens learned, times to a threshold and falls of a matrix along D or M.

Along D or M every column is another run. No curve is fitted; a token is learned where its isotonic
losses are low enough (`isotonic.py`).

Shapes: N tokens, n tokens of a block, K columns, V distinct values of the axis, U resampling units,
R resamples (the first is the data as they are), G groups, C cells (pairs of a unit and a group).
"""

import math
from dataclasses import dataclass
from typing import Final

import numpy as np

from megatron_tokscale.core.arrays import Floats, Integers, Integers32
from megatron_tokscale.core.checked import write_typed_result
from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.core.progress import NoProgress, Progress
from megatron_tokscale.core.resampling import Units
from megatron_tokscale.core.schemas import MATRIX_SCHEMA
from megatron_tokscale.core.seed import DEFAULT_SEED
from megatron_tokscale.results.estimate import Estimate
from megatron_tokscale.results.matrix import (
    GroupOfMatrix,
    MatrixArrays,
    MatrixResult,
    MatrixSummary,
    ValueOfAxis,
)
from megatron_tokscale.results.npz import write_npz
from megatron_tokscale.spectrum.groups import Groups, groupings
from megatron_tokscale.spectrum.isotonic import threshold_times
from megatron_tokscale.spectrum.sums import loss_sums
from megatron_tokscale.store import Run
from megatron_tokscale.store.imported import Imported

THRESHOLD: Final = math.log(2)
"""Loss in nats at or below which a token counts as learned: the model gives it a probability of at
least one half. Our choice."""
_COUNT, _FIRST, _LAST, _LEARNED = range(4)  # rows of a group's sums


def matrix_run(
    run: Run,
    *,
    threshold: float = THRESHOLD,
    n_resamples: int = 200,
    seed: int = DEFAULT_SEED,
    progress: Progress | None = None,
) -> MatrixResult:
    """Write, per token, learned or not and the value of the threshold; and falls by group.

    The losses are read once, by blocks. RUN/analysis/matrix.npz has a number per token, matrix.json
    the shares and falls with 95% intervals over the resampling units.

    Args:
        run: an imported run along D or M with two or more distinct values.
        threshold: loss in nats at or below which a token is learned.
        n_resamples: bootstrap resamples.
        seed: seed of the bootstrap.
        progress: receiver of the name of each stage; None for none.

    Raises:
        TokscaleError: the run is not along D or M, has one value alone, no token with finite
            losses in all columns, or a damaged losses file.
    """
    progress = progress or NoProgress()
    imported = _checked(run)
    run.verify()
    units = run.tokens.units(seed)
    progress.stage("learned or not, and falls by group")
    sums = _Sums.of(run, units, threshold)
    if not sums.token_U.sum():
        raise TokscaleError(
            f"no token of {run.path} has finite losses in all {len(run.records)} columns; leave "
            "out the runs that have diverged"
        )
    weight_RU = units.weights(n_resamples, seed)
    checksum = write_npz(run.paths.matrix_arrays, sums.arrays)
    summary = MatrixSummary(
        run_id=run.info.run_id,
        losses_crc32=tuple(run.checksums().values()),
        axis=imported.axis,
        unit=imported.unit,
        n_tokens=int(sums.token_U.sum()),
        left_out=run.n_tokens - int(sums.token_U.sum()),
        threshold=threshold,
        values=sums.values(run.time_K(), weight_RU),
        fall=_estimate(weight_RU @ (sums.loss_UV[:, 0] - sums.loss_UV[:, -1]), sums, weight_RU),
        groups=sums.groups(weight_RU),
        unit_kind=units.kind,
        n_units=units.documents,
        n_resamples=n_resamples,
        seed=seed,
        arrays_crc32=checksum,
    )
    write_typed_result(run.paths.matrix, MATRIX_SCHEMA, summary)
    return MatrixResult(summary, sums.arrays)


def _checked(run: Run) -> Imported:
    imported = run.imported
    if imported is None or imported.axis == "T":
        raise TokscaleError(
            f"{run.path} is one run over time; expected an imported matrix along D or M; run "
            f"`megatron-tokscale fit {run.path}`"
        )
    if len(np.unique(run.time_K())) < 2:
        raise TokscaleError(
            f"{run.path} has one value of {imported.axis}; expected two or more; import more runs"
        )
    return imported


def _estimate(total_R: Floats, sums: "_Sums", weight_RU: Floats) -> Estimate:
    """Return the mean over tokens of a sum, with its interval."""
    with np.errstate(invalid="ignore"):
        return Estimate.from_resamples(total_R / (weight_RU @ sums.token_U))


@dataclass(frozen=True)
class _Sums:
    """Sums over the tokens with finite losses, by resampling unit.

    Attributes:
        token_U: number of tokens.
        loss_UV: sums of the mean losses at each value.
        learned_UV: number of tokens that are learned at this value or a smaller one.
        by_grouping: groups, and (4, U, G) sums: tokens, first and last losses, learned tokens.
        arrays: the values of the threshold.
    """

    token_U: Floats
    loss_UV: Floats
    learned_UV: Floats
    by_grouping: dict[str, tuple[Groups, Floats]]
    arrays: MatrixArrays

    @classmethod
    def of(cls, run: Run, units: Units, threshold: float) -> "_Sums":
        """Read the losses of a run by blocks."""
        value_K = run.time_K()
        value_V, first_V, count_V = np.unique(value_K, return_index=True, return_counts=True)
        n_units = len(units)
        sums = cls(
            token_U=np.zeros(n_units),
            loss_UV=np.zeros((n_units, len(value_V))),
            learned_UV=np.zeros((n_units, len(value_V))),
            by_grouping={
                name: (groups, np.zeros((4, n_units, len(groups.names))))
                for name, groups in groupings(run.tokens).items()
            },
            arrays=MatrixArrays(np.full(run.n_tokens, np.nan), value_V),
        )
        for token_n, loss_nK in run.finite_blocks():
            time_n = threshold_times(value_K, loss_nK, threshold)
            loss_nV = np.add.reduceat(loss_nK.astype(np.float64), first_V, axis=1) / count_V
            sums.arrays.time_N[token_n] = time_n
            sums._add(units.unit_N[token_n], token_n, loss_nV, time_n)
        return sums

    def _add(self, unit_n: Integers32, token_n: Integers, loss_nV: Floats, time_n: Floats) -> None:
        """Add a block of tokens."""
        n_units = len(self.token_U)
        learned_nV = (time_n[:, None] <= self.arrays.value_V).astype(np.float64)
        self.token_U[:] += np.bincount(unit_n, minlength=n_units)
        self.loss_UV[:] += loss_sums(loss_nV, unit_n, n_units)
        self.learned_UV[:] += loss_sums(learned_nV, unit_n, n_units)
        rows = [np.ones(len(unit_n)), loss_nV[:, 0], loss_nV[:, -1], np.isfinite(time_n)]
        row_n4 = np.stack(rows, axis=1).astype(np.float64)
        for groups, sum_4UG in self.by_grouping.values():
            n_groups = len(groups.names)
            cell_n = unit_n.astype(np.int64) * n_groups + groups.group_N[token_n]
            total_C4 = loss_sums(row_n4, cell_n, n_units * n_groups)
            sum_4UG[:] += total_C4.T.reshape(sum_4UG.shape)

    def values(self, value_K: Floats, weight_RU: Floats) -> tuple[ValueOfAxis, ...]:
        """Return mean loss and share of learned tokens at every value."""
        _, count_V = np.unique(value_K, return_counts=True)
        return tuple(
            ValueOfAxis(
                value=float(value),
                runs=int(count_V[v]),
                loss=_estimate(weight_RU @ self.loss_UV[:, v], self, weight_RU),
                learned=_share(weight_RU @ self.learned_UV[:, v], weight_RU @ self.token_U),
            )
            for v, value in enumerate(self.arrays.value_V)
        )

    def groups(self, weight_RU: Floats) -> tuple[GroupOfMatrix, ...]:
        """Return fall and share of learned tokens of every group that has tokens."""
        found = []
        for grouping, (groups, sum_4UG) in self.by_grouping.items():
            for g, name in enumerate(groups.names):
                total_4R = np.stack([weight_RU @ sum_UG[:, g] for sum_UG in sum_4UG])
                if not total_4R[_COUNT, 0]:
                    continue
                with np.errstate(invalid="ignore", divide="ignore"):
                    fall_R = (total_4R[_FIRST] - total_4R[_LAST]) / total_4R[_COUNT]
                found.append(
                    GroupOfMatrix(
                        grouping=grouping,
                        name=name,
                        tokens=int(sum_4UG[_COUNT, :, g].sum()),
                        fall=Estimate.from_resamples(fall_R),
                        learned=_share(total_4R[_LEARNED], total_4R[_COUNT]),
                    )
                )
        return tuple(found)


def _share(part_R: Floats, whole_R: Floats) -> Estimate:
    with np.errstate(invalid="ignore", divide="ignore"):
        return Estimate.from_resamples(part_R / whole_R, 0, 1)
