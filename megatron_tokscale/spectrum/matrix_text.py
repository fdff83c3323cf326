"""The results of a matrix along D or M as tables for a terminal."""

from typing import Final

from megatron_tokscale.results.estimate import Estimate
from megatron_tokscale.results.matrix import MatrixSummary

_MOST_ROWS: Final = 24  # rows of a table that a terminal shows without scrolling


def describe_matrix(summary: MatrixSummary) -> str:
    """Return mean losses and shares of learned tokens along the axis, and falls by group."""
    axis = f"{summary.axis}, {summary.unit}" if summary.unit else summary.axis
    lines = [
        f"{summary.n_tokens:,} tokens of {sum(each.runs for each in summary.values)} runs along "
        f"{axis}; 95% intervals over {summary.n_units:,} {summary.unit_kind}",
        f"  learned: isotonic loss at most {summary.threshold:.3g} nats",
        f"  {summary.axis:>12} {'runs':>5}  {'mean loss (nats)':<26} learned by then",
    ]
    step = -(-len(summary.values) // _MOST_ROWS)
    shown = summary.values[::-step][::-1]  # the largest value is shown in any case
    lines += [
        f"  {each.value:>12.4g} {each.runs:>5}  {_number(each.loss):<26} {_share(each.learned)}"
        for each in shown
    ]
    if len(shown) < len(summary.values):
        lines.append(f"  (every {step}th of {len(summary.values)} values)")
    lines.append(f"  fall from the smallest value to the largest: {_number(summary.fall)} nats")
    if summary.groups:
        lines.append(f"  {'group':<38} {'tokens':>10}  {'fall (nats)':<26} learned by the end")
    lines += [
        f"  {_cut(f'{each.grouping} {each.name}'):<38} {each.tokens:>10,}  "
        f"{_number(each.fall):<26} {_share(each.learned)}"
        for each in summary.groups
    ]
    if summary.left_out:
        lines.append(
            f"  {summary.left_out:,} tokens have a loss that is NaN or infinite and are left out"
        )
    return "\n".join(lines)


def _number(value: Estimate) -> str:
    interval = f" [{value.low:.3f}, {value.high:.3f}]" if value.has_interval else ""
    return f"{value.value:.3f}{interval}"


def _share(value: Estimate) -> str:
    interval = f" [{value.low:.1%}, {value.high:.1%}]" if value.has_interval else ""
    return f"{value.value:.1%}{interval}"


def _cut(name: str) -> str:
    return name if len(name) <= 38 else f"{name[:35]}..."
