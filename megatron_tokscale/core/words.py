"""Counts with their nouns, times and tables, in the texts that verbs print."""

import math
from collections.abc import Sequence
from typing import Final

_SHORT: Final = 1e7
"""Largest number that is printed with all its digits; our choice: longer ones break a table."""


def counted(count: int, one: str, many: str = "") -> str:
    """Return a count and its noun: "1 token", "3,010 tokens"."""
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def time_text(value: float) -> str:
    """Return a time on any axis in a few digits: "1,280", "0.25", "3.5e+10"."""
    if not math.isfinite(value) or not 100 <= abs(value) < _SHORT:
        return f"{value:.4g}"
    return f"{value:,.0f}"


def aligned(table: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a table with its first column to the left and the others to the right."""
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    return [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in table
    ]
