"""The quantization model of Michaud et al. (docs/references.md 4.1): one alpha for all laws.

Quanta k = 1, 2, ... are useful for shares p_k = k^-(alpha + 1) / zeta(alpha + 1) of the samples,
and are learned in that order.
"""

import math

import numpy as np

from megatron_tokscale.core.errors import TokscaleError, UndefinedError
from megatron_tokscale.laws.estimates import defined
from megatron_tokscale.laws.inputs import Inputs
from megatron_tokscale.laws.quanta.learning_times import frequency_exponent
from megatron_tokscale.laws.quanta.monogenic import measure_monogenic
from megatron_tokscale.results.estimate import Undefined, defined_or_reason
from megatron_tokscale.results.laws import (
    FrequencyExponent,
    LossPowerLaw,
    QuantaExponents,
    QuantaResult,
)
from megatron_tokscale.store import Run


def exponents_from(alpha: float, *, b: float = 1.0) -> QuantaExponents:
    """Return alpha_N = alpha, alpha_D = alpha / (alpha + 1), alpha_S = alpha / (b (alpha + 1)).

    Args:
        alpha: alpha of the quanta, above 0.
        b: exponent of learning times ~ p_k^-b, so that S steps learn n ~ S^(1 / (b (alpha + 1)))
            quanta. The theory has b = 1; sparse parity has 0.81 (docs/references.md 4.2). Any b but
            1 is our extension.

    Raises:
        TokscaleError: alpha or b is not positive.
    """
    _check_positive(alpha=alpha, b=b)
    data = alpha / (alpha + 1)
    return QuantaExponents(alpha=alpha, parameters=alpha, data=data, steps=data / b)


def alpha_from(steps: float, *, b: float = 1.0) -> float:
    """Return the alpha that gives an exponent alpha_S in steps, or in data with b = 1.

    Raises:
        TokscaleError: the exponent or b is not positive.
        UndefinedError: no alpha gives it, as the exponent is not below 1 / b.
    """
    _check_positive(exponent=steps, b=b)
    if steps * b >= 1:
        raise UndefinedError(
            f"the exponent in steps is {steps:g}; quanta of any alpha give less than {1 / b:g}, so "
            "no alpha follows from it"
        )
    return steps * b / (1 - steps * b)


def measure_quanta(
    run: Run, inputs: Inputs, overall: LossPowerLaw | Undefined, seed: int
) -> QuantaResult:
    """Compare three predictions of the model with a run; each may be undefined on its own.

    A frequency is a token's own in the probe set. It stands for the frequency of the quantum that
    the token waits for, which is not known. Learning times are means over the tokens that were
    learned. A bin of frequency weighs by its number of learning events: the mean of n times has a
    variance n times smaller, and the bins of rare labels hold few. Bins whose mean lies within two
    typical widths of the last probe, and all rarer bins, count as censored.

    Args:
        run: the run.
        inputs: arrays of its spectrum.
        overall: power law of its mean loss, which implies the exponents of other axes.
        seed: seed of the sample of tokens.
    """
    return QuantaResult(
        frequency=defined_or_reason(lambda: _frequency_exponent(run, inputs)),
        implied=defined_or_reason(
            lambda: exponents_from(alpha_from(defined(overall).law.exponent.value))
        ),
        monogenic=defined_or_reason(lambda: measure_monogenic(run, inputs, seed)),
    )


def _frequency_exponent(run: Run, inputs: Inputs) -> FrequencyExponent:
    if run.tokens.label_N is None:
        raise UndefinedError("the tokens' labels are not known, so their frequencies are not")
    end = math.exp(inputs.last_x - inputs.margin)
    return frequency_exponent(
        inputs.frequency_I,
        inputs.frequency_time_I,
        weight_I=inputs.frequency_events_I,
        end=end,
    )


def _check_positive(**values: float) -> None:
    for name, value in values.items():
        if not 0 < value < np.inf:
            raise TokscaleError(f"{name} is {value:g}; expected a positive, finite {name}")
