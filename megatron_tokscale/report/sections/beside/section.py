"""The section on a second run that was trained under a plan.

Shapes: K probe steps, F groups of tokens.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_tokscale.core.files import is_there
from megatron_tokscale.report.largest import largest_datasets, left_out
from megatron_tokscale.report.markup import (
    dataset,
    escape,
    figure,
    number,
    paragraph,
    plural,
    section,
    table,
)
from megatron_tokscale.report.sections.beside import figures as compare_figures
from megatron_tokscale.report.sections.beside.speedup import (
    Curves,
    faster,
    mean_curves,
    time_to_reach,
)
from megatron_tokscale.store import Run

_SETTINGS = ("batch", "learning_rate", "seq_length", "seed", "versions")


def comparison(baseline: Run, planned: Run) -> str:
    """Losses of both runs, and the verdict."""
    curves, dropped = mean_curves((baseline, planned))
    names = baseline.probe_set.datasets
    shown = largest_datasets(baseline.probe_set)
    gap = compare_figures.differences(shown, curves)
    without = f" Left out: {plural(dropped, 'token')} with NaN or infinite losses."
    return section(
        "comparison",
        "The same training under a plan",
        paragraph(
            "Mean loss of the same watched tokens, in nats, in "
            f"<b>{escape(baseline.path.name)}</b> (the baseline) and in "
            f"<b>{escape(planned.path.name)}</b>." + (without if dropped else "")
        ),
        paragraph(verdict(*curves), "verdict"),
        paragraph(
            "This is one run of each: one seed. Without the spread over seeds, and the plan's "
            "controls beside it (<code>plan build ... --control</code>), this number does not show "
            "that the plan is the cause. " + _order_of_samples(baseline),
            "soft",
        ),
        paragraph(_different_settings(baseline, planned), "soft"),
        figure(
            compare_figures.losses(shown, curves),
            "Dashed: baseline. Solid: under the plan. Black: all probe tokens."
            + left_out(shown, baseline.probe_set),
        ),
        figure(gap, "Below zero: lower loss under the plan at the same step.") if gap else "",
        _final_losses(names, *curves),
        _plan(planned),
    )


def verdict(baseline: Curves, planned: Curves) -> str:
    """How much sooner the planned run has the baseline's final loss, as a sentence."""
    steps, target = int(baseline.step_K[-1]), float(baseline.loss_FK[0, -1])
    reached = time_to_reach(planned.step_K, planned.loss_FK[0], target)
    share = faster(steps, reached)
    goal = f"the baseline's final probe loss ({number(target)} nats, step {number(steps, ',')})"
    if share is None:
        lowest = float(planned.loss_FK[0].min())
        return (
            f"The run under the plan never reaches {goal} within its "
            f"{number(int(planned.step_K[-1]), ',')} steps: not faster. Its lowest is "
            f"{number(lowest)} nats."
        )
    word = "faster" if share >= 0 else "slower"
    return (
        f"The run under the plan reaches {goal} after {number(reached, ',.1f')} steps: "
        f"{number(abs(share), '.1%')} {word}.{_early(baseline, target)}"
    )


def _early(baseline: Curves, target: float) -> str:
    """What to say if the baseline itself was at its final loss before."""
    first = time_to_reach(baseline.step_K, baseline.loss_FK[0], target)
    if first is None or first > 0.99 * baseline.step_K[-1]:
        return ""
    return (
        " But the baseline itself was as low before, at "
        f"{number(first, ',.1f')} steps: its loss no longer fell, and this number means little."
    )


def plan_path(run: Run) -> Path:
    """Where a job keeps a copy of the plan it follows."""
    return run.paths.plan


def _order_of_samples(baseline: Run) -> str:
    if is_there(plan_path(baseline)):
        return (
            "Both draw their samples by a plan: in the same order until the weights first differ."
        )
    return (
        "The baseline draws its samples in Megatron's own order: the runs also differ in the order "
        "of the data, by which two seeds differ too."
    )


def _different_settings(first: Run, second: Run) -> str:
    a, b = (dict(_flat(_settings(run))) for run in (first, second))
    unlike = [
        f"{name} {_told(a.get(name))} / {_told(b.get(name))}"
        for name in sorted(a.keys() | b.keys())
        if a.get(name) != b.get(name)
    ]
    if not unlike:
        return "Model, batch, learning rate, seed and versions are the same in both."
    return escape("Settings that differ (baseline / plan): " + "; ".join(unlike) + ".")


def _told(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return "not set" if value is None else str(value)


def _settings(run: Run) -> dict[str, Any]:
    """Return the settings that could tell two runs apart, and changes of them by launch."""
    settings: dict[str, Any] = {"model": run.info.model}
    known: dict[str, Any] = {}
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


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
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
        f"Loss at the last probe (baseline: step {number(int(baseline.step_K[-1]), ',')}, plan: "
        f"step {number(int(planned.step_K[-1]), ',')}); steps until the baseline's is reached, "
        "interpolated in ln step between probes; faster = 1 − that over the baseline's steps.",
        [
            "",
            "baseline (nats)",
            "plan (nats)",
            "difference",
            "reached after (steps)",
            "faster, in steps",
            "faster, in tokens",
        ],
        rows,
    )


def _plan(planned: Run) -> str:
    if not is_there(plan_path(planned)):
        return paragraph("No copy of a plan was found in the second run (tokscale/plan.json).")
    return paragraph('What it drew: <a href="#compared-plan">its data plan</a>.')
