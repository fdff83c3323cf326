"""The sections on the axes D and M: shifts of the clock, and what smaller runs never learn.

Shapes: P probes of all runs, S places on the clock of the largest run.
"""

import math
from collections.abc import Sequence
from typing import Final

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from megatron_tokscale.report.charts import TimeScale, draw, time_axis
from megatron_tokscale.report.html import (
    MEASURED,
    details,
    escape,
    estimate,
    figure,
    interval,
    number,
    paragraph,
    table,
)
from megatron_tokscale.report.inputs import ReportInputs
from megatron_tokscale.report.sections import Section
from megatron_tokscale.report.verdicts import VerdictRow, outcome
from megatron_tokscale.results.axis import (
    AxisArrays,
    AxisResult,
    AxisSummary,
    ClockCheck,
    GroupFall,
    GroupPrediction,
    Shift,
    Spread,
    Top,
)
from megatron_tokscale.results.estimate import Estimate, Undefined
from megatron_tokscale.results.verdict import ClaimTest

_SIZES: Final = {
    "tokens": "training tokens",
    "parameters": "parameters",
    "non-embedding": "parameters without embeddings",
    "flops": "FLOPs per token",
}
_CLOCKS: Final = {
    "lr-sum": "summed learning rate",
    "tokens": "tokens",
    "step": "steps",
}


def axis_sections(inputs: ReportInputs) -> list[Section]:
    """Return a section for every axis."""
    return [_section(f"axis-{n}", axis) for n, axis in enumerate(inputs.axes, 1)]


def _section(anchor: str, found: AxisResult) -> Section:
    axis = found.summary
    size = _SIZES[axis.size]
    parts = [
        table(
            "The runs by size. From the smallest to the largest, the mean last loss falls by "
            f"{estimate(axis.fall)} nats.",
            ["run", size, "mean loss (nats)", "fall from the run before (nats)"],
            [
                [
                    escape(each.name),
                    number(each.size, ",.0f"),
                    number(each.loss),
                    "–" if each.fall is None else estimate(each.fall),
                ]
                for each in axis.runs
            ],
        ),
        *(_falls(name, groups, axis.unit_kind) for name, groups in axis.group_falls.items()),
        *_same_clock(axis),
        *_shift(anchor, found),
    ]
    entry = f"Axis {axis.axis}"
    return Section(anchor, entry, f"{entry}: {size}", parts, _verdicts(anchor, axis))


def _falls(name: str, groups: Sequence[GroupFall], units: str) -> str:
    return details(
        f"Falls by {escape(name)}",
        table(
            "Falls of the last losses from the smallest size to the largest, with intervals over "
            f"{units}.",
            ["group", "share of tokens", "fall (nats)"],
            [
                [escape(each.name), number(each.share_of_tokens, ".1%"), estimate(each.fall)]
                for each in groups
            ],
        ),
    )


def _same_clock(axis: AxisSummary) -> list[str]:
    """Return the check of the axis D against one run's curve."""
    check = axis.same_clock
    if check is None:
        return []
    clock = _CLOCKS.get(axis.clock, axis.clock)
    title = f"<h3>The axis D as the axis T in the {clock}</h3>"
    if isinstance(check, Undefined):
        return [title, paragraph(f"{outcome(None)}: {escape(check.undefined)}.")]
    rows = [
        [
            escape(run.name),
            "–" if run.branch_step is None else number(run.branch_step, ","),
            number(run.loss),
            estimate(run.at_clock),
            estimate(run.at_step),
        ]
        for run in check.runs
    ]
    return [
        title,
        paragraph(
            "Runs that differ in length alone learn the same from the same data. If one run's "
            f"curve over the {clock} holds the last losses of the others, it holds the whole axis. "
            "For a branch with a decay of the learning rate, the difference is the gain of the "
            "decay."
        ),
        table(
            f"The curve of {escape(check.reference)} minus the last loss of each run, in nats: the "
            f"mean absolute error is {number(check.error_at_clock)} nats at the same {clock}, and "
            f"{number(check.error_at_step)} at the same step.",
            [
                "run",
                "branches off at step",
                "last loss",
                f"at the same {clock}",
                "at the same step",
            ],
            rows,
        ),
    ]


def _shift(anchor: str, found: AxisResult) -> list[str]:
    """Return the parts on the shift model."""
    axis, shift = found.summary, found.summary.shift
    title = "<h3>The shift of the clock</h3>"
    if isinstance(shift, Undefined):
        return [title, paragraph(f"{outcome(None)}: {escape(shift.undefined)}.")]
    unit = "nats" if shift.top is Top.UNKNOWN else "share of the fall"
    clock = _CLOCKS.get(axis.clock, axis.clock)
    noise = (
        "No size has two runs: how far seeds alone move a run is unknown."
        if math.isnan(shift.seed_noise)
        else f"Between runs of one size it has a standard deviation of {number(shift.seed_noise)}."
    )
    return [
        title,
        paragraph(
            "The model: all runs share one curve of the mean loss. A run whose ln size is smaller "
            f"by u is later by kappa u on ln of the {clock}, and a part of the fall, floor times "
            "u, never comes. The top, from which the fall counts, is "
            f"{escape(str(shift.top))}."
        ),
        _numbers(axis, shift, unit),
        figure(
            _curves_figure(anchor, axis, found.arrays, clock),
            "Left: the mean loss of each run. Right: the same, each run moved by the shift model "
            "to the clock of the largest, without the floor. Line: the common curve. Darker "
            "points: larger runs.",
        ),
        table(
            f"The runs, moved and left out. {noise}",
            [
                "run",
                "later than the largest by (ln time)",
                "error where left out (nats)",
                "error of its last loss (nats)",
            ],
            [
                [
                    escape(run.name),
                    estimate(run.delta),
                    number(run.left_out_error),
                    number(run.last_error),
                ]
                for run in shift.runs
            ],
        ),
        _errors(shift),
        *_groups(axis, shift),
    ]


