"""The basis in which a smoothing spline is diagonal (Demmler and Reinsch 1975).

Shapes: J distinct x, P = J - 2 coordinates outside of the straight lines, G grid points, S
smoothing parameters of a search.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Self

import numpy as np

from megatron_tokscale.core.arrays import Floats, Integers

_SEARCH = 200  # values of the smoothing on a logarithmic grid: neighbours differ by 30% at most
_BEYOND = 10.0
"""The search ends where the smoothest coordinate is shrunk by this factor, and the roughest one by
1 + 1/10; beyond, the curve is a straight line, or goes through every value, and the likelihood is
flat (our choice)."""
_RESOLUTION = 1e-13  # least smoothing, as a share of the largest gamma, in double precision


@dataclass(frozen=True)
class SplineBasis:
    """The basis of Demmler and Reinsch for distinct x, scaled to the range [0, 1].

    Attributes:
        length: range of x.
        u_J: scaled x.
        root_J: square root of the number of values at each x.
        line_J2: orthonormal basis of the weighted straight lines.
        triangle_22: the matrix that turns it into the weighted lines 1 and u.
        rough_JP: orthonormal basis of all else; the coordinates of the values are independent.
        gamma_P: variance of the motion's coordinates.
        motion_JJ: covariance of the weighted motion at the x.
    """

    length: float
    u_J: Floats
    root_J: Floats
    line_J2: Floats
    triangle_22: Floats
    rough_JP: Floats
    gamma_P: Floats
    motion_JJ: Floats

    @classmethod
    def over(cls, x_J: Floats, count_J: Integers) -> Self:
        """Return the basis for distinct, ascending x with so many values each."""
        length = float(np.ptp(x_J))
        u_J, root_J = (x_J - x_J[0]) / length, np.sqrt(count_J)
        lines_J2 = np.stack([np.ones_like(u_J), u_J], axis=1) * root_J[:, None]
        q_JJ, r_J2 = np.linalg.qr(lines_J2, mode="complete")
        motion_JJ = root_J[:, None] * motion_covariance(u_J, u_J, 0) * root_J
        rest_JP = q_JJ[:, 2:]
        gamma_P, vector_PP = np.linalg.eigh(rest_JP.T @ motion_JJ @ rest_JP)
        gamma_P = np.maximum(gamma_P, np.finfo(np.float64).eps * gamma_P[-1])
        rough_JP = rest_JP @ vector_PP
        return cls(length, u_J, root_J, q_JJ[:, :2], r_J2[:2], rough_JP, gamma_P, motion_JJ)

    @cached_property
    def search_S(self) -> Floats:
        """Smoothing parameters for scaled x, from "through every value" to "straight line"."""
        highest = self.gamma_P[-1] * _BEYOND
        lowest = max(self.gamma_P[0] / _BEYOND, self.gamma_P[-1] * _RESOLUTION)
        return np.geomspace(lowest, highest, _SEARCH)

    def line_weights(self, u_G: Floats, order: int) -> Floats:
        """Return the matrix from weighted means to their straight line, or to its slope, at u."""
        powers_G2 = np.stack([np.full_like(u_G, 1 - order), u_G ** (1 - order)], axis=1)
        return np.asarray(np.linalg.solve(self.triangle_22.T, powers_G2.T).T @ self.line_J2.T)


def motion_covariance(s_G: Floats, t_J: Floats, order: int) -> Floats:
    """Return the covariance of an integrated Brownian motion from 0, or of its slope, at s and t.

    The covariance is a^2 (3 b - a) / 6, with a the smaller and b the larger of the two (Wahba
    1978); `order` 1 differentiates by s. Before 0 the motion is zero.
    """
    s_G1 = np.maximum(s_G, 0)[:, None]
    if order == 0:
        low_GJ, high_GJ = np.minimum(s_G1, t_J), np.maximum(s_G1, t_J)
        return np.asarray(low_GJ**2 * (3 * high_GJ - low_GJ) / 6)
    return np.asarray(np.where(s_G1 <= t_J, s_G1 * t_J - s_G1**2 / 2, t_J**2 / 2))
