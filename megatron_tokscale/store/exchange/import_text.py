"""A summary of an import for a terminal: what is there, and what will not work without the rest."""

from collections.abc import Sequence

from megatron_tokscale.core.words import counted
from megatron_tokscale.store.exchange.import_run import ImportSummary
from megatron_tokscale.store.tokens import WatchedTokens


def describe_imports(summaries: Sequence[ImportSummary]) -> str:
    """Return size and axis of imported runs, and once what is known of their tokens, as lines."""
    lines: list[str] = []
    for k, summary in enumerate(summaries):
        lines += _size_and_axis(summary)
        about = _about_tokens(summary)
        if k == len(summaries) - 1 or about != _about_tokens(summaries[k + 1]):
            lines += about
    return "\n".join(lines)


def _size_and_axis(summary: ImportSummary) -> list[str]:
    imported = summary.imported
    values = [column.value for column in imported.columns]
    lines = [
        f"{summary.path}: {counted(summary.tokens.n_tokens, 'token')} at "
        f"{counted(len(values), 'value')} of {imported.named}, from {values[0]:g} to "
        f"{values[-1]:g}",
        *_what_a_column_is(summary),
    ]
    if len(set(values)) < len(values):
        shared = counted(sum(values.count(value) > 1 for value in values), "column")
        lines.append(f"  {shared} share a value with another")
    if summary.non_finite:
        bad = counted(summary.non_finite, "loss", "losses")
        lines.append(f"  {bad} {'is' if summary.non_finite == 1 else 'are'} NaN or infinite, kept")
    if summary.negative:
        below = counted(summary.negative, "loss", "losses")
        lines.append(
            f"  {below} {'is' if summary.negative == 1 else 'are'} below 0: if the losses are log "
            "probabilities, import their negative"
        )
    if summary.unused:
        lines.append(f"  not imported: the arrays {', '.join(summary.unused)}")
    if summary.manifest:
        lines.append(f"  manifest: {summary.manifest}")
    return lines


def _about_tokens(summary: ImportSummary) -> list[str]:
    return [
        f"  there: {_listed(known(summary))}",
        *map("  not there: {}".format, gaps(summary)),
    ]


def _what_a_column_is(summary: ImportSummary) -> list[str]:
    if summary.imported.axis == "T":
        return [f"  one run over time; next: megatron-tokscale fit {summary.path}"]
    return [
        "  a column per run, no probes along T: learned or not, time to the threshold and falls by",
        f"  group, without a fit; next: megatron-tokscale spectrum {summary.path}",
        "  a shift of the clock needs a matrix along T of every run",
    ]


def known(summary: ImportSummary) -> list[str]:
    """Return what is known of the tokens and of the axis."""
    tokens = summary.tokens
    columns = {
        "text": tokens.probe_set,
        "documents": tokens.document_N,
        "samples": tokens.sample_N,
        "positions": tokens.position_N,
        "contexts": tokens.context_N,
        "labels": tokens.label_N,
    }
    found = [name for name, column in columns.items() if column is not None]
    if _names_datasets(tokens):
        found.insert(0, counted(len(tokens.datasets), "dataset"))
    return [*found, "step 0"] if _has_step_0(summary) else found


def gaps(summary: ImportSummary) -> list[str]:
    """Return what is not known, each with what does not work without it."""
    tokens, found = summary.tokens, []
    if tokens.probe_set is None:
        found.append("text: no score, no plan, no trace, no text of the report's examples")
    if not _names_datasets(tokens):
        found.append("datasets: all tokens are one dataset")
    if (note := tokens.note_on_units()) is not None:
        found.append(note.replace(" are not known", "", 1))
    if tokens.label_N is None:
        found.append("labels: no groups by frequency, no frequency in laws")
    if tokens.context_N is None:
        found.append("contexts: no groups by position, no gamma in laws")
    if summary.imported.axis == "T" and not _has_step_0(summary):
        found.append(
            "step 0: the spectrum starts at the first probe, and the fall before it is unknown"
        )
    if summary.imported.unit is None:
        found.append("the unit of the axis: times are in its own numbers")
    return found


def _names_datasets(tokens: WatchedTokens) -> bool:
    return tokens.probe_set is not None or len(tokens.datasets) > 1 or tokens.datasets != ("all",)


def _has_step_0(summary: ImportSummary) -> bool:
    return summary.imported.axis == "T" and summary.imported.columns[0].value == 0


def _listed(names: list[str]) -> str:
    return ", ".join(names) if names else "the losses alone"