def _numbers(axis: AxisSummary, shift: Shift, unit: str) -> str:
    """Return the table of the constants, and on M the parts of the gain at one clock."""
    rows: dict[str, Spread] = {
        "kappa: shift per unit of ln size": shift.kappa,
        f"floor per unit of ln size ({unit})": shift.floor,
    }
    caption, units = "The shift model.", axis.unit_kind
    if axis.axis == "M":
        rows |= {
            "gain of size (nats)": shift.gain,
            "the same tokens earlier (nats)": shift.earlier,
            "what the smaller never learns (nats)": shift.never,
            "share of the same tokens earlier": shift.share,
        }
        caption = (
            "The shift model, and the gain from the smallest size to the largest at the last "
            f"common probe ({number(math.exp(shift.x), ',.4g')})."
        )
    return table(
        caption,
        ["", f"over {units} and runs", f"interval over {units}", "interval over runs"],
        [
            [name, estimate(each.both), _interval(each.documents), _interval(each.runs)]
            for name, each in rows.items()
        ],
    )


def _interval(value: Estimate) -> str:
    return interval(value).strip() or "unknown"


def _errors(shift: Shift) -> str:
    errors = shift.errors
    if isinstance(errors, Undefined):
        return paragraph(f"Left-out runs: {outcome(None)}: {escape(errors.undefined)}.")
    return paragraph(
        "Mean absolute error on runs that were left out of the fit: "
        f"{number(errors.shift_and_floor, '.4f')} nats; without a floor "
        f"{number(errors.plain_shift, '.4f')}; with E + A N^-a + B t^-b "
        f"{number(errors.additive, '.4f')}."
    )


def _groups(axis: AxisSummary, shift: Shift) -> list[str]:
    if not shift.groups:
        return []
    times = (
        "No run is fitted, so there are no deciles by learning time."
        if axis.learning_times is None
        else f"Learning times are those of {escape(axis.learning_times)}."
    )
    rows = [
        [name, estimate(each.skill.both), number(each.error), number(each.null_error)]
        for name, each in shift.groups.items()
    ]
    return [
        table(
            "Which groups gain, by the largest run's curves moved by the shift. The null model: "
            f"every group gains what the mean gains. {times}",
            ["groups", "skill", "error of a group (nats)", "error of the null model (nats)"],
            rows,
        ),
        *(_gains(name, each, axis.unit_kind) for name, each in shift.groups.items()),
    ]


def _gains(name: str, prediction: GroupPrediction, units: str) -> str:
    return details(
        f"Gains by {escape(name)}",
        table(
            "Parts of the gain from the smallest size to the largest, with intervals over "
            f"{units}.",
            ["group", "share of tokens", "the same tokens earlier (nats)", "never learned (nats)"],
            [
                [
                    escape(each.name),
                    number(each.share_of_tokens, ".1%"),
                    estimate(each.earlier),
                    estimate(each.never),
                ]
                for each in prediction.groups
            ],
        ),
    )


def _verdicts(anchor: str, axis: AxisSummary) -> list[VerdictRow]:
    """Return the verdicts on the axis."""
    tests: list[tuple[str, ClaimTest, str]] = []
    if isinstance(axis.same_clock, ClockCheck):
        meaning = "excess of the error at the same clock over that at the same step, in nats"
        tests.append((axis.same_clock.test.claim.name, axis.same_clock.test, meaning))
    if isinstance(axis.shift, Shift):
        shift = axis.shift
        if axis.axis == "M":
            tests.append((shift.earlier_test.claim.name, shift.earlier_test, "share of the gain"))
        tests += [
            (shift.left_out_test.claim.name, shift.left_out_test, "R² of their last losses"),
        ]
        tests += [
            (f"{each.test.claim.name}: {name}", each.test, "skill beyond the mean gain")
            for name, each in shift.groups.items()
        ]
    return [
        VerdictRow.of(
            anchor,
            test,
            f"{meaning} (its interval is over {axis.unit_kind} and runs)",
            claim=f"Axis {axis.axis}: {escape(name)}",
        )
        for name, test, meaning in tests
    ]


def _curves_figure(anchor: str, axis: AxisSummary, arrays: AxisArrays, clock: str) -> str:
    """Draw the mean losses over the clock, as measured and moved by the shift model."""
    shade_R = np.linspace(0.15, 0.95, len(axis.runs))
    colours = [mpl.colormaps["viridis_r"](shade) for shade in shade_R]

    def points(axes: Axes, x_P: np.ndarray, loss_P: np.ndarray) -> None:
        for run in np.unique(arrays.run_P):
            own_P = arrays.run_P == run
            axes.plot(np.exp(x_P[own_P]), loss_P[own_P], ".", ms=3, color=colours[run])
        scale = TimeScale(float(np.exp(x_P.min())), float(np.exp(x_P.max())), has_zero=False)
        time_axis(axes, scale, clock)

    def paint(figure: Figure) -> None:
        left, right = figure.subplots(1, 2, sharey=True)
        points(left, arrays.x_P, arrays.loss_P)
        points(right, arrays.shifted_P, arrays.aligned_P)
        right.plot(np.exp(arrays.s_S), arrays.shape_S, color=MEASURED, lw=1.4)
        right.set_xlabel(f"{clock}, moved")
        left.set_ylabel("mean loss (nats)")

    return draw(anchor, f"Mean losses of the runs over the {clock}", 3.4, paint)
