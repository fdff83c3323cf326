"""The content of axis.json and axis.npz: runs of several sizes, and shifts of their clocks.

Shapes: I runs by ascending size, P points (the counted probes of the runs in the shift model), S
places on the clock of the largest run.
"""

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Literal

from megatron_tokscale.core.arrays import Floats, Integers
from megatron_tokscale.core.checked import read_typed_result
from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.core.model_size import ModelSize
from megatron_tokscale.core.resampling import UnitKind
from megatron_tokscale.core.schemas import AXIS_SCHEMA
from megatron_tokscale.results.estimate import Estimate, Undefined
from megatron_tokscale.results.npz import read_npz
from megatron_tokscale.results.verdict import ClaimTest
from megatron_tokscale.store import Run

type AxisOfRuns = Literal["D", "M"]
"""The axis that runs differ along: D, tokens trained on; M, size of the model."""


class Top(StrEnum):
    """Top of the shift model: the loss of a token that is not learned."""

    BEFORE = "the loss before training"
    UNIGRAM = "the loss at the end of the unigram phase"
    FIRST = "the highest loss at a first probe"
    UNKNOWN = "not known"


@dataclass(frozen=True)
class Spread:
    """A number with its 95% intervals over documents, over runs, and over both.

    Attributes:
        documents: interval over other documents; the runs are as they are.
        runs: interval over other runs; the documents are as they are.
        both: interval over both.
    """

    documents: Estimate
    runs: Estimate
    both: Estimate


@dataclass(frozen=True)
class SizedRun:
    """One run on the axis.

    Attributes:
        name: name of the run's directory.
        size: its size, in the unit of the axis.
        loss: its last mean loss, in nats.
        fall: fall from the run before it, in nats; None for the first, and for a trunk whose
            learning rate has not decayed beside branches whose rate has.
        probes: number of its probes that count in the shift model.
    """

    name: str
    size: float
    loss: float
    fall: Estimate | None
    probes: int


@dataclass(frozen=True)
class RunShift:
    """The shift of one run's clock.

    Attributes:
        name: name of the run's directory.
        delta: how much later the run is than the largest one, in ln time; with its interval over
            documents.
        left_out_error: mean absolute error in nats of the run's mean curve, predicted from the
            other runs; NaN where they do not determine the model.
        last_error: predicted minus measured last loss, in nats.
    """

    name: str
    delta: Estimate
    left_out_error: float
    last_error: float


@dataclass(frozen=True)
class LeftOutErrors:
    """Errors of runs that were left out of the fit, in nats: means over runs and their probes.

    Attributes:
        shift_and_floor: the shift model.
        plain_shift: the shift model without a floor.
        additive: Chinchilla's form, E + A N^-a + B t^-b.
        last_r2: R^2 of the last losses by the shift model, with its interval over runs.
    """

    shift_and_floor: float
    plain_shift: float
    additive: float
    last_r2: Estimate


@dataclass(frozen=True)
class GroupGain:
    """The gain of one group of tokens from the smallest run to the largest, by the shift model.

    Attributes:
        name: name of the group.
        share_of_tokens: share of the tokens in the group.
        earlier: part of the gain by the shift, in nats.
        never: part by the floor, in nats.
    """

    name: str
    share_of_tokens: float
    earlier: Estimate
    never: Estimate


@dataclass(frozen=True)
class GroupPrediction:
    """Gains of groups from size, predicted from the largest run alone, and measured.

    Attributes:
        skill: share of the variance between groups, beyond the null model that every group gains
            what the mean gains.
        error: root mean square error of a group's gain beyond the mean's, in nats.
        null_error: the same of the null model.
        groups: gains of the groups.
        test: the claim that the skill is above 0.
    """

    skill: Spread
    error: float
    null_error: float
    groups: tuple[GroupGain, ...]
    test: ClaimTest


@dataclass(frozen=True)
class Shift:
    """The shift model of an axis.

    Attributes:
        top: the top of the model.
        kappa: shift of the clock per unit of ln size.
        floor: what a smaller run never learns, per unit of ln size: with a known top a share of the
            fall, otherwise nats.
        x: the clock at which the gain is divided: the earliest of the runs' last probes.
        gain: fall of the mean loss there from the smallest size to the largest, by the model.
        earlier: part of the gain by the shift, in nats.
        never: part by the floor, in nats.
        share: share of the gain that is learned earlier; NaN unless the whole interval of the gain
            is above 0.
        runs: shifts of the runs, by ascending size.
        seed_noise: standard deviation of delta between runs of one size; NaN without such runs.
        errors: errors of runs that were left out; or why there are none.
        groups: predictions by grouping of the tokens.
        earlier_test: the claim that at least half of the gain is learned earlier.
        left_out_test: the claim that left-out runs are predicted with an R^2 of at least 0.9.
    """

    top: Top
    kappa: Spread
    floor: Spread
    x: float
    gain: Spread
    earlier: Spread
    never: Spread
    share: Spread
    runs: tuple[RunShift, ...]
    seed_noise: float
    errors: LeftOutErrors | Undefined
    groups: dict[str, GroupPrediction]
    earlier_test: ClaimTest
    left_out_test: ClaimTest


