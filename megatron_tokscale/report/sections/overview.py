"""The sections on the loss curve and on the settings of the run, and the warnings about losses.

Shapes: K probe steps.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Final

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from megatron_tokscale.core.arrays import Floats
from megatron_tokscale.core.records import JSON
from megatron_tokscale.core.words import time_text
from megatron_tokscale.fit.summary import NonFiniteLosses
from megatron_tokscale.report.charts import (
    TimeScale,
    dataset_line,
    draw,
    largest_datasets,
    left_out,
    time_axis,
    time_label,
    time_of,
)
from megatron_tokscale.report.html import (
    MEASURED,
    NULL,
    dataset,
    dataset_colour,
    escape,
    facts,
    figure,
    number,
    paragraph,
    plural,
    table,
)
from megatron_tokscale.report.inputs import ReportInputs
from megatron_tokscale.report.sections import Section
from megatron_tokscale.store import Launch, WatchedTokens

_GROUPS: Final = {
    "layout": "Parallel layout",
    "batch": "Batch",
    "learning_rate": "Learning rate",
    "seq_length": "Sequence length",
    "seed": "Seed",
    "schedule": "Probe schedule",
    "versions": "Versions",
}


def run_section(inputs: ReportInputs) -> list[Section]:
    """Return the section with model, layout, schedule, versions, probe set and time axis."""
    run = inputs.run
    info, tokens = run.info, run.tokens
    seconds = sum(record.duration for record in run.records)
    rows = [
        ["Run", escape(f"{run.path.name} (id {info.run_id})")],
        *([["Model", _settings(info.model)]] if info.model else []),
        *_launches(run.launches),
        ["Probes", _probes(inputs)],
        *([] if run.imported else [["Time spent on probes", f"{number(seconds, ',.1f')} s"]]),
        ["Probe set" if tokens.probe_set else "Imported tokens", _tokens(tokens)],
        ["Time axis", f"x = ln time, time = {escape(time_label(inputs.time))}"],
        ["Scored range", escape(inputs.spectrum.summary.scored.describe(inputs.time))],
    ]
    parts = [
        paragraph(
            "These are the losses that were imported, and what is known of their tokens."
            if run.imported
            else "These are the settings of the training job, and the tokens that its probes "
            "watched."
        ),
        facts(rows),
        _note_on_units(tokens),
        _datasets(inputs),
    ]
    return [Section("run", "What was run", "What was run", parts)]


def warnings(inputs: ReportInputs) -> list[str]:
    """Return the warnings about losses that the analysis could not use; none if all are finite."""
    fit = inputs.spectrum.fit
    found = (_non_finite(fit.non_finite), _left_out_probes(fit.left_out))
    return [warning for warning in found if warning]


def _tokens(tokens: WatchedTokens) -> str:
    """Return the number of watched tokens, the shape of their text if there is one, and its id."""
    text = tokens.probe_set
    shape = (
        f" in {plural(text.n_sequences, 'sequence')} of {number(text.seq_length, ',')}, "
        f"vocabulary {number(text.vocab_size, ',')}"
        if text
        else ", without text"
    )
    return f"{plural(tokens.n_tokens, 'token')}{shape}, fingerprint {tokens.fingerprint}"


def _launches(launches: Sequence[Launch]) -> Iterator[list[str]]:
    """Yield the settings of the first launch, and the changes made by each later one."""
    known: dict[str, JSON] = {}
    for launch in launches:
        content = launch.to_json()
        groups = {name: content[name] for name in _GROUPS if content[name] not in (None, {})}
        if not known:
            if launch.step:
                yield ["First known launch", f"from step {number(launch.step, ',')}"]
            yield from ([_GROUPS[name], _settings(value)] for name, value in groups.items())
        else:
            yield [
                f"From step {number(launch.step, ',')}",
                "; ".join(_changes(known, groups)) or "resumed with the same settings",
            ]
        known = groups


def _changes(before: Mapping[str, JSON], now: Mapping[str, JSON]) -> Iterator[str]:
    """Yield the groups of settings that differ, each with its changed values alone."""
    for name, title in _GROUPS.items():
        old, new = before.get(name), now.get(name)
        if old == new:
            continue
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            names = sorted(key for key in {*old, *new} if old.get(key) != new.get(key))
            new = {key: new[key] if _is_set(new.get(key)) else "none" for key in names}
        yield f"{title.lower()}: {_settings(new)}"


def _is_set(value: JSON) -> bool:
    return value is not None and value is not False


def _settings(value: JSON) -> str:
    """Return a group of settings in one line, without those that are not set."""
    if not isinstance(value, Mapping):
        return escape(str(value))
    known = {
        name: f"{v:g}" if isinstance(v, float) else v for name, v in value.items() if _is_set(v)
    }
    titles = {name: name.replace("_", " ") for name in known}
    texts = (titles[name] if v is True else f"{titles[name]} {v}" for name, v in known.items())
    return escape(", ".join(texts))


def _probes(inputs: ReportInputs) -> str:
    run, first, last = inputs.run, inputs.run.records[0], inputs.run.records[-1]
    if run.imported and run.default_time == "axis":
        time_K = run.time_K()
        return (
            f"{number(len(time_K), ',')} values of {escape(run.imported.named)}, from "
            f"{time_text(float(time_K[0]))} to {time_text(float(time_K[-1]))}, imported from "
            f"{escape(run.imported.source)}"
        )
    tokens = (
        "unknown number of" if last.consumed_tokens is None else number(last.consumed_tokens, ",")
    )
    return (
        f"{number(len(inputs.run.records), ',')}, from step {number(first.step, ',')} to "
        f"{number(last.step, ',')} ({tokens} training tokens)"
    )


def _non_finite(counts: NonFiniteLosses) -> str:
    """Return a warning that losses are NaN or infinite; nothing if all are finite."""
    if not counts.losses:
        return ""
    return paragraph(
        f"NaN or infinite: {plural(counts.losses, 'loss', 'losses')} of "
        f"{plural(counts.tokens, 'token')}. These tokens count as unfitted, and every mean "
        "leaves them out.",
        "warning",
    )


def _left_out_probes(steps: Sequence[int]) -> str:
    """Return a warning that the fits leave out probes at these steps; empty without such probes."""
    if not steps:
        return ""
    named = ", ".join(number(step, ",") for step in steps)
    return paragraph(
        f"The analysis leaves out the probes at steps {named}: they have no finite loss.", "warning"
    )


def _note_on_units(tokens: WatchedTokens) -> str:
    """Return a sentence on what stands in for documents; nothing where they are known."""
    note = tokens.note_on_units()
    return "" if note is None else paragraph(f"{note[:1].upper()}{note[1:]}.")


def _datasets(inputs: ReportInputs) -> str:
    tokens = inputs.run.tokens
    cluster_N, kind = tokens.cluster_N, tokens.unit_kind
    rows = []
    for d, name in enumerate(tokens.datasets):
        inside = tokens.dataset_N == d
        clusters = len(np.unique(cluster_N[inside]))
        rows.append([dataset(d, name), number(int(inside.sum()), ","), number(clusters, ",")])
    return table(
        f"Watched tokens of each dataset, and the {kind} that they come from.",
        ["dataset", "tokens", kind],
        rows,
    )


_LOSS_LINES: Final = "The lines show the mean loss of the watched tokens, in nats, at every probe."
_TRAINING_LOSS: Final = (
    " The grey dots show the training loss of the step before each probe. They are noisy, because "
    "they are losses of one batch, and that batch is other text."
)
_STEP_0: Final = (
    "The probe at step 0, before training, is the single point left of the dotted line."
)


def loss_section(inputs: ReportInputs) -> list[Section]:
    """Return the section with the loss curve and the losses at its ends."""
    tokens = inputs.run.tokens
    arrays = inputs.spectrum.arrays
    curves = [
        ("all probe tokens", arrays.mean_loss_K),
        *((dataset(d, name), arrays.mean_loss_DK[d]) for d, name in enumerate(tokens.datasets)),
    ]
    rows = [
        [name, number(loss_K[0]), number(loss_K[-1]), number(loss_K[0] - loss_K[-1])]
        for name, loss_K in curves
    ]
    parts = [
        paragraph(_LOSS_LINES + ("" if inputs.run.imported else _TRAINING_LOSS)),
        figure(
            _loss_figure(inputs),
            (_STEP_0 if inputs.run.time_K()[0] == 0 else "")
            + left_out(largest_datasets(tokens), tokens),
        ),
        table("Mean losses in nats per token.", ["", "first probe", "last probe", "fall"], rows),
    ]
    return [Section("loss", "Loss curve", "Loss curve", parts)]


def _loss_figure(inputs: ReportInputs) -> str:
    """Draw the mean probe loss, overall and per dataset, and the training loss against time."""
    run, arrays = inputs.run, inputs.spectrum.arrays
    time_K = time_of(arrays.x_K)
    scale = TimeScale.from_times(time_K)
    training_K = np.array([record.training_loss for record in run.records])

    def paint(figure: Figure) -> None:
        axes = figure.add_subplot()
        place_K = scale.place(time_K)
        axes.plot(place_K, training_K, ".", ms=3, color=NULL, label="training loss of the step")
        for d, name in largest_datasets(run.tokens).items():
            _curve(axes, scale, time_K, arrays.mean_loss_DK[d], dataset_colour(d), name, d)
        _curve(axes, scale, time_K, arrays.mean_loss_K, MEASURED, "all probe tokens")
        time_axis(axes, scale, time_label(inputs.time))
        axes.set_ylabel("mean loss (nats per token)")
        axes.legend()

    return draw("loss", "Mean probe loss against training time", 3.4, paint)


def _curve(
    axes: Axes,
    scale: TimeScale,
    time_K: Floats,
    loss_K: Floats,
    colour: str,
    name: str,
    dataset: int = 0,
) -> None:
    """Draw a line through the probes after step 0, and step 0 as a point at its own place."""
    later = time_K > 0
    line = dataset_line(dataset)
    axes.plot(time_K[later], loss_K[later], ls=line, marker=".", ms=3, color=colour, label=name)
    axes.plot(scale.place(time_K)[~later], loss_K[~later], "o", ms=4, color=colour)
