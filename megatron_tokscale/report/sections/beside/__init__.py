"""The sections on a second run that was trained under a plan: its losses beside the baseline's.

Shapes: K probe steps, F groups of tokens (all of them, then each dataset).
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

import numpy as np
from matplotlib.figure import Figure

from megatron_tokscale.core.files import is_there
from megatron_tokscale.core.records import JSON
from megatron_tokscale.report.charts import (
    TimeScale,
    draw,
    largest_datasets,
    left_out,
    time_axis,
    time_label,
)
from megatron_tokscale.report.html import (
    MEASURED,
    NULL,
    dataset,
    dataset_colour,
    escape,
    figure,
    number,
    paragraph,
    plural,
    table,
)
from megatron_tokscale.report.inputs import ReportInputs
from megatron_tokscale.report.sections import Section
from megatron_tokscale.report.sections.beside.speedup import (
    Curves,
    faster,
    mean_curves,
    time_to_reach,
)
from megatron_tokscale.report.sections.plan import data_plan
from megatron_tokscale.store import Run

_BASELINE: Final = (0, (3, 1.5))  # dashes
_SETTINGS: Final = ("batch", "learning_rate", "seq_length", "seed", "versions")


def beside_sections(inputs: ReportInputs) -> list[Section]:
    """Return the sections on the second run's losses and on its data plan."""
    if inputs.beside is None:
        return []
    title = f"Data plan of {inputs.beside.path.name}"
    plan = data_plan(inputs.plan_beside, "compared-plan", "Its data plan", title)
    return [_comparison(inputs.run, inputs.beside), *plan]


def _comparison(baseline: Run, planned: Run) -> Section:
    """Return the section with the losses of both runs, and the time saved to the same loss."""
    curves, dropped = mean_curves((baseline, planned))
    names = baseline.tokens.datasets
    shown = largest_datasets(baseline.tokens)
    gap = _differences_figure(shown, curves)
    without = f" Left out: {plural(dropped, 'token')} with NaN or infinite losses."
    parts = [
        paragraph(
            "This section compares the mean loss of the same watched tokens, in nats, in "
            f"<b>{escape(baseline.path.name)}</b> (the baseline) and in "
            f"<b>{escape(planned.path.name)}</b> (under the plan)." + (without if dropped else "")
        ),
        paragraph(verdict(*curves), "verdict"),
        paragraph(
            "This is one run of each: one seed. It does not show that the plan is the cause of the "
            "difference; only runs with several seeds, beside runs under the plan's controls "
            "(<code>plan build --control</code>), can show that. " + _order_of_samples(baseline),
            "soft",
        ),
        paragraph(_different_settings(baseline, planned), "soft"),
        figure(
            _losses_figure(shown, curves),
            "Dashed lines: the baseline. Solid lines: the run under the plan. Black lines: all "
            "probe tokens." + left_out(shown, baseline.tokens),
        ),
        figure(
            gap,
            "Loss under the plan minus loss of the baseline, at the same step. Below zero, the run "
            "under the plan has the lower loss.",
        )
        if gap
        else "",
        _final_losses(names, *curves),
        _link_to_plan(planned),
    ]
    return Section("comparison", "Under a plan", "The same training under a plan", parts)


def verdict(baseline: Curves, planned: Curves) -> str:
    """Return a sentence on the time that the planned run saves to the baseline's final loss."""
    steps, target = int(baseline.step_K[-1]), float(baseline.loss_FK[0, -1])
    reached = time_to_reach(planned.step_K, planned.loss_FK[0], target)
    share = faster(steps, reached)
    goal = f"the baseline's final probe loss ({number(target)} nats, step {number(steps, ',')})"
    if share is None:
        lowest = float(planned.loss_FK[0].min())
        return (
            f"The run under the plan never reaches {goal} within its "
            f"{number(int(planned.step_K[-1]), ',')} steps: not faster. Its lowest probe loss is "
            f"{number(lowest)} nats."
        )
    word = "faster" if share >= 0 else "slower"
    return (
        f"The run under the plan reaches {goal} after {number(reached, ',.1f')} steps: "
        f"{number(abs(share), '.1%')} {word}.{_early(baseline, target)}"
    )


def _early(baseline: Curves, target: float) -> str:
    """Return a warning if the baseline itself reached its final loss long before its end."""
    first = time_to_reach(baseline.step_K, baseline.loss_FK[0], target)
    if first is None or first > 0.99 * baseline.step_K[-1]:
        return ""
    return (
        " But the baseline itself was as low before, at "
        f"{number(first, ',.1f')} steps: its loss had stopped falling, so this number means little."
    )


def plan_path(run: Run) -> Path:
    """Return the path of the plan that a job follows."""
    return run.path / "tokscale" / "plan.json"


def _order_of_samples(baseline: Run) -> str:
    if is_there(plan_path(baseline)):
        return (
            "Both runs draw their samples by a plan, in the same order until their weights first "
            "differ."
        )
    return (
        "The baseline draws its samples in Megatron's own order, so the runs also differ in the "
        "order of the data, as runs with two seeds do."
    )


def _different_settings(first: Run, second: Run) -> str:
    a, b = (dict(_flat(_settings(run))) for run in (first, second))
    unlike = [
        f"{name} {_in_words(a.get(name))} / {_in_words(b.get(name))}"
        for name in sorted(a.keys() | b.keys())
        if a.get(name) != b.get(name)
    ]
    if not unlike:
        return "Model, batch, learning rate, seed and versions are the same in both runs."
    return escape("Settings that differ (baseline / plan): " + "; ".join(unlike) + ".")


