"""The runs of an axis: their sizes, their order, their common clock, and the branches of a trunk.

Shapes: I runs by ascending size, K probes of a run.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from megatron_tokscale.core.arrays import Floats, Mask
from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.core.model_size import SIZE_KEYS, ModelSize
from megatron_tokscale.results.axis import AxisOfRuns
from megatron_tokscale.spectrum.common_clock import CLOCKS, common_clock
from megatron_tokscale.spectrum.scored_range import DECAYED, probe_rates
from megatron_tokscale.store import Run, check_different_runs, check_same_tokens
from megatron_tokscale.store.reader import Time

LEAST_RUNS: Final = 3
"""Fewest runs of an axis (our choice): two show no trend that could fail."""
_CLOCKS: Final[tuple[Time, ...]] = ("lr-sum", *CLOCKS)
"""Clocks by preference. Between runs with other learning rates, time is the summed rate."""
_LEAST_SHARED: Final = 0.5
"""Share of a branch's steps that are the trunk's: a warm-up alone makes no branch (our choice)."""


@dataclass(frozen=True)
class AxisRuns:
    """Runs by ascending size, on one clock.

    Attributes:
        runs: the runs.
        size_I: each run's size; equal sizes are allowed.
        clock: unit of time of the clock: the first of lr-sum, tokens, step, and the unit of an
            imported axis that all runs know.
        x_I: the clock at the probes of each run; -inf at step 0.
        trunk: index of the trunk; None if no run is a branch.
        branch_I: step of the trunk at which each run branches off; None for other runs.
    """

    runs: Sequence[Run]
    size_I: Floats
    clock: Time
    x_I: Sequence[Floats]
    trunk: int | None
    branch_I: Sequence[int | None]

    @classmethod
    def of(
        cls, runs: Sequence[Run], axis: AxisOfRuns, size: ModelSize, trunk: Run | None
    ) -> "AxisRuns":
        """Order the runs, choose their clock, and find the branches.

        Raises:
            TokscaleError: fewer than three runs, a run that is given twice, one size only, an
                unknown size, other probe sets, no common unit of time, or a trunk that is not among
                the runs.
        """
        if len(runs) < LEAST_RUNS:
            raise TokscaleError(
                f"{len(runs)} runs are too few for an axis; expected {LEAST_RUNS} or more"
            )
        check_different_runs(runs)
        check_same_tokens(runs)
        sizes = [size_of(run, axis, size) for run in runs]
        if len(set(sizes)) == 1:
            raise TokscaleError(
                f"all {len(runs)} runs have the same size on the axis {axis}; expected two or more "
                "sizes; give runs of other sizes"
            )
        order = np.argsort(sizes, kind="stable")
        ordered = [runs[i] for i in order]
        found = common_clock(ordered, _CLOCKS)
        if found is None:
            raise TokscaleError(
                f"{ordered[0].path} and the other runs count time in different units; expected one "
                "that all of them know; import them with the same unit"
            )
        clock, x_I = found
        chosen = _chosen_trunk(ordered, trunk)
        branches: list[int | None] = [None] * len(ordered)
        if axis == "D" or trunk is not None:
            chosen, branches = _branches(ordered, chosen)
        size_I = np.array(sizes, dtype=np.float64)[order]
        return cls(ordered, size_I, clock, x_I, chosen, branches)

    @property
    def log_size_I(self) -> Floats:
        """Return the natural logarithm of each run's size."""
        return np.asarray(np.log(self.size_I))

    @property
    def point_I(self) -> Mask:
        """Return the mask of the runs whose last losses can be compared.

        A trunk at a high learning rate is no point beside branches whose rate has decayed: the
        decay alone lowers their losses.
        """
        mask_I = np.ones(len(self.runs), bool)
        branches = [i for i, step in enumerate(self.branch_I) if step is not None]
        if self.trunk is not None and branches:
            decayed = all(_has_decayed(self.runs[i]) for i in branches)
            mask_I[self.trunk] = not decayed or _has_decayed(self.runs[self.trunk])
        return mask_I

    @property
    def names(self) -> list[str]:
        """Return the names of the runs' directories."""
        return [run.path.name for run in self.runs]


