"""A clock that several runs have in common.

Shapes: K probe steps.
"""

from collections.abc import Sequence

from megatron_tokscale.core.arrays import Floats
from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.store import Run
from megatron_tokscale.store.reader import Time


def common_clock(runs: Sequence[Run], clocks: Sequence[Time]) -> tuple[Time, list[Floats]] | None:
    """Return the first clock that every run has a record of, and x_K of each run on it.

    Args:
        runs: the runs.
        clocks: clocks by preference.

    Returns:
        The clock and x at the probes of each run; None if the runs have none of the clocks.
    """
    for clock in clocks:
        try:
            return clock, [run.x_K(clock) for run in runs]
        except TokscaleError:  # a run without a record of it: the next clock
            continue
    return None
