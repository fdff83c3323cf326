"""The content of axis.json and axis.npz: losses over runs of growing size.

Shapes: K runs by ascending size, G grid points of x, R resamples of the documents (the first is the
data as they are).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_tokscale.core.arrays import Floats
from megatron_tokscale.core.checked import read_typed_result
from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.core.schemas import AXIS_SCHEMA
from megatron_tokscale.results.estimate import Estimate
from megatron_tokscale.results.npz import read_npz
from megatron_tokscale.results.skill import GroupTests
from megatron_tokscale.results.transfer import TransferSettings
from megatron_tokscale.store import Run
from megatron_tokscale.store.reader import Time

type AxisOfRuns = Literal["D", "M"]
"""The axis that runs differ along: D, tokens trained on; M, size of the model."""
type ModelSize = Literal["parameters", "non-embedding", "flops"]
"""The measure of a model's size."""


@dataclass(frozen=True)
class SizedRun:
    """One run on the axis.

    Attributes:
        name: name of the run's directory.
        size: its size, in the unit of the axis.
        loss: its last mean loss, in nats.
    """

    name: str
    size: float
    loss: float


@dataclass(frozen=True)
class AcrossAxes:
    """Test of one run's learning times along T on the falls along this axis.

    Attributes:
        source: name of that run's directory.
        time: the unit that its time is counted in.
        groups: tests by grouping of the tokens, aligned by the mean loss.
    """

    source: str
    time: Time
    groups: GroupTests


@dataclass(frozen=True)
class AxisSummary:
    """The content of axis.json.

    Attributes:
        axis: the axis.
        size: the unit of the sizes.
        probe_fingerprint: fingerprint of the probe set that all runs watch.
        runs: the runs by ascending size.
        documents: number of documents that the intervals are over.
        fall: fall of the mean loss from the smallest run to the largest, in nats.
        falls: fall from each run to the next, in nats.
        across: the test across the axes; None if there was no source.
        settings: settings of `axis_run`.
        arrays_crc32: checksum of axis.npz.
    """

    axis: AxisOfRuns
    size: ModelSize | Literal["tokens"]
    probe_fingerprint: str
    runs: tuple[SizedRun, ...]
    documents: int
    fall: Estimate
    falls: tuple[Estimate, ...]
    across: AcrossAxes | None
    settings: TransferSettings
    arrays_crc32: str


@dataclass(frozen=True)
class AxisArrays:
    """The arrays of axis.npz.

    Attributes:
        x_K: natural logarithm of the size of each run.
        mean_loss_RK: its last mean loss in nats.
        x_G: grid of x.
        measured_RG: measured slope of the mean loss over x, -dL/dx, in nats per unit of x.
    """

    x_K: Floats
    mean_loss_RK: Floats
    x_G: Floats
    measured_RG: Floats


@dataclass(frozen=True)
class AxisResult:
    """The losses over runs of growing size: the content of axis.json and of axis.npz."""

    summary: AxisSummary
    arrays: AxisArrays


def read_axis(run: Run, folder: Path) -> AxisResult:
    """Read the results that `axis_run` wrote into a folder, of runs that watch the tokens of `run`.

    Raises:
        TokscaleError: a file is missing or damaged, of another schema or of another probe set.
    """
    again = "run `megatron-tokscale spectrum --axis D|M RUN ... --out` again"
    summary = read_typed_result(AxisSummary, folder / "axis.json", AXIS_SCHEMA, again)
    if summary.probe_fingerprint != run.tokens.fingerprint:
        raise TokscaleError(
            f"the runs of {folder} watch other tokens than {run.path}; show axes of runs with "
            "the same probe set"
        )
    arrays = read_npz(AxisArrays, folder / "axis.npz", summary.arrays_crc32, again)
    return AxisResult(summary, arrays)
