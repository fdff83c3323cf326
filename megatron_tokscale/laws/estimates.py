"""Estimates from resamples or standard errors, and inputs that may be undefined.

Shapes: R resamples.
"""

from numpy.typing import ArrayLike

from megatron_tokscale.core.errors import UndefinedError
from megatron_tokscale.core.resampling import percentile_interval
from megatron_tokscale.results.estimate import Estimate, Undefined

Z_95 = 1.96  # half a normal 95% interval, in standard errors


def percentile_estimate(value: float, value_R: ArrayLike) -> Estimate:
    """Return a number with the 95% percentiles of its resamples, without a correction for bias."""
    return Estimate(value, *percentile_interval(value, value_R))


def symmetric_estimate(value: float, reach: float) -> Estimate:
    """Return a number with an interval that ends `reach` below and above it."""
    return Estimate(value, value - reach, value + reach)


def defined[T](result: T | Undefined) -> T:
    """Return a result that is defined.

    Raises:
        UndefinedError: the result is undefined; its reason is the message.
    """
    if isinstance(result, Undefined):
        raise UndefinedError(result.undefined)
    return result
