"""Do rare things take longer, as quanta do? Learning time ~ frequency^-b (papers.md 4.1, 4.2).

Shapes: I groups of tokens (subtasks, token types).
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import linregress, theilslopes
from scipy.stats import t as student_t

from megatron_tokscale.core.arrays import Floats, Interval
from megatron_tokscale.core.errors import TokscaleError, UndefinedError

MIN_GROUPS = 5
MAX_GROUPS = 5000  # whose pairs of slopes take 200 MB


@dataclass(frozen=True)
class FrequencyExponent:
    """Learning time = const * frequency^-b, with 95% intervals.

    Attributes:
        b: by Theil and Sen: the median slope of all pairs of groups.
        interval: its interval, by ranks; takes the groups as independent.
        b_ols: by least squares.
        se_ols: its standard error.
        interval_ols: its interval, Student's t.
        r2: of the log times, least squares.
        n_groups: number of groups.
    """

    b: float
    interval: Interval
    b_ols: float
    se_ols: float
    interval_ols: Interval
    r2: float
    n_groups: int


def frequency_exponent(frequency_I: ArrayLike, time_I: ArrayLike) -> FrequencyExponent:
    """The slope of ln(time) on ln(frequency), with its sign turned.

    One, if what counts is how often a model has seen a thing; 0.81 among the subtasks of sparse
    parity (papers.md 4.2). Groups that were not learned by the end of the run have no time, and
    they are the rare ones: leaving them out lowers b. End the frequencies where they begin.

    Args:
        frequency_I: share or count of each group's tokens in training, above 0.
        time_I: when the group was learned (steps or tokens), above 0.

    Raises:
        TokscaleError: the arguments do not fit together.
        UndefinedError: fewer than 5 or more than 5000 groups, values that are not positive, or
            frequencies that are all the same.
    """
    frequency, time = np.asarray(frequency_I, np.float64), np.asarray(time_I, np.float64)
    _check(frequency, time)
    x_I, y_I = np.log(frequency), np.log(time)
    slope, _, low, high = theilslopes(y_I, x_I, 0.95)
    line = linregress(x_I, y_I)
    reach = float(line.stderr * student_t.ppf(0.975, len(x_I) - 2))
    return FrequencyExponent(
        b=-float(slope),
        interval=(-float(high), -float(low)),
        b_ols=-float(line.slope),
        se_ols=float(line.stderr),
        interval_ols=(-float(line.slope) - reach, -float(line.slope) + reach),
        r2=float(line.rvalue**2),
        n_groups=len(x_I),
    )


def _check(frequency_I: Floats, time_I: Floats) -> None:
    if frequency_I.ndim != 1 or frequency_I.shape != time_I.shape:
        raise TokscaleError(
            f"frequencies of shape {frequency_I.shape} and times of shape {time_I.shape} do not "
            "go together; give one of each per group"
        )
    if not MIN_GROUPS <= len(frequency_I) <= MAX_GROUPS:
        raise UndefinedError(
            f"{len(frequency_I)} groups are not between {MIN_GROUPS} and {MAX_GROUPS}; split or "
            "merge them"
        )
    both_I = np.stack([frequency_I, time_I])
    if not (np.isfinite(both_I) & (both_I > 0)).all():
        raise UndefinedError(
            "frequencies and learning times must be positive and finite; leave out groups that "
            "were not learned"
        )
    if np.ptp(frequency_I) == 0:
        raise UndefinedError("groups of one frequency have no slope; group by something else")
