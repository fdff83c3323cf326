"""The result of `axis_run` as tables for a terminal."""

import math

from megatron_tokscale.results.axis import (
    AxisSummary,
    ClockCheck,
    LastLosses,
    LeftOutErrors,
    Shift,
    SizedRun,
    Spread,
    Top,
)
from megatron_tokscale.results.estimate import Estimate, Undefined, format_estimate
from megatron_tokscale.results.verdict import ClaimTest

_SHOWN = ("dataset", "learning-time decile")  # groupings whose falls are printed


def describe_axis(summary: AxisSummary) -> str:
    """Return the runs, the check of the clock and the shift model as lines."""
    lines = [
        f"  axis {summary.axis} ({summary.size}), {len(summary.runs)} runs; 95% intervals "
        f"over {summary.n_units:,} {summary.unit_kind}; the mean loss falls by "
        f"{format_estimate(summary.fall)} nats",
        *(
            f"    {run.name:<24}{run.size:>16,.0f}{run.loss:>9.3f} nats{_fall(run, i)}"
            for i, run in enumerate(summary.runs)
        ),
        _last_losses(summary.last_losses),
        *_group_falls(summary),
        *_same_clock(summary.same_clock, summary.clock),
        *_shift(summary),
    ]
    return "\n".join(lines)


def _fall(run: SizedRun, place: int) -> str:
    if run.fall is not None:
        return f", a fall of {format_estimate(run.fall)}"
    return ", not compared: its learning rate has not decayed" if place else ""


def _last_losses(found: LastLosses | Undefined) -> str:
    if isinstance(found, Undefined):
        return f"  tokens over sizes: undefined: {found.undefined}"
    low, middle, high = (f"{size:,.4g}" for size in found.size_quartiles)
    return (
        f"  {found.fallen_share:.1%} of {found.tokens:,} tokens fall by a nat or more over sizes; "
        f"half of their fall is done at size {middle} (quartiles {low} to {high})"
    )


def _group_falls(summary: AxisSummary) -> list[str]:
    """Return the falls of datasets, and of deciles by learning time."""
    return [
        f"  fall from the smallest size to the largest by {name}, in nats: "
        + ", ".join(f"{each.name}: {format_estimate(Estimate(each.fall.value))}" for each in groups)
        for name, groups in summary.group_falls.items()
        if name in _SHOWN
    ]


def _same_clock(check: ClockCheck | Undefined | None, clock: str) -> list[str]:
    if check is None:
        return []
    if isinstance(check, Undefined):
        return [f"  the axis D as the axis T: undefined: {check.undefined}"]
    lines = [
        f"  the axis D as the axis T in {clock}: the curve of {check.reference} minus the last "
        "loss, in nats",
        f"    {'run':<24}{'branches off at step':>22}   {'at the same ' + clock:<28}"
        "at the same step",
    ]
    for run in check.runs:
        step = "-" if run.branch_step is None else f"{run.branch_step:,}"
        at_clock, at_step = (format_estimate(each) for each in (run.at_clock, run.at_step))
        lines.append(f"    {run.name:<24}{step:>22}   {at_clock:<28}{at_step}")
    lines.append(
        f"    mean absolute error {check.error_at_clock:.3f} and {check.error_at_step:.3f} nats; "
        "for a branch, the first column is the gain of its decay"
    )
    return [*lines, _verdict(check.test)]


def _shift(summary: AxisSummary) -> list[str]:
    shift = summary.shift
    if isinstance(shift, Undefined):
        return [f"  shift of the clock: undefined: {shift.undefined}"]
    unit, kind = "nats" if shift.top is Top.UNKNOWN else "of the fall", summary.unit_kind
    return [
        f"  shift of the clock ({summary.clock}) per unit of ln size; top: {shift.top}",
        f"    {'':<34}{f'({kind} and runs)':<28}{f'({kind})':<22}(runs)",
        _spread("kappa", shift.kappa),
        _spread(f"floor ({unit})", shift.floor),
        *(_parts(shift, summary.clock) if summary.axis == "M" else []),
        *_left_out(shift),
        *_groups(summary, shift),
    ]


def _parts(shift: Shift, clock: str) -> list[str]:
    """Return the parts of the gain. On the axis D there is no gain at one clock to divide."""
    return [
        f"  the gain from the smallest size to the largest at {clock} "
        f"{math.exp(shift.x):,.4g}, in nats",
        _spread("all", shift.gain),
        _spread("the same tokens earlier", shift.earlier),
        _spread("what the smaller never learns", shift.never),
        _spread("share of the same tokens earlier", shift.share),
        _verdict(shift.earlier_test),
    ]


def _spread(name: str, spread: Spread) -> str:
    both, documents, runs = (
        format_estimate(each) if i == 0 else _interval(each)
        for i, each in enumerate((spread.both, spread.documents, spread.runs))
    )
    return f"    {name:<34}{both:<28}{documents:<22}{runs}"


def _interval(estimate: Estimate) -> str:
    if not estimate.has_interval:
        return "unknown"
    return f"[{estimate.low:.3f}, {estimate.high:.3f}]"


def _left_out(shift: Shift) -> list[str]:
    noise = (
        "unknown: no size has two runs, so a shift may be that of a seed"
        if math.isnan(shift.seed_noise)
        else f"{shift.seed_noise:.3f}"
    )
    lines = [
        f"    {'run':<24}{'later than the largest by (ln time)':<40}"
        "error in nats where it is left out: curve, last loss"
    ]
    lines += [
        f"    {run.name:<24}{format_estimate(run.delta):<40}"
        f"{_number(run.left_out_error)}, {_number(run.last_error, '+.3f')}"
        for run in shift.runs
    ]
    lines.append(f"  standard deviation of that shift between runs of one size: {noise}")
    if isinstance(shift.errors, Undefined):
        return [*lines, f"  left-out runs: undefined: {shift.errors.undefined}"]
    return [*lines, *_errors(shift.errors), _verdict(shift.left_out_test)]


def _errors(errors: LeftOutErrors) -> list[str]:
    return [
        f"  mean absolute error on left-out runs, in nats: shift and floor "
        f"{errors.shift_and_floor:.4f}, plain shift {errors.plain_shift:.4f}, "
        f"E + A N^-a + B t^-b {errors.additive:.4f}"
    ]


def _groups(summary: AxisSummary, shift: Shift) -> list[str]:
    if not shift.groups:
        return []
    times = (
        "no run is fitted, so there are no deciles by learning time (fit the largest run)"
        if summary.learning_times is None
        else f"learning times of {summary.learning_times}"
    )
    lines = [
        f"  which groups gain, by the curves of the largest run moved; {times}",
        f"    {'':<24}{'skill beyond the mean gain':<30}error of a group, nats: model, null",
    ]
    for name, each in shift.groups.items():
        lines.append(
            f"    {name:<24}{format_estimate(each.skill.both):<30}{each.error:.3f}, "
            f"{each.null_error:.3f}: {each.test.verdict}"
        )
    return lines


def _number(value: float, pattern: str = ".3f") -> str:
    return "-" if math.isnan(value) else f"{value:{pattern}}"


def _verdict(test: ClaimTest) -> str:
    if isinstance(test.estimate, Undefined):
        return f"    {test.claim.name}: {test.verdict}: {test.estimate.undefined}"
    return (
        f"    {test.claim.name} ({test.claim.rule}): {format_estimate(test.estimate)}: "
        f"{test.verdict}"
    )
