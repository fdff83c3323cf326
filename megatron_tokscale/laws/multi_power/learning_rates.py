"""Learning rate of every step of a run, from its launches, checked against its probes' records.

Shapes: T steps, K probe steps.
"""

import numpy as np

from megatron_tokscale.core.arrays import Floats
from megatron_tokscale.core.errors import TokscaleError, UndefinedError
from megatron_tokscale.store import Run

_TOLERANCE = 1e-3  # relative difference from the recorded sums, which are rounded


def learning_rates(run: Run) -> Floats:
    """Return the rate that Megatron's scheduler gave each step, launch by launch.

    Raises:
        UndefinedError: the run has no record of the settings of all its steps, or the summed
            learning rates differ from those recorded at the probes.
    """
    n_steps = int(run.step_K[-1])
    launches = [launch for launch in run.launches if launch.step < n_steps] or run.launches[:1]
    start = launches[0].step if launches else n_steps
    if start > 0 or not launches:
        raise UndefinedError(
            f"the learning rates of {run.path} before step {start} are not known: the checkpoint "
            f"that it started from does not hold them"
        )
    ends = [*(launch.step for launch in launches[1:]), n_steps]
    try:
        rate_T = np.concatenate(
            [launch.rates(end - launch.step) for launch, end in zip(launches, ends, strict=True)]
        )
    except TokscaleError as error:
        raise UndefinedError(f"the learning rates of {run.path} are not known: {error}") from error
    _check_sums(run, rate_T)
    return rate_T


def _check_sums(run: Run, rate_T: Floats) -> None:
    sum_K = np.concatenate([[0.0], np.cumsum(rate_T)])[run.step_K]
    recorded_K = np.array([record.lr_sum for record in run.records])
    tolerance = _TOLERANCE * run.peak_learning_rate
    is_right_K = np.isclose(sum_K, recorded_K, rtol=_TOLERANCE, atol=tolerance)
    if is_right_K.all():
        return
    k = int(np.argmin(is_right_K))
    reason = (
        "the run has no record of it"
        if np.isnan(recorded_K[k])
        else "updates were skipped, or the rate was not set by Megatron's scheduler alone"
    )
    raise UndefinedError(
        f"the learning rates of {run.path} are not those of its run.json: they sum up to "
        f"{sum_K[k]:g} by step {run.step_K[k]}; expected the recorded {recorded_K[k]:g} ({reason})"
    )