def _in_words(value: JSON) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return "not set" if value is None else str(value)


def _settings(run: Run) -> dict[str, JSON]:
    """Return the settings in which two runs could differ, and their changes by launch."""
    settings: dict[str, JSON] = {"model": run.info.model}
    known: dict[str, JSON] = {}
    for launch in run.launches:
        content = launch.to_json()
        groups = {name: content[name] for name in _SETTINGS}
        if not known:
            settings |= groups
        elif groups != known:
            settings[f"from step {launch.step}"] = {
                name: value for name, value in groups.items() if value != known[name]
            }
        known = groups
    return settings


def _flat(settings: Mapping[str, JSON], prefix: str = "") -> Iterator[tuple[str, JSON]]:
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _final_losses(names: tuple[str, ...], baseline: Curves, planned: Curves) -> str:
    rows = []
    labels = ["all probe tokens", *(dataset(d, name) for d, name in enumerate(names))]
    for f, label in enumerate(labels):
        target, final = float(baseline.loss_FK[f, -1]), float(planned.loss_FK[f, -1])
        reached = time_to_reach(planned.step_K, planned.loss_FK[f], target)
        of_tokens = time_to_reach(planned.tokens_K, planned.loss_FK[f], target)
        rows.append(
            [
                label,
                number(target, ".4f"),
                number(final, ".4f"),
                number(final - target, "+.4f"),
                number(reached, ",.1f") if reached is not None else "never",
                number(faster(int(baseline.step_K[-1]), reached), ".1%"),
                number(faster(float(baseline.tokens_K[-1]), of_tokens), ".1%"),
            ]
        )
    return table(
        "Mean loss at the last probe of each run (baseline: step "
        f"{number(int(baseline.step_K[-1]), ',')}, plan: step "
        f"{number(int(planned.step_K[-1]), ',')}), and the steps after which the run under the "
        "plan reaches the baseline's loss, interpolated in ln step between probes. “Faster” is "
        "the share of the baseline's steps, or tokens, that this saves.",
        [
            "",
            "baseline (nats)",
            "plan (nats)",
            "difference (nats)",
            "reached after (steps)",
            "faster, in steps",
            "faster, in tokens",
        ],
        rows,
    )


def _link_to_plan(planned: Run) -> str:
    if not is_there(plan_path(planned)):
        return paragraph("The second run has no copy of a plan (tokscale/plan.json).")
    return paragraph('The samples that it drew: <a href="#compared-plan">its data plan</a>.')


def _losses_figure(shown: dict[int, str], curves: tuple[Curves, Curves]) -> str:
    """Draw the mean loss of both runs against steps and against consumed tokens."""

    def paint(figure: Figure) -> None:
        left, right = figure.subplots(1, 2, sharey=True)
        steps = [each.step_K.astype(np.float64) for each in curves]
        tokens = [each.tokens_K for each in curves]
        for axes, times, label in (
            (left, steps, time_label("step")),
            (right, tokens, time_label("tokens")),
        ):
            positive = np.concatenate([time_K[time_K > 0] for time_K in times])
            if not len(positive):
                axes.set_axis_off()  # neither run has a record of its consumed tokens
                continue
            scale = TimeScale.from_times(positive)
            for f, colour in _groups(shown):
                for each, time_K, line in zip(curves, times, (_BASELINE, "-"), strict=True):
                    later = time_K > 0
                    axes.plot(time_K[later], each.loss_FK[f, later], ls=line, color=colour, lw=1.2)
            time_axis(axes, scale, label)
        left.set_ylabel("mean probe loss (nats per token)")
        for line, name in ((_BASELINE, "baseline"), ("-", "under the plan")):
            left.plot([], [], ls=line, color=NULL, label=name)
        for f, colour in _groups(shown):
            left.plot([], [], color=colour, label=shown.get(f - 1, "all probe tokens"))
        left.legend()

    return draw("both", "Mean probe loss of both runs against steps and tokens", 3.6, paint)


def _differences_figure(shown: dict[int, str], curves: tuple[Curves, Curves]) -> str | None:
    """Draw the loss under the plan minus the baseline's at the steps that both runs have."""
    baseline, planned = curves
    step_K, first, second = np.intersect1d(
        baseline.step_K, planned.step_K, assume_unique=True, return_indices=True
    )
    if not (step_K > 0).any():
        return None

    def paint(figure: Figure) -> None:
        axes = figure.add_subplot()
        scale = TimeScale.from_times(step_K.astype(np.float64))
        for f, colour in _groups(shown):
            gap_K = planned.loss_FK[f, second] - baseline.loss_FK[f, first]
            axes.plot(scale.place(step_K.astype(np.float64)), gap_K, color=colour, marker=".", ms=3)
        axes.axhline(0, color="#999999", lw=0.8)
        time_axis(axes, scale, time_label("step"))
        axes.set_ylabel("planned − baseline (nats)")

    return draw("gap", "Loss under the plan minus loss of the baseline", 2.4, paint)


def _groups(shown: dict[int, str]) -> list[tuple[int, str]]:
    """Return index and colour of every group of tokens: the datasets, and last all tokens."""
    return [*((d + 1, dataset_colour(d)) for d in shown), (0, MEASURED)]
