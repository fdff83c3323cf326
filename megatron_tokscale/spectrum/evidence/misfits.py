"""Skill of a prediction beside a null model, with its interval over documents.

A misfit is |v|^2, and v are differences between means of the data and predicted means. The noise
of the documents raises it. With e_u the part of unit u in the error of v,

    |v|^2 - sum_u |e_u|^2

has no bias, and its variance is

    4 sum_u (e_u . mu)^2 + 2 sum_{u != w} (e_u . e_w)^2,

mu the true v (docs/references.md 11.4). A bootstrap does not have it: where v is mostly noise its
variance is three times as large, and more where v has more numbers than there are units. The parts
come from a jackknife: v with each unit left out.

The interval of a ratio of two misfits is Fieller's: all ratios r at which miss - r null lies within
Student's quantile of its error from 0. It exists where the null model misses nothing too. The error
is that at r: the first part of a misfit's variance grows with the misfit, so the smaller one counts
with the size that r gives it, as in a score test (our choice).

Shapes: U resampling units, C numbers of a misfit, S skills.
"""

from dataclasses import dataclass
from typing import Final, Self

import numpy as np
from scipy.special import stdtrit

from megatron_tokscale.core.arrays import Floats
from megatron_tokscale.results.estimate import Estimate

_SKILLS: Final = np.linspace(-1, 1, 20_001)  # an interval is exact to 0.0001 (our choice)


@dataclass(frozen=True)
class Misfit:
    """A square of differences, and what its error consists of.

    Attributes:
        value: estimate of the true square; noise can make it negative.
        uncorrected: the square of the data as they are.
        slope_U: e_u . v without the unit's own part in v; empty for a single unit.
        product_UU: e_u . e_w, with zeros on the diagonal.
    """

    value: float
    uncorrected: float
    slope_U: Floats
    product_UU: Floats

    @classmethod
    def of(cls, vector_RC: Floats) -> Self:
        """Return the misfit of the differences in the first row.

        Args:
            vector_RC: the differences, then those without each of the units
                (`Units.leave_one_out`).
        """
        vector_C, without_UC = vector_RC[0], vector_RC[1:]
        uncorrected, n_units = float(vector_C @ vector_C), len(without_UC)
        if n_units < 2:
            return cls(uncorrected, uncorrected, np.empty(0), np.empty((0, 0)))
        error_UC = np.sqrt(1 - 1 / n_units) * (without_UC.mean(axis=0) - without_UC)
        product_UU = error_UC @ error_UC.T
        square_U = product_UU.diagonal().copy()
        slope_U = error_UC @ vector_C - square_U
        # Differences to a mean of all units are negatively correlated: by this much.
        product_UU += (square_U[:, None] + square_U - square_U.mean()) / n_units
        np.fill_diagonal(product_UU, 0)
        value = uncorrected - float(square_U.sum())
        return cls(value, uncorrected, slope_U - slope_U.mean(), product_UU)


def skill(miss: Misfit, null: Misfit) -> Estimate:
    """Return 1 - miss/null, or null/miss - 1 where the null model misses less; from -1 to 1.

    A misfit below 0 counts as 0. There is no value if both are 0, and no interval from one unit.
    """
    miss_value, null_value = max(miss.value, 0.0), max(null.value, 0.0)
    value, uncorrected = (
        _skill(*both) for both in ((miss_value, null_value), (miss.uncorrected, null.uncorrected))
    )
    n_units = len(miss.slope_U)
    if n_units < 2 or np.isnan(value):
        return Estimate(value, uncorrected=uncorrected)
    # a miss - b null is 0 at each skill.
    a_S, b_S = 1 + np.minimum(_SKILLS, 0), 1 - np.maximum(_SKILLS, 0)

    pairs = ((miss, miss), (miss, null), (null, null))
    noise = [float(np.vdot(one.product_UU, other.product_UU)) for one, other in pairs]
    # The noise of v raises the slopes' squares by as much as that of the products.
    slope = [float(one.slope_U @ other.slope_U) for one, other in pairs]
    of_miss, of_both, of_null = np.subtract(slope, noise)
    # The smaller misfit at each skill, over its estimate.
    miss_S, null_S = np.ones((2, len(_SKILLS)))
    if miss_value > 0:
        miss_S[_SKILLS > 0] = (b_S * null_value / miss_value)[_SKILLS > 0]
    if null_value > 0:
        null_S[_SKILLS < 0] = (a_S * miss_value / null_value)[_SKILLS < 0]
    slope_S = _of_difference(
        a_S * np.sqrt(miss_S), b_S * np.sqrt(null_S), max(of_miss, 0), of_both, max(of_null, 0)
    )
    variance_S = 4 * np.maximum(slope_S, 0) + 2 * _of_difference(a_S, b_S, *noise)
    away_S = np.abs(a_S * miss_value - b_S * null_value)
    agrees = _SKILLS[away_S <= stdtrit(n_units - 1, 0.975) * np.sqrt(variance_S)].tolist()
    return Estimate(value, min([value, *agrees]), max([value, *agrees]), uncorrected)


def _of_difference(
    a_S: Floats, b_S: Floats, of_miss: float, of_both: float, of_null: float
) -> Floats:
    """Return the square of a miss - b null, from the squares of both and their product."""
    return np.asarray(a_S**2 * of_miss - 2 * a_S * b_S * of_both + b_S**2 * of_null)


def _skill(miss: float, null: float) -> float:
    """Return the skill of two misfits; NaN if both are 0."""
    if miss == null == 0:
        return float("nan")
    return 1 - miss / null if miss <= null else null / miss - 1
