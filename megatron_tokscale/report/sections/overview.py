"""The head of the page: what was run, and how its loss fell."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from megatron_tokscale.report import figures
from megatron_tokscale.report.analysis import Analysis
from megatron_tokscale.report.largest import largest_datasets, left_out
from megatron_tokscale.report.markup import (
    dataset,
    escape,
    facts,
    figure,
    number,
    paragraph,
    plural,
    section,
    table,
)
from megatron_tokscale.report.scale import LABELS
from megatron_tokscale.store import Launch


def what_was_run(analysis: Analysis) -> str:
    """Model, layout, schedule, versions, probe set and time axis."""
    run = analysis.run
    info, tokens = run.info, run.probe_set
    seconds = sum(record.duration for record in run.records)
    rows = [
        ["Run", escape(f"{run.path.name} (id {info.run_id})")],
        ["Model", _settings(info.model)],
        *_launches(run.launches),
        ["Probes", _probes(analysis)],
        ["Time of the probes", f"{number(seconds, ',.1f')} s in all"],
        [
            "Probe set",
            f"{plural(tokens.n_tokens, 'token')} in {plural(tokens.n_sequences, 'sequence')} of "
            f"{number(tokens.seq_length, ',')}, vocabulary {number(tokens.vocab_size, ',')}, "
            f"fingerprint {tokens.fingerprint}",
        ],
        ["Time axis", f"x = ln time, time = {LABELS[analysis.time]}"],
    ]
    return section(
        "run",
        "What was run",
        paragraph("The settings of the training job, and which tokens its probes watched."),
        _non_finite(analysis.fit["non_finite"]),
        _left_out(analysis.fit["left_out"]),
        facts(rows),
        _datasets(analysis),
    )


_GROUPS = {
    "layout": "Parallel layout",
    "batch": "Batch",
    "learning_rate": "Learning rate",
    "seq_length": "Sequence length",
    "seed": "Seed",
    "schedule": "Probe schedule",
    "versions": "Versions",
}


def _launches(launches: Sequence[Launch]) -> Iterator[list[str]]:
    """Yield the settings of the first launch, and for each later one what it has changed."""
    known: dict[str, Any] = {}
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


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """Yield the groups of settings that differ, each with its changed values alone."""
    for name, title in _GROUPS.items():
        old, new = before.get(name), now.get(name)
        if old == new:
            continue
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            names = sorted(key for key in {*old, *new} if old.get(key) != new.get(key))
            new = {key: new[key] if _is_set(new.get(key)) else "none" for key in names}
        yield f"{title.lower()}: {_settings(new)}"


def _is_set(value: Any) -> bool:
    return value is not None and value is not False


def _settings(value: Any) -> str:
    """A group of settings in one line, those that are not set left out."""
    if not isinstance(value, Mapping):
        return escape(str(value))
    known = {
        name: f"{v:g}" if isinstance(v, float) else v for name, v in value.items() if _is_set(v)
    }
    titles = {name: name.replace("_", " ") for name in known}
    told = (titles[name] if v is True else f"{titles[name]} {v}" for name, v in known.items())
    return escape(", ".join(told))


def _probes(analysis: Analysis) -> str:
    first, last = analysis.run.records[0], analysis.run.records[-1]
    tokens = (
        "unknown number of" if last.consumed_tokens is None else number(last.consumed_tokens, ",")
    )
    return (
        f"{number(len(analysis.run.records), ',')}, from step {number(first.step, ',')} to "
        f"{number(last.step, ',')} ({tokens} training tokens)"
    )


def _non_finite(counts: Mapping[str, int]) -> str:
    if not counts["losses"]:
        return ""
    return paragraph(
        f"NaN or infinite: {plural(counts['losses'], 'loss', 'losses')} of "
        f"{plural(counts['tokens'], 'token')}. These tokens are counted as unfitted and left out "
        "of every mean.",
        "warning",
    )


def _left_out(steps: Sequence[int]) -> str:
    if not steps:
        return ""
    named = ", ".join(number(step, ",") for step in steps)
    return paragraph(f"Probes without any finite loss, left out: steps {named}.", "warning")


def _datasets(analysis: Analysis) -> str:
    tokens = analysis.run.probe_set
    rows = []
    for d, name in enumerate(tokens.datasets):
        inside = tokens.dataset_N == d
        documents = len(np.unique(tokens.document_N[inside]))
        rows.append([dataset(d, name), number(int(inside.sum()), ","), number(documents, ",")])
    return table(
        "Watched tokens, and the documents they are from.",
        ["dataset", "tokens", "documents"],
        rows,
    )


def loss_curve(analysis: Analysis) -> str:
    """The loss curve and its ends."""
    mean_K, mean_DK = analysis.arrays["mean_loss_K"], analysis.arrays["mean_loss_DK"]
    names = analysis.run.probe_set.datasets
    curves = [
        ("all probe tokens", mean_K),
        *((dataset(d, name), mean_DK[d]) for d, name in enumerate(names)),
    ]
    rows = [
        [name, number(loss_K[0]), number(loss_K[-1]), number(loss_K[0] - loss_K[-1])]
        for name, loss_K in curves
    ]
    return section(
        "loss",
        "Loss curve",
        paragraph(
            "Mean loss of the watched tokens in nats at every probe, and the training loss of the "
            "step before it (one batch: noisy, and of other text)."
        ),
        figure(
            figures.loss_curve(analysis),
            "The probe at step 0, before training, is the single point left of the dotted line."
            + left_out(largest_datasets(analysis.run.probe_set), analysis.run.probe_set),
        ),
        table("Nats per token.", ["", "first probe", "last probe", "fall"], rows),
    )
