"""`axis_run`: runs of several sizes (M) or lengths (D), as shifts of one clock.

A sigmoid per token over a handful of runs holds no information; the shift of the mean curves does,
and each run has many probes along T to show it. See `axes/shift.py` for the model.

Shapes: N tokens, I runs by ascending size, P probes of all runs, C groups, R resamples of the
documents (the first is the data as they are).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from megatron_tokscale.core.arrays import Floats, Mask
from megatron_tokscale.core.checked import write_typed_result
from megatron_tokscale.core.errors import UndefinedError
from megatron_tokscale.core.model_size import ModelSize
from megatron_tokscale.core.progress import NoProgress, Progress
from megatron_tokscale.core.schemas import AXIS_SCHEMA
from megatron_tokscale.core.seed import DEFAULT_SEED
from megatron_tokscale.results import FittedRun
from megatron_tokscale.results.axis import (
    AxisArrays,
    AxisOfRuns,
    AxisSettings,
    AxisSummary,
    GroupFall,
    GroupPrediction,
    LastLosses,
    Shift,
    SizedRun,
    Top,
)
from megatron_tokscale.results.estimate import Estimate, Undefined, defined_or_reason
from megatron_tokscale.results.npz import write_npz
from megatron_tokscale.results.scored_range import RangeStart, ScoredRange
from megatron_tokscale.spectrum.axes.axis_runs import AxisRuns
from megatron_tokscale.spectrum.axes.axis_sums import UNITS, AxisSums
from megatron_tokscale.spectrum.axes.curves import LEAST_PROBES, Points
from megatron_tokscale.spectrum.axes.groups import GroupCurves, corrected, predict_groups
from megatron_tokscale.spectrum.axes.measured import Curves, Fitted, measure_shift
from megatron_tokscale.spectrum.axes.same_clock import check_same_clock
from megatron_tokscale.spectrum.axes.tops import choose_top, first_losses, highest_first
from megatron_tokscale.spectrum.events import learning_times
from megatron_tokscale.spectrum.groups import Groups, groupings
from megatron_tokscale.spectrum.isotonic import size_thresholds
from megatron_tokscale.spectrum.scored_range import scored_range_of
from megatron_tokscale.store import Run, WatchedTokens, check_same_tokens
from megatron_tokscale.store.paths import check_result

ALL = "all tokens"
_SHAPE_POINTS = 200  # places on the clock at which the model's curve is stored
_LEAST_FALL = 1.0  # nats that a token falls over sizes to count as learned by them (our choice)


def axis_run(
    runs: Sequence[Run],
    axis: AxisOfRuns,
    out: Path,
    *,
    size: ModelSize = "non-embedding",
    source: Run | None = None,
    trunk: Run | None = None,
    n_resamples: int = 200,
    seed: int = DEFAULT_SEED,
    progress: Progress | None = None,
) -> AxisSummary:
    """Measure the losses and the shifts over the axis, write OUT/axis.json and OUT/axis.npz.

    A token counts if its losses are finite at all probes of all runs. Intervals over documents come
    from at most 256 units of resampling.

    Args:
        runs: three or more runs with one probe set, in any order, of two or more sizes.
        axis: "D", tokens that a run was trained on; "M", the size of its model.
        out: folder to write into.
        size: the measure of the size on M: parameters, non-embedding parameters, or FLOPs per
            token.
        source: a fitted run whose learning times form deciles of tokens; by default the largest
            run, if it is fitted.
        trunk: the run that all other runs are branches of, on D; by default it is found.
        n_resamples: bootstrap resamples of the documents.
        seed: seed of the bootstrap.
        progress: receiver of the name of each stage; None for none.

    Returns:
        The content of axis.json.

    Raises:
        TokscaleError: fewer than three runs, one size only, different probe sets, unknown sizes, or
            no token with finite losses in all runs; or `out` is refused by `check_result`.
    """
    progress = progress or NoProgress()
    check_result(out, "axis.json")
    ordered = AxisRuns.of(runs, axis, size, trunk)
    timed = _source(ordered, source)
    tokens = ordered.runs[0].tokens
    groups = _groups(tokens, timed)
    units = tokens.units(seed, UNITS)
    weight_RU = units.weights(n_resamples, seed)
    weight_RU = weight_RU[np.isfinite(weight_RU).all(axis=1)]  # few documents have no resamples
    sums = AxisSums.read(ordered.runs, groups, units, progress)
    mean_RP = sums.means(ALL, weight_RU)[0][:, 0]
    ends = np.cumsum([len(x_K) for x_K in ordered.x_I])[:-1]
    curve_IRK = np.split(mean_RP, ends, axis=1)
    probes = _Probes.of(ordered, curve_IRK, axis)
    progress.stage("shifts of the clock")
    shift, fitted = _shift(ordered, probes, sums, weight_RU, mean_RP)
    checksum = write_npz(out / "axis.npz", _arrays(ordered, fitted))
    last_RI = np.stack([curve_RK[:, -1] for curve_RK in curve_IRK], axis=1)
    ends_RI = last_RI[:, ordered.point_I]
    summary = AxisSummary(
        axis=axis,
        size="tokens" if axis == "D" else size,
        probe_fingerprint=tokens.fingerprint,
        runs=_sized_runs(ordered, probes, last_RI),
        n_units=units.documents,
        unit_kind=units.kind,
        fall=Estimate.from_resamples(ends_RI[:, 0] - ends_RI[:, -1]),
        group_falls={
            name: _group_falls(ordered, sums, name, weight_RU) for name in groups if name != ALL
        },
        clock=ordered.runs[-1].time_name(ordered.clock),
        learning_times=None if timed is None else timed.run.path.name,
        last_losses=defined_or_reason(lambda: _last_losses(ordered, sums)),
        shift=shift,
        same_clock=(
            defined_or_reason(lambda: check_same_clock(ordered, curve_IRK)) if axis == "D" else None
        ),
        settings=AxisSettings(n_resamples, seed),
        arrays_crc32=checksum,
    )
    write_typed_result(out / "axis.json", AXIS_SCHEMA, summary)
    return summary


def _source(runs: AxisRuns, source: Run | None) -> FittedRun | None:
    """Return the fitted run whose learning times form deciles: `source`, or else the largest."""
    if source is not None:
        check_same_tokens([runs.runs[0], source])
        return FittedRun.open(source)
    largest = runs.runs[-1]
    return FittedRun.open(largest) if largest.paths.fits.is_file() else None


def _groups(tokens: WatchedTokens, timed: FittedRun | None) -> dict[str, Groups]:
    """Return all tokens as one group, the groupings, and deciles by learning time in a run."""
    time_N = None
    if timed is not None:
        time_N = np.concatenate([learning_times(fits) for _, fits, _ in timed.blocks()])
    every = Groups(np.zeros(tokens.n_tokens, np.int64), (ALL,))
    return {ALL: every, **groupings(tokens, time_N)}


@dataclass(frozen=True)
class _Probes:
    """The probes that count in the shift model.

    Attributes:
        counted_IK: mask of the probes of each run.
        top: the top of the model that the probes show; None if they show none.
    """

    counted_IK: Sequence[Mask]
    top: Top | None

    @classmethod
    def of(cls, runs: AxisRuns, curve_IRK: Sequence[Floats], axis: AxisOfRuns) -> "_Probes":
        """Choose the probes: from the end of the unigram phase on, if all runs show it.

        On D, branches of a trunk do not count, and neither does the decay of the learning rate:
        its gain is no shift.
        """
        ranges = [
            scored_range_of(run, x_K, curve_RK[0]) if np.isfinite(x_K).any() else None
            for run, x_K, curve_RK in zip(runs.runs, runs.x_I, curve_IRK, strict=True)
        ]
        counted_IK = [
            _counted(x_K, branch, each if axis == "D" else None)
            for x_K, branch, each in zip(runs.x_I, runs.branch_I, ranges, strict=True)
        ]
        used = [i for i, counted_K in enumerate(counted_IK) if counted_K.any()]
        starts = [each.from_x for i in used if (each := ranges[i]) and _ends_unigrams(each)]
        if used and len(starts) == len(used):
            for i, start in zip(used, starts, strict=True):
                counted_IK[i] &= runs.x_I[i] >= start
            return cls(counted_IK, Top.UNIGRAM)
        before = all(np.isneginf(runs.x_I[i][0]) for i in used)
        return cls(counted_IK, Top.BEFORE if used and before else None)


def _sized_runs(runs: AxisRuns, probes: _Probes, last_RI: Floats) -> tuple[SizedRun, ...]:
    """Return name, size, last loss, fall and number of counted probes of every run."""
    points = np.flatnonzero(runs.point_I).tolist()
    fall_of = {
        i: Estimate.from_resamples(last_RI[:, before] - last_RI[:, i])
        for before, i in pairwise(points)
    }
    return tuple(
        SizedRun(
            name, float(size), float(last_RI[0, i]), fall_of.get(i), int(probes.counted_IK[i].sum())
        )
        for i, (name, size) in enumerate(zip(runs.names, runs.size_I, strict=True))
    )


def _ends_unigrams(scored: ScoredRange) -> bool:
    return scored.start_reason is RangeStart.UNIGRAM_PHASE


def _counted(x_K: Floats, branch: int | None, scored: ScoredRange | None) -> Mask:
    """Return the mask of the finite probes of a run that may count: none if there are too few."""
    counted_K = np.isfinite(x_K)
    if scored is not None:
        counted_K &= x_K <= scored.to_x
    if branch is not None or counted_K.sum() < LEAST_PROBES:
        counted_K[:] = False
    return np.asarray(counted_K)


def _shift(
    runs: AxisRuns, probes: _Probes, sums: AxisSums, weight_RU: Floats, mean_RP: Floats
) -> tuple[Shift | Undefined, Fitted | None]:
    """Return the shift model of the axis, and its fits; or why there is none."""
    counted_P = np.concatenate(probes.counted_IK)
    points = Points.of_runs(
        [x_K[counted_K] for x_K, counted_K in zip(runs.x_I, probes.counted_IK, strict=True)],
        runs.log_size_I,
    )
    try:
        points.check()
    except UndefinedError as error:
        return Undefined(str(error)), None
    top = probes.top or choose_top(points, mean_RP[0, counted_P])
    first_P = np.concatenate([np.arange(len(x_K)) == 0 for x_K in runs.x_I])
    used_P = np.repeat([mask.any() for mask in probes.counted_IK], [len(x) for x in runs.x_I])

    def tops(loss_RCP: Floats) -> Floats:
        """Return the top of every cell, (R, C)."""
        match top:
            case Top.BEFORE:
                return np.asarray(loss_RCP[..., first_P & used_P].mean(axis=-1))
            case Top.UNIGRAM:
                return first_losses(points, loss_RCP[..., counted_P])
            case Top.FIRST:
                return highest_first(points, loss_RCP[..., counted_P])
        return np.full(loss_RCP.shape[:-1], np.nan)

    top_R = tops(mean_RP[:, None])[:, 0]
    fitted = Fitted.of(Curves(points, mean_RP[:, counted_P], top_R, top))
    groups: dict[str, GroupPrediction] = {}
    for name in sums.loss_UCP:
        if name == ALL:
            continue
        loss_RCP, share_RC = sums.means(name, weight_RU)
        curves = GroupCurves(sums.names[name], share_RC, loss_RCP[..., counted_P], tops(loss_RCP))
        try:
            groups[name] = predict_groups(fitted, curves)
        except UndefinedError:  # too few runs, or one group: there is nothing to predict
            continue
    return measure_shift(fitted, runs.names, corrected(groups)), fitted


def _group_falls(
    runs: AxisRuns, sums: AxisSums, name: str, weight_RU: Floats
) -> tuple[GroupFall, ...]:
    """Return the falls of the groups that have tokens, between the smallest and largest sizes."""
    loss_RCP, share_RC = sums.means(name, weight_RU)
    last_I = (np.cumsum([len(x_K) for x_K in runs.x_I]) - 1)[runs.point_I]
    size_I = runs.size_I[runs.point_I]
    smallest_I, largest_I = size_I == size_I[0], size_I == size_I[-1]
    fall_RC = loss_RCP[..., last_I[smallest_I]].mean(-1) - loss_RCP[..., last_I[largest_I]].mean(-1)
    return tuple(
        GroupFall(group, float(share_RC[0, c]), Estimate.from_resamples(fall_RC[:, c]))
        for c, group in enumerate(sums.names[name])
        if share_RC[0, c] > 0
    )


def _last_losses(runs: AxisRuns, sums: AxisSums) -> LastLosses:
    """Return what the last losses alone tell of the tokens."""
    at_N, fall_N = size_thresholds(runs.log_size_I[runs.point_I], sums.last_NI[:, runs.point_I])
    fallen_N = fall_N >= _LEAST_FALL
    if not fallen_N.any():
        raise UndefinedError(f"no token falls by {_LEAST_FALL:g} nat over the sizes")
    low, middle, high = np.exp(np.quantile(at_N[fallen_N], [0.25, 0.5, 0.75])).tolist()
    return LastLosses(len(at_N), float(fallen_N.mean()), (low, middle, high))


def _arrays(runs: AxisRuns, fitted: Fitted | None) -> AxisArrays:
    """Return the content of axis.npz."""
    if fitted is None:
        none = np.zeros(0)
        return AxisArrays(
            runs.log_size_I, none, np.zeros(0, np.int64), none, none, none, none, none
        )
    points, model = fitted.curves.points, fitted.model_R[0]
    loss_P = fitted.curves.loss_RP[0]
    shifted_P = points.x_P + model.kappa * points.u_P
    floor_P = model.predict(points.x_P, points.u_P)[0] - model.shape(shifted_P)[0]
    s_S = np.linspace(shifted_P.min(), shifted_P.max(), _SHAPE_POINTS)
    return AxisArrays(
        log_size_I=runs.log_size_I,
        x_P=points.x_P,
        run_P=points.run_P,
        loss_P=loss_P,
        shifted_P=shifted_P,
        aligned_P=loss_P - floor_P,
        s_S=s_S,
        shape_S=model.shape(s_S)[0],
    )
