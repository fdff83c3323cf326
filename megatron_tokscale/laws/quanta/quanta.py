"""The quantization model of Michaud et al. (papers.md 4.1): one alpha behind all scaling laws.

Quanta k = 1, 2, ... are of use for shares p_k = k^-(alpha + 1) / zeta(alpha + 1) of the samples,
and are learned in that order.
"""

from dataclasses import dataclass

import numpy as np

from megatron_tokscale.core.errors import TokscaleError, UndefinedError


@dataclass(frozen=True)
class QuantaExponents:
    """What alpha makes of L - L_inf.

    Attributes:
        alpha: the quanta's frequencies fall as k^-(alpha + 1).
        parameters: alpha_N, in the number of parameters.
        data: alpha_D, in the tokens of a set read for many epochs.
        steps: alpha_S, in the steps of a single epoch.
    """

    alpha: float
    parameters: float
    data: float
    steps: float


def exponents_from(alpha: float, *, b: float = 1.0) -> QuantaExponents:
    """alpha_N = alpha, alpha_D = alpha / (alpha + 1), alpha_S = alpha / (b (alpha + 1)).

    Args:
        alpha: above 0.
        b: learning times go as p_k^-b, which makes n ~ S^(1 / (b (alpha + 1))) in S steps. The
            theory says 1, and sparse parities 0.81 (papers.md 4.2); our extension.

    Raises:
        TokscaleError: alpha or b is not positive.
    """
    _check_positive(alpha=alpha, b=b)
    data = alpha / (alpha + 1)
    return QuantaExponents(alpha=alpha, parameters=alpha, data=data, steps=data / b)


def alpha_from(steps: float, *, b: float = 1.0) -> float:
    """The alpha of an exponent alpha_S in steps, or of one in data with b = 1.

    Raises:
        UndefinedError: no alpha has it: the exponent is not between 0 and 1 / b.
    """
    _check_positive(exponent=steps, b=b)
    if steps * b >= 1:
        raise UndefinedError(
            f"an exponent of {steps:g} in steps is of no quanta, which give less than {1 / b:g}; "
            "compare nothing with it"
        )
    return steps * b / (1 - steps * b)


def _check_positive(**values: float) -> None:
    for name, value in values.items():
        if not 0 < value < np.inf:
            raise TokscaleError(f"quanta of {name} {value:g} are none; give a positive {name}")
