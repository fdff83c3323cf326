"""The scores of a job's data as tables for a terminal."""

from collections.abc import Sequence

from megatron_tokscale.reweight.plan_text import aligned
from megatron_tokscale.reweight.scoring import ScoreSummary

_NONE = "–"  # for a number that is not known


def describe_scores(summaries: Sequence[ScoreSummary]) -> str:
    """Return tables of each dataset's scores, and of the errors of predicted ones."""
    header = ["dataset", "documents", "watched", "predicted", "drop", "never learned"]
    header += ["tokens until learned: 25%", "50%", "75%"]
    lines = aligned([header, *map(_row, summaries)])
    lines.append(
        "drop: nats per token; tokens until learned: quartiles over documents, in tokens that the "
        "reference run had consumed"
    )
    errors = [row for summary in summaries for row in _errors(summary)]
    if errors:
        lines.append("")
        header = ["predicted", "documents", "R2", "rank correlation", "error", "error of the mean"]
        lines += aligned([header, *errors])
        lines.append(
            "on documents held out in five folds; error: root mean square, of ln(tokens), nats or "
            "a share"
        )
    lines.append("")
    lines += [f"{summary.path}  {summary.fingerprint}" for summary in summaries]
    return "\n".join(lines) + "\n"


def _row(summary: ScoreSummary) -> list[str]:
    counts = [f"{n:,}" for n in (summary.documents, summary.watched, summary.predicted)]
    never = _NONE if summary.unlearned is None else f"{100 * summary.unlearned:.1f}%"
    times = [f"{time:.3g}" for time in summary.learning_time or ()] or [_NONE] * 3
    return [summary.dataset, *counts, _number(summary.drop), never, *times]


def _errors(summary: ScoreSummary) -> list[list[str]]:
    return [
        [
            f"{summary.dataset}: {name.replace('_', ' ')}",
            f"{errors.documents:,}",
            *map(_number, (errors.r2, errors.spearman, errors.rmse, errors.rmse_of_mean)),
        ]
        for name, errors in (summary.held_out or {}).items()
    ]


def _number(value: float | None) -> str:
    return _NONE if value is None else f"{value:.3f}"
