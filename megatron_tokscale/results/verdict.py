"""Verdicts with three values on claims, by the interval of a number and the claim's own margin.

A claim holds if the whole 95% interval of its number is where the claim says; it fails if the whole
interval is elsewhere; an interval on both sides excludes nothing, and the claim is undecided. The
same holds for "within a margin of a value": the two one-sided tests of Schuirmann (1987).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Self

import numpy as np
from scipy.stats import norm

from megatron_tokscale.results.estimate import Estimate, Undefined

LEVEL = 0.05
"""Level of every test; an interval of 95% is two-sided at this level."""
_Z_95 = 1.959964  # half length of a 95% interval, in standard errors


class Verdict(StrEnum):
    """Outcome of a claim."""

    HOLDS = "holds"
    FAILS = "fails"
    UNDECIDED = "undecided"


@dataclass(frozen=True)
class Claim:
    """A claim on one number: the number lies from `least` to `most`.

    Attributes:
        name: the claim in words, for a table.
        least: smallest value at which the claim is true; -inf without one.
        most: largest value at which the claim is true; inf without one.
    """

    name: str
    least: float = -np.inf
    most: float = np.inf

    def __post_init__(self) -> None:
        # JSON has no infinity: a missing end is stored as null, and read as NaN.
        for name, missing in (("least", -np.inf), ("most", np.inf)):
            if np.isnan(getattr(self, name)):
                object.__setattr__(self, name, missing)
        if not self.least < self.most:
            raise ValueError(f"no number lies from {self.least} to {self.most}")

    @classmethod
    def about(cls, name: str, value: float, margin: float) -> Self:
        """Return the claim that a number is `value`, up to `margin`."""
        return cls(name, value - margin, value + margin)

    @property
    def rule(self) -> str:
        """The condition in words: "at least 0.1", "at most 0.95", "from 0.28 to 0.38"."""
        if np.isinf(self.most):
            return f"at least {self.least:g}"
        if np.isinf(self.least):
            return f"at most {self.most:g}"
        return f"from {self.least:.3g} to {self.most:.3g}"


@dataclass(frozen=True)
class ClaimTest:
    """A claim, the number that decides it, and the verdict.

    Attributes:
        claim: the claim.
        estimate: its number with a 95% interval, or why the number is undefined.
        verdict: the verdict, after the correction for several tests where there is one.
        p_value: two-sided p-value of the verdict: the level at which an interval still excludes
            what it excludes. It takes each side of the interval as that of a normal distribution.
            1 where nothing is excluded at any level; NaN without an interval.
    """

    claim: Claim
    estimate: Estimate | Undefined
    verdict: Verdict
    p_value: float

    @classmethod
    def of(cls, claim: Claim, estimate: Estimate | Undefined) -> Self:
        """Return the test of a claim on its own."""
        if isinstance(estimate, Undefined) or not estimate.has_interval:
            return cls(claim, estimate, Verdict.UNDECIDED, float("nan"))
        inside = claim.least <= estimate.value <= claim.most
        p_value = _p_inside(claim, estimate) if inside else _p_outside(claim, estimate)
        decided = Verdict.HOLDS if inside else Verdict.FAILS
        return cls(claim, estimate, decided if p_value <= LEVEL else Verdict.UNDECIDED, p_value)


def holm(tests: Sequence[ClaimTest]) -> tuple[ClaimTest, ...]:
    """Return the tests of one family with Holm's correction: some verdicts become undecided.

    Tests without a p-value do not count. The family-wise error rate is at most `LEVEL`
    (Holm 1979).
    """
    counted = [i for i, test in enumerate(tests) if np.isfinite(test.p_value)]
    order = sorted(counted, key=lambda i: tests[i].p_value)
    corrected = list(tests)
    rejected = True
    for rank, i in enumerate(order):
        rejected &= tests[i].p_value <= LEVEL / (len(order) - rank)
        if not rejected:
            corrected[i] = replace(tests[i], verdict=Verdict.UNDECIDED)
    return tuple(corrected)


def _p_inside(claim: Claim, estimate: Estimate) -> float:
    """Return the p-value of "the number is inside": the larger one of the two sides."""
    below = (estimate.value - claim.least, estimate.value - estimate.low)
    above = (claim.most - estimate.value, estimate.high - estimate.value)
    return max(_p_at(*below), _p_at(*above))


def _p_outside(claim: Claim, estimate: Estimate) -> float:
    """Return the p-value of "the number is outside", on the side where it lies."""
    if estimate.value < claim.least:
        return _p_at(claim.least - estimate.value, estimate.high - estimate.value)
    return _p_at(estimate.value - claim.most, estimate.value - estimate.low)


def _p_at(distance: float, half: float) -> float:
    """Return the two-sided p-value at a distance from the value, with a half interval `half`."""
    if half == 0:
        return float(distance == 0)
    return float(2 * norm.sf(distance / half * _Z_95))
