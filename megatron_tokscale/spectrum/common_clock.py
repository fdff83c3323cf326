"""A clock that several runs have in common.

Shapes: K probe steps.
"""

from collections.abc import Sequence
from typing import Final

from megatron_tokscale.core.arrays import Floats
from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.store import Run
from megatron_tokscale.store.reader import Time

CLOCKS: Final[tuple[Time, ...]] = ("tokens", "step", "axis")
"""Clocks by preference: time saved is data saved. An imported run may have no time but its axis."""


def common_clock(runs: Sequence[Run], clocks: Sequence[Time]) -> tuple[Time, list[Floats]] | None:
    """Return the first clock that every run has a record of, and x_K of each run on it.

    Args:
        runs: the runs.
        clocks: clocks by preference.

    Returns:
        The clock and x at the probes of each run; None if the runs have none of the clocks.

    Raises:
        TokscaleError: see `check_units`.
    """
    for clock in clocks:
        try:
            found = clock, [run.x_K(clock) for run in runs]
        except TokscaleError:  # a run without a record of it: the next clock
            continue
        check_units(runs, clock)
        return found
    return None


def check_units(runs: Sequence[Run], clock: Time) -> None:
    """Refuse imported runs whose axes have different units.

    Raises:
        TokscaleError: see above; the message names the first run that differs.
    """
    names = [run.time_name(clock) for run in runs]
    for run, name in zip(runs, names, strict=True):
        if name != names[0]:
            raise TokscaleError(
                f"{run.path} counts {name}, {runs[0].path} counts {names[0]}; expected one unit of "
                "time; import the runs with the same one"
            )
