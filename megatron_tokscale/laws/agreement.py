"""Whether two exponents measured apart are one."""

import math
from dataclasses import dataclass

from megatron_tokscale.core.errors import UndefinedError


@dataclass(frozen=True)
class Agreement:
    """A predicted less a measured exponent.

    Attributes:
        difference: predicted less measured.
        se: its standard error, the two taken as independent.
        z: difference over se; beyond 1.96 either way they disagree at the 5% level.
    """

    difference: float
    se: float
    z: float

    @staticmethod
    def between(
        predicted: float, predicted_se: float, measured: float, measured_se: float
    ) -> "Agreement":
        """Compare two exponents with their standard errors.

        Raises:
            UndefinedError: an error is negative or not finite, or both are zero.
        """
        se = math.hypot(predicted_se, measured_se)
        if not (min(predicted_se, measured_se) >= 0 and 0 < se < math.inf):
            raise UndefinedError(
                f"exponents with errors {predicted_se:g} and {measured_se:g} cannot be compared; "
                "give finite standard errors, at least one above 0"
            )
        difference = predicted - measured
        return Agreement(difference, se, difference / se)
