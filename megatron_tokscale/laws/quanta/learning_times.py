"""Exponent b of learning time ~ frequency^-b (docs/references.md 4.1, 4.2).

Shapes: I groups of tokens (subtasks, token types).
"""

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import linregress, theilslopes
from scipy.stats import t as student_t

from megatron_tokscale.core.arrays import Floats
from megatron_tokscale.core.errors import TokscaleError, UndefinedError
from megatron_tokscale.laws.estimates import symmetric_estimate
from megatron_tokscale.results.estimate import Estimate
from megatron_tokscale.results.laws import FrequencyExponent

MIN_GROUPS = 5  # our choice: the ranks of fewer groups give no useful interval
MAX_GROUPS = 5000  # the slopes of all pairs of so many groups take 200 MB


def frequency_exponent(frequency_I: ArrayLike, time_I: ArrayLike) -> FrequencyExponent:
    """Return the slope of ln(time) on ln(frequency), with its sign turned.

    b is 1 if a model learns a group after seeing it a fixed number of times; it is 0.81 among the
    subtasks of sparse parity (docs/references.md 4.2). The learning time of a group that was not
    learned by the end of the run is censored. Such groups have low frequencies, so leaving them out
    lowers b. Give only frequencies at which every group was learned.

    Args:
        frequency_I: share or count of each group's tokens in training, above 0.
        time_I: learning time of each group (steps or tokens), above 0.

    Raises:
        TokscaleError: the arguments do not fit together.
        UndefinedError: there are fewer than 5 or more than 5000 groups, a number is not positive
            and finite, or all frequencies are the same.
    """
    frequency, time = np.asarray(frequency_I, np.float64), np.asarray(time_I, np.float64)
    _check_groups(frequency, time)
    x_I, y_I = np.log(frequency), np.log(time)
    slope, _, low, high = theilslopes(y_I, x_I, 0.95)
    line = linregress(x_I, y_I)
    reach = float(line.stderr * student_t.ppf(0.975, len(x_I) - 2))
    return FrequencyExponent(
        b=Estimate(-float(slope), -float(high), -float(low)),
        b_ols=symmetric_estimate(-float(line.slope), reach),
        se_ols=float(line.stderr),
        r2=float(line.rvalue**2),
        n_groups=len(x_I),
    )


def _check_groups(frequency_I: Floats, time_I: Floats) -> None:
    if frequency_I.ndim != 1 or frequency_I.shape != time_I.shape:
        raise TokscaleError(
            f"frequencies are of shape {frequency_I.shape} and times of shape {time_I.shape}; "
            "expected one of each per group"
        )
    if not MIN_GROUPS <= len(frequency_I) <= MAX_GROUPS:
        raise UndefinedError(
            f"there are {len(frequency_I)} groups; expected {MIN_GROUPS} to {MAX_GROUPS}; split or "
            "merge them"
        )
    both_I = np.stack([frequency_I, time_I])
    if not (np.isfinite(both_I) & (both_I > 0)).all():
        raise UndefinedError(
            "frequencies or learning times are not positive and finite; leave out groups that "
            "were not learned"
        )
    if np.ptp(frequency_I) == 0:
        raise UndefinedError(
            "all groups have the same frequency, so there is no slope; group by something else"
        )
