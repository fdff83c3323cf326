"""Mean curves of several runs on one clock, as one list of points.

Shapes: I runs, P points (the probes of all runs, one after the other), C cells of tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np

from megatron_tokscale.core.arrays import Floats, Integers, Mask
from megatron_tokscale.core.errors import UndefinedError

LEAST_PROBES = 4
"""Fewest probes of a run that takes part in the shift model: fewer show no form of a curve."""


@dataclass(frozen=True)
class Points:
    """Places of the probes of all runs.

    Attributes:
        x_P: the clock at each probe, the natural logarithm of time; finite.
        run_P: run of each probe.
        u_I: ln size of each run minus that of the largest, so at most 0; equal sizes are allowed.
    """

    x_P: Floats
    run_P: Integers
    u_I: Floats

    @classmethod
    def of_runs(cls, x_I: Sequence[Floats], log_size_I: Floats) -> Self:
        """Return the points of runs from each run's clock and ln size."""
        run_P = np.repeat(np.arange(len(x_I)), [len(x_K) for x_K in x_I])
        return cls(np.concatenate(x_I), run_P, log_size_I - log_size_I.max())

    @property
    def u_P(self) -> Floats:
        """Return ln size of each point's run, relative to the largest."""
        return np.asarray(self.u_I[self.run_P])

    @property
    def n_runs(self) -> int:
        """Return the number of runs."""
        return len(self.u_I)

    def without(self, run: int) -> Mask:
        """Return the mask of the points of all other runs."""
        return np.asarray(self.run_P != run)

    def rows(self, kept_P: Mask) -> "Points":
        """Return some of the points; the runs keep their numbers."""
        return Points(self.x_P[kept_P], self.run_P[kept_P], self.u_I)

    def check(self) -> None:
        """Refuse points that hold no shift.

        Raises:
            UndefinedError: fewer than three runs, one size only, or runs with too few probes.
        """
        runs, probes = np.unique(self.run_P, return_counts=True)
        if len(runs) < 3:
            raise UndefinedError(
                f"{len(runs)} runs have probes along T; a shift of the clock needs 3 or more runs"
            )
        if len(np.unique(self.u_I[runs])) < 2:
            raise UndefinedError("all runs have one size; a shift over the axis needs two or more")
        if probes.min() < LEAST_PROBES:
            raise UndefinedError(
                f"a run has {probes.min()} probes along T; a shift of the clock needs "
                f"{LEAST_PROBES} or more in every run"
            )
