"""The content of matrix.json and matrix.npz: losses of several runs along D or M, without a fit.

Shapes: N tokens, V distinct values of the axis, ascending.
"""

from dataclasses import dataclass

from megatron_tokscale.core.arrays import Floats
from megatron_tokscale.core.checked import read_typed_result
from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.core.resampling import UnitKind
from megatron_tokscale.core.schemas import MATRIX_SCHEMA
from megatron_tokscale.results.estimate import Estimate
from megatron_tokscale.results.npz import read_npz
from megatron_tokscale.store import Run
from megatron_tokscale.store.imported import Axis


@dataclass(frozen=True)
class ValueOfAxis:
    """The runs at one value of the axis.

    Attributes:
        value: the value.
        runs: number of runs (columns) that have it.
        loss: their mean loss, in nats.
        learned: share of the tokens that are learned at this value or a smaller one.
    """

    value: float
    runs: int
    loss: Estimate
    learned: Estimate


@dataclass(frozen=True)
class GroupOfMatrix:
    """A group of tokens.

    Attributes:
        grouping: what the tokens are grouped by.
        name: name of the group.
        tokens: number of its tokens.
        fall: fall of its mean loss from the smallest value to the largest, in nats.
        learned: share of its tokens that are learned by the largest value.
    """

    grouping: str
    name: str
    tokens: int
    fall: Estimate
    learned: Estimate


@dataclass(frozen=True)
class MatrixSummary:
    """The content of matrix.json.

    Attributes:
        run_id: id of the run.
        losses_crc32: checksum of the losses of each column.
        axis: the axis, D or M.
        unit: unit of its values; None if it is not known.
        n_tokens: tokens whose losses are finite in every column.
        left_out: tokens with a loss that is NaN or infinite.
        threshold: loss in nats at or below which a token counts as learned.
        values: the runs by ascending value.
        fall: fall of the mean loss from the smallest value to the largest, in nats.
        groups: the groups of tokens, by every column that is known.
        unit_kind: what the intervals resample.
        n_units: number of these units.
        n_resamples: bootstrap resamples.
        seed: seed of the resamples.
        arrays_crc32: checksum of matrix.npz.
    """

    run_id: str
    losses_crc32: tuple[str, ...]
    axis: Axis
    unit: str | None
    n_tokens: int
    left_out: int
    threshold: float
    values: tuple[ValueOfAxis, ...]
    fall: Estimate
    groups: tuple[GroupOfMatrix, ...]
    unit_kind: UnitKind
    n_units: int
    n_resamples: int
    seed: int
    arrays_crc32: str


@dataclass(frozen=True)
class MatrixArrays:
    """The arrays of matrix.npz.

    Attributes:
        time_N: smallest value of the axis at which each token is learned; infinity for a token that
            is not learned by the largest, NaN for one with a loss that is not finite.
        value_V: the distinct values of the axis.
    """

    time_N: Floats
    value_V: Floats


@dataclass(frozen=True)
class MatrixResult:
    """The content of matrix.json and of matrix.npz."""

    summary: MatrixSummary
    arrays: MatrixArrays


def read_matrix(run: Run) -> MatrixResult:
    """Read the results that `matrix_run` wrote, if they are of the losses that the run has now.

    Raises:
        TokscaleError: a file is missing or damaged, of another schema or of other losses.
    """
    again = f"run `megatron-tokscale spectrum {run.path}` again"
    summary = read_typed_result(MatrixSummary, run.paths.matrix, MATRIX_SCHEMA, again)
    if summary.losses_crc32 != tuple(run.checksums().values()):
        raise TokscaleError(f"{run.paths.matrix} is of other losses than the run has now; {again}")
    arrays = read_npz(MatrixArrays, run.paths.matrix_arrays, summary.arrays_crc32, again)
    return MatrixResult(summary, arrays)