@dataclass(frozen=True)
class SameClock:
    """The last loss of one run against the curve of another, the reference, in nats.

    Attributes:
        name: name of the run's directory.
        branch_step: step of the trunk at which the run branches off; None for a run of its own.
        loss: its last mean loss.
        at_clock: loss of the reference at the same clock, minus `loss`: the annealing gain of a
            branch; NaN where the reference has no probes.
        at_step: loss of the reference at the same step, minus `loss`.
    """

    name: str
    branch_step: int | None
    loss: float
    at_clock: Estimate
    at_step: Estimate


@dataclass(frozen=True)
class ClockCheck:
    """Check of the axis D: do runs of other lengths lie on the curve of one run?

    Attributes:
        reference: name of the run whose curve it is: the trunk, if there is one.
        runs: the other runs, by ascending size.
        error_at_clock: mean absolute error at the same clock, in nats.
        error_at_step: mean absolute error at the same step, in nats.
        test: the claim that the error at the same clock is smaller.
    """

    reference: str
    runs: tuple[SameClock, ...]
    error_at_clock: float
    error_at_step: float
    test: ClaimTest


@dataclass(frozen=True)
class GroupFall:
    """The fall of one group of tokens in the last losses, from the smallest size to the largest.

    Attributes:
        name: name of the group.
        share_of_tokens: share of the tokens in the group.
        fall: the fall, in nats.
    """

    name: str
    share_of_tokens: float
    fall: Estimate


@dataclass(frozen=True)
class LastLosses:
    """Falls of single tokens over the sizes, from the last losses alone.

    Attributes:
        tokens: tokens of the sample.
        fallen_share: share of them whose isotonic fall over sizes is at least one nat.
        size_quartiles: quartiles of the size at which half of their fall is done.
    """

    tokens: int
    fallen_share: float
    size_quartiles: tuple[float, float, float]


@dataclass(frozen=True)
class AxisSettings:
    """Settings of `axis_run`.

    Attributes:
        resamples: bootstrap resamples of the documents.
        seed: seed of the bootstrap.
    """

    resamples: int
    seed: int


@dataclass(frozen=True)
class AxisSummary:
    """The content of axis.json.

    Attributes:
        axis: the axis.
        size: the unit of the sizes.
        probe_fingerprint: fingerprint of the probe set that all runs watch.
        runs: the runs by ascending size.
        n_units: number of documents, samples or blocks that the intervals are over.
        unit_kind: which of the three they are.
        fall: fall of the mean last loss from the smallest run to the largest, in nats.
        group_falls: falls of the groups, by grouping.
        clock: name of the time of the clock.
        learning_times: name of the run whose learning times form deciles; None without one.
        last_losses: what the last losses alone tell; or why they tell nothing.
        shift: the shift model; or why the runs hold no shift.
        same_clock: the check of the axis D; None on the axis M.
        settings: settings of `axis_run`.
        arrays_crc32: checksum of axis.npz.
    """

    axis: AxisOfRuns
    size: ModelSize | Literal["tokens"]
    probe_fingerprint: str
    runs: tuple[SizedRun, ...]
    n_units: int
    unit_kind: UnitKind
    fall: Estimate
    group_falls: dict[str, tuple[GroupFall, ...]]
    clock: str
    learning_times: str | None
    last_losses: LastLosses | Undefined
    shift: Shift | Undefined
    same_clock: ClockCheck | Undefined | None
    settings: AxisSettings
    arrays_crc32: str


@dataclass(frozen=True)
class AxisArrays:
    """The arrays of axis.npz; those of the shift model are empty where it is undefined.

    Attributes:
        log_size_I: natural logarithm of the size of each run.
        x_P: the clock at each counted probe.
        run_P: run of each probe.
        loss_P: mean loss at each probe, in nats.
        shifted_P: the clock moved by the shift model to that of the largest run.
        aligned_P: the mean loss without the model's floor, in nats.
        s_S: places on the clock of the largest run.
        shape_S: mean curve of the largest run by the model, in nats.
    """

    log_size_I: Floats
    x_P: Floats
    run_P: Integers
    loss_P: Floats
    shifted_P: Floats
    aligned_P: Floats
    s_S: Floats
    shape_S: Floats


@dataclass(frozen=True)
class AxisResult:
    """Runs of several sizes: the content of axis.json and of axis.npz."""

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
