"""A plan as a table for a terminal.

Shapes: Z strata.
"""

from typing import Final

import numpy as np

from megatron_tokscale.data import Plan

_COLUMNS: Final = 7


def describe(plan: Plan, train_samples: int | None = None) -> str:
    """Weights in percent at up to seven stages, and what is drawn by the end of training.

    Args:
        plan: the plan.
        train_samples: length of the training; by default what the plan was made for. Without
            either there are no columns for draws and epochs.
    """
    made_for = plan.provenance.get("train_samples")
    end = train_samples or (made_for if isinstance(made_for, int) else None)
    stages = [plan.segments[i] for i in _spread(len(plan.segments))]
    header = ["from sample", *(f"{stage.start:,}" for stage in stages)]
    rows = [
        [stratum.name, *(f"{100 * stage.weights[z]:.2f}%" for stage in stages)]
        for z, stratum in enumerate(plan.strata)
    ]
    if end is not None:
        header += ["samples", "epochs"]
        rows = [row + totals for row, totals in zip(rows, _totals(plan, end), strict=True)]
    lines = [_title(plan, end), *_aligned([header, *rows])]
    if end is not None:
        lines.append("epochs are estimated from the sizes of the datasets")
    return "\n".join(lines) + "\n"


def _title(plan: Plan, end: int | None) -> str:
    policy = plan.provenance.get("policy", "unknown policy")
    count = len(plan.segments)
    title = f"plan {plan.fingerprint} ({policy}): {plan.n_strata} strata of {len(plan.datasets)} "
    title += f"datasets, {count} stage{'s' if count > 1 else ''}, {plan.seq_length} tokens a sample"
    return title if end is None else f"{title}, {end:,} samples"


def _spread(count: int) -> list[int]:
    """At most seven of range(count), first and last included."""
    return sorted({int(i) for i in np.linspace(0, count - 1, min(count, _COLUMNS)).round()})


def _totals(plan: Plan, end: int) -> list[list[str]]:
    """Samples and epochs of each stratum; strata of one dataset are taken to share it evenly."""
    fraction = float(plan.provenance.get("train_fraction", 1.0))
    shared_Z = np.bincount(plan.dataset_Z, minlength=len(plan.datasets))[plan.dataset_Z]
    tokens_Z = np.array([plan.datasets[d].n_tokens for d in plan.dataset_Z], dtype=np.float64)
    epoch_Z = tokens_Z * fraction / plan.seq_length / shared_Z
    draws_Z = plan.target_Z(end)
    return [
        [f"{draws:,.0f}", f"{draws / epoch:.2f}" if epoch > 0 else "?"]
        for draws, epoch in zip(draws_Z, epoch_Z, strict=True)
    ]


def _aligned(table: list[list[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    return [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in table
    ]
