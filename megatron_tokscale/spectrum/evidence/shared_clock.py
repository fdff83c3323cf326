"""One clock for two runs: the sum of learning rates where both know it, else the fits' time.

Steps of two runs with other learning rates are worth different amounts of training; runs of one
size have about the same loss at the same sum of learning rates.

Shapes: K probe steps.
"""

from dataclasses import dataclass
from typing import Self

import numpy as np

from megatron_tokscale.core.arrays import Floats
from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.results import FittedRun
from megatron_tokscale.spectrum.common_clock import CLOCKS, check_units, common_clock
from megatron_tokscale.store.reader import Time


@dataclass(frozen=True)
class SharedClock:
    """Times of the probes of two runs on one clock.

    Attributes:
        time: the unit of the clock.
        source_x_K: natural logarithm of the clock at the source's probes; -inf at step 0.
        target_x_K: the same at the target's probes.
        source_fit_x_K: x of the source's fits at its probes.
    """

    time: Time
    source_x_K: Floats
    target_x_K: Floats
    source_fit_x_K: Floats

    @classmethod
    def of(cls, source: FittedRun, target: FittedRun) -> Self:
        """Return the clock of two runs.

        Raises:
            TokscaleError: one run has no learning rates, and the runs are fitted in different times
                or count in different units.
        """
        runs = source.run, target.run
        found = common_clock(runs, ("lr-sum",))
        if found is not None:
            clock, (source_x_K, target_x_K) = found
            return cls(clock, source_x_K, target_x_K, source.x_K)
        if source.time != target.time:
            known = common_clock(runs, CLOCKS)
            remedy = f"fit both with --time {known[0]}" if known else "import them with one unit"
            raise TokscaleError(
                f"{source.run.path} is fitted in {source.time}, {target.run.path} in "
                f"{target.time}, and the learning rates of one are not known; {remedy}"
            )
        check_units(runs, source.time)
        return cls(source.time, source.x_K, target.x_K, source.x_K)

    def place_K(self) -> Floats:
        """Return x of the source's fits at the time of each probe of the target.

        Between the source's probes it is interpolated; beyond them x advances as the clock does.
        """
        finite = np.isfinite(self.source_x_K)
        clock, fit = self.source_x_K[finite], self.source_fit_x_K[finite]
        inside_K = np.clip(self.target_x_K, clock[0], clock[-1])
        return np.asarray(np.interp(inside_K, clock, fit) + (self.target_x_K - inside_K))