def _has_decayed(run: Run) -> bool:
    """Return whether the learning rate has decayed by the last probe, as far as it is known."""
    rate_K = probe_rates(run)
    return bool(rate_K[-1] < DECAYED * np.nanmax(rate_K, initial=0.0))


def size_of(run: Run, axis: AxisOfRuns, size: ModelSize) -> float:
    """Return the size of a run on the axis.

    Raises:
        TokscaleError: the run has no probes, or no record of its size.
    """
    if not run.records:
        raise TokscaleError(f"{run.path} has no probes; train it, or leave it out")
    if axis == "D" and run.records[-1].consumed_tokens is None:
        raise TokscaleError(
            f"{run.path} has no record of its consumed tokens, which the axis D needs; "
            "leave the run out"
        )
    found = run.records[-1].consumed_tokens if axis == "D" else run.info.size.get(SIZE_KEYS[size])
    if not found:
        raise TokscaleError(
            f"run.json of {run.path} does not say how large its model is: an older version wrote "
            "it; leave the run out"
            if axis == "M"
            else f"the last probe of {run.path} is before training; train on, or leave the run out"
        )
    return float(found)


def _chosen_trunk(runs: Sequence[Run], trunk: Run | None) -> int | None:
    """Return the index of the trunk that the caller names."""
    if trunk is None:
        return None
    for i, run in enumerate(runs):
        if run.path.resolve() == trunk.path.resolve():
            return i
    raise TokscaleError(
        f"the trunk {trunk.path} is not among the runs of the axis; give it as a run too"
    )


def _branches(runs: Sequence[Run], chosen: int | None) -> tuple[int | None, list[int | None]]:
    """Return the trunk and each run's step of branching off; no trunk where there are no branches.

    A branch begins after step 0, or has the trunk's own losses for half of its steps or longer. The
    trunk is the run that is given, or else the one with most probes (and then the longest) of those
    that begin first.
    """
    first_I = [int(run.step_K[0]) for run in runs]
    trunk = chosen
    if trunk is None:
        earliest = [i for i, first in enumerate(first_I) if first == min(first_I)]
        trunk = max(earliest, key=lambda i: (len(runs[i].step_K), int(runs[i].step_K[-1])))
    steps = [_branch_step(runs[trunk], run) if i != trunk else None for i, run in enumerate(runs)]
    if chosen is not None:
        steps = [
            first_I[i] if step is None and i != trunk else step for i, step in enumerate(steps)
        ]
    return (trunk if any(step is not None for step in steps) else chosen), steps


def _branch_step(trunk: Run, run: Run) -> int | None:
    """Return the step at which a run leaves the trunk; None for a run of its own."""
    recorded = _recorded_branch_step(trunk, run)
    if recorded is not None:
        return recorded
    shared: int | None = None
    checksums, own = trunk.checksums(), run.checksums()
    for step, name in zip(run.step_K.tolist(), own, strict=True):
        if step == 0:
            continue  # two seeds of one initialization share the losses before training
        if checksums.get(name) != own[name]:
            break
        shared = int(step)
    if shared is not None and shared >= _LEAST_SHARED * run.step_K[-1]:
        return shared
    started = run.launches[0].step if run.launches else int(run.step_K[0])
    return int(started) if started > 0 and started >= int(trunk.step_K[0]) else None


def _recorded_branch_step(trunk: Run, run: Run) -> int | None:
    """Return the step of the first launch that is not the trunk's, if those before it are.

    A job that starts from a checkpoint of the trunk takes over the record of the trunk's launches.
    """
    common = 0
    for own, trunks in zip(run.launches, trunk.launches, strict=False):
        if not own.launch_id or own.launch_id != trunks.launch_id:
            break
        common += 1
    if not common or common == len(run.launches):
        return None
    return int(run.launches[common].step)
