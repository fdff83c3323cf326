"""The rule by which the columns of a table of losses are found."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.laws.tables.read_table import Table

STEP_NAMES: Final = ("step", "global_step", "iteration", "iter", "train_step", "steps")
TOKENS_NAMES: Final = ("tokens", "total_tokens", "consumed_tokens", "tokens_seen", "num_tokens")
LR_NAMES: Final = ("learning_rate", "lr", "learning_rate_group0", "lr_group0")
"""Plain names of the columns, preferred first (`plain_name`)."""
_NO_LOSS: Final = re.compile(
    r"(learning_rate|lr|wall_time|relative_time|time|timestamp|runtime|epoch|grad_norm|"
    r"gradient_norm|.*tokens|.*loss_scale|.*__min|.*__max|(\w+_)?(global|train|optimizer)_steps?|"
    r"iteration|iter|steps?)(_.*)?"
)
"""Plain names that are never losses; W&B adds __MIN and __MAX to the columns of a chart."""


@dataclass(frozen=True)
class ColumnNames:
    """Names of columns that the user gives; None where the rule finds them.

    Attributes:
        step: column of the optimizer step.
        tokens: column of the tokens trained on so far.
        learning_rate: column of the learning rate.
        losses: columns of losses in nats; empty for the rule.
    """

    step: str | None = None
    tokens: str | None = None
    learning_rate: str | None = None
    losses: tuple[str, ...] = ()


@dataclass(frozen=True)
class FoundColumns:
    """Names of the columns of one table.

    Attributes:
        step: column of the optimizer step; None without one.
        tokens: column of the tokens; None without one.
        learning_rate: column of the learning rate; None without one.
        losses: columns of losses, at least one.
    """

    step: str | None
    tokens: str | None
    learning_rate: str | None
    losses: tuple[str, ...]


def plain_name(name: str) -> str:
    """Return the part of a name behind its last slash, in small letters, digits and underscores.

    "_step" and "Step" become "step", "optim/learning_rate_group0" becomes "learning_rate_group0".
    """
    last = name.rsplit("/", 1)[-1].lower()
    return re.sub("[^a-z0-9]", "_", last).strip("_")


def find_columns(table: Table, given: ColumnNames) -> FoundColumns:
    """Find the columns of a table.

    A given name is taken as it is. Else the step is the column whose plain name is the first of
    `STEP_NAMES` that there is; tokens and learning rate likewise. Losses are all other columns of
    numbers whose name contains "loss"; if none does, all other columns of numbers. Columns of
    learning rates, times, norms, tokens, and W&B's __MIN and __MAX are never taken for losses.

    Raises:
        TokscaleError: a given column is not there, two columns have the same plain name, or there
            are no losses.
    """
    for name in (given.step, given.tokens, given.learning_rate, *given.losses):
        if name is not None:
            table.column(name)
    step = given.step or _first(table, STEP_NAMES, "--step-column")
    tokens = given.tokens or _first(table, TOKENS_NAMES, "--tokens-column")
    rate = given.learning_rate or _first(table, LR_NAMES, "--lr-column")
    losses = given.losses or _losses(table, (step, tokens, rate))
    if not losses:
        raise TokscaleError(
            f"{table.path} has no column of losses; its columns of numbers are "
            f"{', '.join(table.names) or 'none'}; give --loss-column"
        )
    return FoundColumns(step, tokens, rate, losses)


def _first(table: Table, wanted: Sequence[str], flag: str) -> str | None:
    plain = [plain_name(name) for name in table.names]
    for each in wanted:
        found = [name for name, is_name in zip(table.names, plain, strict=True) if is_name == each]
        if len(found) > 1:
            raise TokscaleError(
                f"the columns {' and '.join(found)} of {table.path} may both be meant; give {flag}"
            )
        if found:
            return found[0]
    return None


def _losses(table: Table, taken: Sequence[str | None]) -> tuple[str, ...]:
    others = [
        name
        for name in table.names
        if name not in taken and not _NO_LOSS.fullmatch(plain_name(name))
    ]
    named = [name for name in others if "loss" in name.lower()]
    return tuple(named or others)
