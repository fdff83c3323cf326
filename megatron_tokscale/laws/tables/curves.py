"""Loss curves of one run from a table.

Shapes: R rows, K steps with a loss, J steps with a learning rate, T steps.
"""

from dataclasses import dataclass
from typing import Self

import numpy as np

from megatron_tokscale.core.arrays import Floats
from megatron_tokscale.core.errors import TokscaleError, UndefinedError
from megatron_tokscale.laws.deceleration import merged_steps
from megatron_tokscale.laws.tables.columns import ColumnNames, FoundColumns, find_columns
from megatron_tokscale.laws.tables.manifest import TableFacts
from megatron_tokscale.laws.tables.read_table import Table, read_table

_MOST_STEPS = 10**8  # rates of so many steps take 1 GB


@dataclass(frozen=True)
class Curve:
    """One column of losses, by step.

    Attributes:
        name: name of the column.
        step_K: steps with a loss, ascending, each once.
        loss_K: their losses in nats; equal steps are merged by the mean.
        tokens: tokens trained on at the last of these steps; None if not known.
        n_missing: number of rows without a loss, or with one that is not finite.
        n_merged: number of rows that were merged into another one of the same step.
    """

    name: str
    step_K: Floats
    loss_K: Floats
    tokens: float | None
    n_missing: int
    n_merged: int


@dataclass(frozen=True)
class CurveTable:
    """The curves of one run's table, and its schedule.

    Attributes:
        facts: what is known about the run.
        columns: the columns that were found.
        n_rows: number of rows.
        n_without_step: number of rows without a step, which are left out.
        curves: a curve for each column with a finite loss.
        rate_T: learning rate of every step up to the last row, or why it is not known.
    """

    facts: TableFacts
    columns: FoundColumns
    n_rows: int
    n_without_step: int
    curves: tuple[Curve, ...]
    _step_J: Floats
    _rate_J: Floats

    @classmethod
    def read(cls, facts: TableFacts, names: ColumnNames) -> Self:
        """Read the table of a run, in any order of its rows.

        Without a column of steps, steps follow from the tokens and `facts.tokens_per_step`;
        without a column of tokens, tokens follow from the steps.

        Raises:
            TokscaleError: the table cannot be read, has no steps, or as in `find_columns`.
        """
        table = read_table(facts.file)
        columns = find_columns(table, names)
        step_R, tokens_R = _steps_and_tokens(table, columns, facts)
        known_R = np.isfinite(step_R)
        if not known_R.any():
            raise TokscaleError(f"{facts.file} has no step in any row; give --step-column")
        curves = tuple(
            _curve(name, step_R[known_R], tokens_R[known_R], table.column(name)[known_R])
            for name in columns.losses
            if np.isfinite(table.column(name)[known_R]).any()
        )
        if not curves:
            raise TokscaleError(f"{facts.file} has no finite loss in any row; give --loss-column")
        rate_R = (
            np.full(len(step_R), np.nan)
            if columns.learning_rate is None
            else table.column(columns.learning_rate)
        )
        has_rate_R = known_R & np.isfinite(rate_R)
        step_J, rate_J = merged_steps(step_R[has_rate_R], rate_R[has_rate_R])
        return cls(
            facts,
            columns,
            len(step_R),
            int((~known_R).sum()),
            curves,
            step_J,
            rate_J,
        )

    def rates(self) -> Floats:
        """Return the learning rate of every step (T).

        The rate is linear between the rows, rises linearly from 0 at step 0 to the first row's, and
        is the last row's behind it (our choice). A jump between two rows becomes a slope.

        Raises:
            UndefinedError: the table has no learning rates, or too many steps.
        """
        if not len(self._step_J):
            raise UndefinedError(f"the table of {self.facts.name} has no learning rates")
        last = max(float(curve.step_K[-1]) for curve in self.curves)
        if last > _MOST_STEPS:
            raise UndefinedError(
                f"the table of {self.facts.name} ends at step {last:,.0f}; the schedule of more "
                f"than {_MOST_STEPS:,} steps is not computed"
            )
        step_J, rate_J = self._step_J, self._rate_J
        if step_J[0] > 0:
            step_J, rate_J = np.append(0.0, step_J), np.append(0.0, rate_J)
        return np.interp(np.arange(1, int(last) + 1), step_J, rate_J)


def _steps_and_tokens(
    table: Table, columns: FoundColumns, facts: TableFacts
) -> tuple[Floats, Floats]:
    """Return the step and the tokens of every row; NaN where they are not known."""
    per_step = facts.tokens_per_step
    step = None if columns.step is None else table.column(columns.step)
    tokens = None if columns.tokens is None else table.column(columns.tokens)
    if step is None and tokens is not None and per_step is not None:
        step = np.round(tokens / per_step)
    if step is None:
        raise TokscaleError(
            f"{table.path} has no column of steps; its columns of numbers are "
            f"{', '.join(table.names) or 'none'}; give --step-column"
        )
    known_R = np.isfinite(step)
    if (step[known_R] < 0).any() or (step[known_R] % 1 != 0).any():
        raise TokscaleError(
            f"column '{columns.step}' of {table.path} holds no steps; expected whole numbers from "
            "0; give --step-column"
        )
    if tokens is None:
        tokens = np.full(len(step), np.nan) if per_step is None else step * per_step
    return step, tokens


def _curve(name: str, step_R: Floats, tokens_R: Floats, loss_R: Floats) -> Curve:
    """Return the curve of a column; rows without a finite loss are left out."""
    kept_R = np.isfinite(loss_R)
    step_K, loss_K = merged_steps(step_R[kept_R], loss_R[kept_R])
    last = float(np.nanmax(tokens_R[kept_R], initial=0.0))
    return Curve(
        name=name,
        step_K=step_K,
        loss_K=loss_K,
        tokens=last or None,
        n_missing=int((~kept_R).sum()),
        n_merged=int(kept_R.sum()) - len(step_K),
    )
