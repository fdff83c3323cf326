"""A plan for a terminal: its weights in a table, and drawn over training. At most 100 wide.

Shapes: Z strata.
"""

from typing import Final

import numpy as np

from megatron_tokscale.data import Plan
from megatron_tokscale.reweight.draw_plan import WIDTH, PlanRows, draw, live_starts, short
from megatron_tokscale.reweight.table import aligned

_COLUMNS: Final = 7


def describe(plan: Plan, train_samples: int | None = None) -> str:
    """Weights in percent at up to seven stages, and a picture of all of them.

    Args:
        train_samples: length of the training; by default what the plan was made for. Without
            either nothing is said of samples and epochs.
    """
    end = train_samples or plan.replanning.train_samples
    rows = PlanRows.from_plan(plan)
    lines = _title(plan, end)
    if rows.is_by_dataset:
        lines.append("more strata than fit: a line is a dataset")
    return "\n".join([*lines, "", *_table(plan, rows), "", *draw(plan, rows, end)]) + "\n"


def _title(plan: Plan, end: int | None) -> list[str]:
    control = plan.provenance.get("control")
    policy = f"policy {plan.provenance.get('policy', 'unknown')}"
    policy += f", control {control}" if control else ""
    length = f"samples of {plan.seq_length:,} tokens"
    length = length if end is None else f"{end:,} {length}"
    count = len(plan.segments)
    stages = f"{count} stage{'s' if count > 1 else ''}"
    lines = [
        f"plan {plan.fingerprint}: {policy}; {length}",
        f"{plan.n_strata} strata of {len(plan.datasets)} datasets, {stages}",
    ]
    if live := live_starts(plan):
        lines[-1] += f", {len(live)} decided while the job trained (*)"
    if plan.accepted:
        at = ", ".join(f"{acceptance.at:,}" for acceptance in plan.accepted)
        lines.append(f"accepted by a job in place of another plan at sample {at}")
    return lines


def _table(plan: Plan, rows: PlanRows) -> list[str]:
    live = live_starts(plan)
    names = [short(name) for name in rows.names]
    for n_columns in range(min(len(plan.segments), _COLUMNS), 0, -1):
        chosen = np.linspace(0, len(plan.segments) - 1, n_columns).round().astype(int)
        stages = [plan.segments[i] for i in sorted({*chosen.tolist()})]
        starts = [f"{stage.start:,}{'*' if stage.start in live else ''}" for stage in stages]
        weights = [rows.sums(plan.weight_Z(stage)) for stage in stages]
        table = [["from sample", *starts]]
        for row, name in enumerate(names):
            table.append([name, *(f"{100 * weight[row]:.2f}%" for weight in weights)])
        lines = aligned(table)
        if len(lines[0]) <= WIDTH:
            return lines
    return lines
