"""The check of the axis D: is the last loss of a run that of one long run at the same clock?

Runs that differ in length alone learn the same from the same data. With the summed learning rate as
the clock they lie on one curve, up to the gain of their decay: then one run holds the whole axis.

Shapes: R resamples of the documents (the first is the data as they are), K probes of the reference,
I other runs.
"""

from collections.abc import Sequence

import numpy as np

from megatron_tokscale.core.arrays import Floats
from megatron_tokscale.core.errors import UndefinedError
from megatron_tokscale.results.axis import ClockCheck, SameClock
from megatron_tokscale.results.estimate import Estimate
from megatron_tokscale.results.verdict import Claim, ClaimTest
from megatron_tokscale.spectrum.axes.axis_runs import AxisRuns
from megatron_tokscale.spectrum.axes.left_out import both_spreads
from megatron_tokscale.spectrum.interpolation import interpolated

SAME_CLOCK = Claim(
    "on the clock of the runs one curve holds them all, better than by steps", most=0
)


def check_same_clock(runs: AxisRuns, curve_IRK: Sequence[Floats]) -> ClockCheck:
    """Compare the last loss of every run with the curve of the trunk, or of the largest run.

    Args:
        runs: the runs.
        curve_IRK: mean loss curve (R, K) of each run at all its probes, in nats.

    Raises:
        UndefinedError: the clock is the step, or no last loss lies on the curve of the reference.
    """
    reference = len(runs.runs) - 1 if runs.trunk is None else runs.trunk
    reference_RK = curve_IRK[reference]
    with np.errstate(divide="ignore"):
        step_x_K = np.log(runs.runs[reference].step_K.astype(np.float64))
    rows, clock_RI, step_RI = [], [], []
    for i, run in enumerate(runs.runs):
        if i == reference:
            continue
        last_R = curve_IRK[i][:, -1]
        at_clock_R = curve_at(runs.x_I[reference], reference_RK, float(runs.x_I[i][-1])) - last_R
        at_step_R = curve_at(step_x_K, reference_RK, float(np.log(run.step_K[-1]))) - last_R
        rows.append(
            SameClock(
                name=run.path.name,
                branch_step=runs.branch_I[i],
                loss=float(last_R[0]),
                at_clock=Estimate.from_resamples(at_clock_R),
                at_step=Estimate.from_resamples(at_step_R),
            )
        )
        clock_RI.append(at_clock_R)
        step_RI.append(at_step_R)
    return _check(
        runs.runs[reference].path.name, tuple(rows), np.stack(clock_RI, 1), np.stack(step_RI, 1)
    )


def curve_at(x_K: Floats, loss_RK: Floats, x: float) -> Floats:
    """Return the losses at `x`, linear between the finite probes, (R,); NaN outside of them."""
    finite_K = np.isfinite(x_K)
    x_K, loss_RK = x_K[finite_K], loss_RK[:, finite_K]
    if len(x_K) < 2 or not x_K[0] <= x <= x_K[-1] + 1e-9:
        return np.full(len(loss_RK), np.nan)
    return interpolated(loss_RK, x_K, np.array([x]))[:, 0]


def _check(
    reference: str, rows: tuple[SameClock, ...], clock_RI: Floats, step_RI: Floats
) -> ClockCheck:
    """Return the check with its mean errors, over the runs that lie on both curves."""
    known_I = np.isfinite(clock_RI[0]) & np.isfinite(step_RI[0])
    if not known_I.any():
        raise UndefinedError(f"no last loss lies between the probes of {reference}")
    clock_RI, step_RI = np.abs(clock_RI[:, known_I]), np.abs(step_RI[:, known_I])
    excess_RI = clock_RI - step_RI
    excess_R = excess_RI.mean(axis=1)
    count = excess_RI.shape[1]
    left_out = (excess_R[0] * count - excess_RI[0]) / max(count - 1, 1)
    documents = Estimate.from_resamples(excess_R)
    both = both_spreads(documents, Estimate.from_jackknife(float(excess_R[0]), left_out))
    return ClockCheck(
        reference=reference,
        runs=rows,
        error_at_clock=float(clock_RI[0].mean()),
        error_at_step=float(step_RI[0].mean()),
        test=ClaimTest.of(SAME_CLOCK, both),
    )
