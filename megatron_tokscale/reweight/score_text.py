"""The scores of a job's data as tables for a terminal."""

from collections.abc import Sequence

from megatron_tokscale.core.words import aligned
from megatron_tokscale.reweight.halves import QUARTER
from megatron_tokscale.reweight.scoring import ScoreSummary

_NONE = "–"  # for a number that is not known
_TARGET_TITLE = "target: loss of the reference less that of the tuned run, in nats per token"
_RELIABILITY_NOTE = (
    "CV^2: variance of the true scores between documents over the squared mean; reliability: "
    "squared correlation of a score with the true one, of watched documents by split halves "
    "(with --second by two seeds), of predicted ones on held-out documents"
)
_RELIABILITY_HEADER = [
    *("dataset", "documents", "watched", "predicted", "mean", "CV^2"),
    *("reliability: watched", "predicted"),
]


def describe_scores(summaries: Sequence[ScoreSummary]) -> str:
    """Return tables of each dataset's scores, and of the errors of predicted ones."""
    lines = []
    for name, title in (("fall", _fall_title(summaries)), ("target", _TARGET_TITLE)):
        if rows := [_reliability_row(one, name) for one in summaries if name in one.reliability]:
            lines += [title, *aligned([_RELIABILITY_HEADER, *rows])]
            lines += [_RELIABILITY_NOTE, ""]
    if any(summary.drop is not None for summary in summaries):
        header = ["dataset", "documents", "watched", "predicted", "drop", "never learned"]
        header += ["tokens until learned: 25%", "50%", "75%"]
        lines += aligned([header, *map(_row, summaries)])
        lines.append(
            "drop: nats per token; tokens until learned: quartiles over documents, in tokens that "
            "the reference run had consumed"
        )
        lines.append("")
    errors = [row for summary in summaries for row in _errors(summary)]
    if errors:
        header = ["predicted", "documents", "R2", "rank correlation", "error", "error of the mean"]
        lines += aligned([header, *errors])
        lines.append(
            "on documents held out in five folds; error: root mean square, of ln(tokens), nats or "
            "a share"
        )
        lines.append("")
    lines += [f"{summary.path}  {summary.fingerprint}" for summary in summaries]
    return "\n".join(lines) + "\n"


def _fall_title(summaries: Sequence[ScoreSummary]) -> str:
    early, late = summaries[0].fall_steps or (0, 0)
    return (
        f"fall: loss at step {early} (the probe nearest to a quarter, step {late / QUARTER:g}) "
        f"less loss at step {late}, in nats per token"
    )


def _reliability_row(summary: ScoreSummary, name: str) -> list[str]:
    found = summary.reliability[name]
    counts = [f"{n:,}" for n in (summary.documents, summary.watched, summary.predicted)]
    numbers: list[float | None] = [None] * 4
    if found.documents:
        spread = found.signal_variance / found.mean**2 if found.mean else None
        numbers = [found.mean, spread, found.watched, found.predicted]
    return [summary.dataset, *counts, *map(_number, numbers)]


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
