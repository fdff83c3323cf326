"""The quantization model of Michaud et al. (papers.md 4.1): one alpha behind all scaling laws.

Quanta k = 1, 2, ... are of use for shares p_k = k^-(alpha + 1) / zeta(alpha + 1) of the samples,
and are learned in that order. Shapes: K quanta.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import zeta

from megatron_tokscale.errors import TokscaleError, UndefinedError
from megatron_tokscale.laws.agreement import Agreement

Array = NDArray[np.float64]


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


def consistency(
    steps: float,
    steps_se: float,
    *,
    parameters: tuple[float, float] | None = None,
    data: tuple[float, float] | None = None,
    b: float = 1.0,
) -> Agreement:
    """alpha_S as predicted from a measured alpha_N or alpha_D, less alpha_S as measured.

    Errors go to first order: d alpha_S = d alpha_D / b, d alpha_D = d alpha_N / (alpha_N + 1)^2.

    Args:
        steps: alpha_S of a run of a single epoch, as of `fit_power_law`.
        steps_se: its standard error.
        parameters: alpha_N and its standard error.
        data: alpha_D and its standard error, in place of `parameters`.
        b: see `exponents_from`.

    Raises:
        TokscaleError: both or none of alpha_N and alpha_D, or one that is not positive.
    """
    if parameters is not None and data is None:
        predicted = exponents_from(parameters[0], b=b).steps
        predicted_se = parameters[1] / (1 + parameters[0]) ** 2 / b
    elif data is not None and parameters is None:
        predicted, predicted_se = exponents_from(alpha_from(data[0]), b=b).steps, data[1] / b
    else:
        raise TokscaleError("quanta predict alpha_S from alpha_N or from alpha_D; give one of them")
    return Agreement.of(predicted, predicted_se, steps, steps_se)


def frequencies(alpha: float, n_quanta: int) -> Array:
    """p_k of the first K quanta.

    Raises:
        TokscaleError: alpha is not positive.
    """
    _check_positive(alpha=alpha)
    k = np.arange(1, n_quanta + 1, dtype=np.float64)
    return np.asarray(k ** -(alpha + 1) / zeta(alpha + 1))


def expected_loss(
    n_learned: ArrayLike, alpha: float, *, unlearned: float = 1.0, learned: float = 0.0
) -> Array:
    """Mean loss in nats when the first n quanta are learned: a + (b - a) sum over k > n of p_k.

    The sum is Hurwitz's zeta(alpha + 1, n + 1) / zeta(alpha + 1), which for many quanta becomes
    n^-alpha / (alpha zeta(alpha + 1)).

    Args:
        n_learned: numbers n of quanta, 0 or more.
        alpha: exponent of the frequencies.
        unlearned: loss b of samples whose quantum is not learned.
        learned: loss a of those whose quantum is.

    Raises:
        TokscaleError: alpha is not positive.
    """
    _check_positive(alpha=alpha)
    n = np.asarray(n_learned, dtype=np.float64)
    left = zeta(alpha + 1, n + 1) / zeta(alpha + 1)
    return np.asarray(learned + (unlearned - learned) * left)


def _check_positive(**values: float) -> None:
    for name, value in values.items():
        if not 0 < value < np.inf:
            raise TokscaleError(f"quanta of {name} {value:g} are none; give a positive {name}")
