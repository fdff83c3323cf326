"""The gain of size in two parts: the same tokens earlier, and tokens that the smaller never learns.

Shapes: C cells, S sizes along the way from the smallest run to the largest.
"""

from dataclasses import dataclass

import numpy as np

from megatron_tokscale.core.arrays import Floats
from megatron_tokscale.spectrum.axes.shift import ShiftModel

_SIZES = 32  # points of Gauss and Legendre's rule on u; the slopes are smooth


@dataclass(frozen=True)
class Parts:
    """The fall of the mean loss from the smallest run to the largest at one clock, by the model.

    Attributes:
        earlier_C: part by the shift, kappa times -dL/dx summed over ln size, in nats.
        never_C: part by the floor, in nats.
    """

    earlier_C: Floats
    never_C: Floats

    @classmethod
    def of(cls, model: ShiftModel, x: float, least_u: float) -> "Parts":
        """Return the integrals of the two slopes of the model over u from `least_u` to 0."""
        node_S, weight_S = np.polynomial.legendre.leggauss(_SIZES)
        u_S = least_u * (1 - node_S) / 2
        earlier_CS, never_CS = model.slopes(np.full(_SIZES, x), u_S)
        weight_S = weight_S * -least_u / 2
        return cls(earlier_CS @ weight_S, never_CS @ weight_S)

    @property
    def gain_C(self) -> Floats:
        """Return the sum of both parts, in nats."""
        return self.earlier_C + self.never_C

    @property
    def share_C(self) -> Floats:
        """Return the share of the gain that is learned earlier."""
        return np.asarray(self.earlier_C / self.gain_C)
