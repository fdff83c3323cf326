"""The rule by which back-tests refute a method of forecast (our choice).

A method is refuted if in a back-test its interval and that of the fall that came have no value in
common; or if its error over all back-tests is larger than the error of "nothing more falls", or
than that of another method by more than a quarter of the fall that came. The error is the sum of
the absolute errors over all horizons of all back-tests, as a share of the falls that came.
"""

import math
from collections.abc import Collection, Sequence
from typing import Final

from megatron_tokscale.results.estimate import Estimate, Undefined
from megatron_tokscale.results.forecast import Horizon, Judgement, Method, Origin, Standing

MARGIN: Final = 0.25
"""Share of the fall that came by which the best method's error may be smaller (our choice)."""


def judge(
    back_tests: Sequence[Origin | Undefined], silent: Collection[Method] = ()
) -> tuple[Judgement, ...]:
    """Return a judgement of every method: those that stand, refuted, untested; by ascending error.

    Without any back-test the power law comes first, as the one with fewest assumptions.

    Args:
        back_tests: the back-tests.
        silent: methods that have no forecast from now on; they come behind all others.
    """
    horizons = [each for test in back_tests if isinstance(test, Origin) for each in test.horizons]
    error_of = {method: _error(method, horizons) for method in Method}
    found = [_judge(method, horizons, error_of) for method in Method]
    rank = [
        Method.POWER_LAW,
        Method.COMBINATION,
        Method.HAZARD,
        Method.SLOPE,
        Method.NOTHING,
    ]
    order = [Standing.STANDS, Standing.REFUTED, Standing.UNTESTED]

    def place(each: Judgement) -> tuple[bool, int, float, int]:
        error = each.error if math.isfinite(each.error) else math.inf
        return each.method in silent, order.index(each.standing), error, rank.index(each.method)

    return tuple(sorted(found, key=place))


def _error(method: Method, horizons: Sequence[Horizon]) -> float:
    """Return the error of a method over the horizons; NaN where a horizon has no forecast."""
    errors = [each.error(method) for each in horizons]
    came = sum(abs(each.measured.value) for each in horizons if each.measured)
    if not horizons or not came > 0 or any(error is None for error in errors):
        return math.nan
    return sum(abs(error) for error in errors if error is not None) / came


def _judge(method: Method, horizons: Sequence[Horizon], error_of: dict[Method, float]) -> Judgement:
    error = error_of[method]
    if not math.isfinite(error):
        return Judgement(method, Standing.UNTESTED, "there is no back-test of it", math.nan)
    rivals = {each: rival for each, rival in error_of.items() if math.isfinite(rival)}
    best = min(rivals, key=lambda each: rivals[each])
    outside = [each.factor for each in horizons if not _meet(each, method)]
    said = f"its error is {error:.0%} of the fall that came"
    if method is not Method.NOTHING and error > error_of[Method.NOTHING]:
        reason = f"{said}, more than if nothing had fallen"
    elif error > rivals[best] + MARGIN:
        reason = f'{said}, that of "{best}" is {rivals[best]:.0%}'
    elif outside and method is not Method.NOTHING:
        missed = f"{len(outside)} of {len(horizons)}"
        reason = f"{said}, and {missed} falls that came lie outside its interval"
    else:
        return Judgement(method, Standing.STANDS, said, error)
    return Judgement(method, Standing.REFUTED, reason, error)


def _meet(horizon: Horizon, method: Method) -> bool:
    """Return whether the intervals of the forecast and of what came have a value in common."""
    said, came = horizon.falls.get(method), horizon.measured
    if not isinstance(said, Estimate) or came is None:
        return True
    if not said.has_interval or not came.has_interval:
        return True
    return said.low <= came.high and came.low <= said.high
