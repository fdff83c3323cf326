"""Verdicts: by the whole interval, with a margin; Holm's correction against a published example."""

import math

import pytest
from scipy.stats import norm

from megatron_tokscale.results.estimate import Estimate, Undefined
from megatron_tokscale.results.verdict import Claim, ClaimTest, Verdict, holm

AT_LEAST = Claim("rho is at least 0.1", least=0.1)
ONE_THIRD = Claim.about("the exponent is 1/3", 1 / 3, 0.05)


@pytest.mark.parametrize(
    ("claim", "interval", "verdict"),
    [
        (AT_LEAST, (0.5, 0.2, 0.8), Verdict.HOLDS),
        (AT_LEAST, (0.5, 0.05, 0.8), Verdict.UNDECIDED),
        (AT_LEAST, (0.0, -0.05, 0.05), Verdict.FAILS),
        (AT_LEAST, (0.0, -0.05, 0.2), Verdict.UNDECIDED),
        (ONE_THIRD, (0.34, 0.30, 0.37), Verdict.HOLDS),
        (ONE_THIRD, (0.34, 0.20, 0.45), Verdict.UNDECIDED),
        (ONE_THIRD, (0.198, -0.894, 1.291), Verdict.UNDECIDED),
        (ONE_THIRD, (0.20, 0.15, 0.25), Verdict.FAILS),
        (ONE_THIRD, (0.50, 0.45, 0.60), Verdict.FAILS),
        (ONE_THIRD, (0.50, 0.30, 0.60), Verdict.UNDECIDED),
    ],
)
def test_a_claim_is_decided_by_the_whole_interval(claim, interval, verdict):
    assert ClaimTest.of(claim, Estimate(*interval)).verdict is verdict


@pytest.mark.parametrize("estimate", [Estimate(0.5), Undefined("too few tokens")])
def test_a_number_without_an_interval_decides_nothing(estimate):
    test = ClaimTest.of(AT_LEAST, estimate)
    assert test.verdict is Verdict.UNDECIDED
    assert math.isnan(test.p_value)


def test_the_p_value_is_that_of_a_normal_distribution():
    se = 0.07
    estimate = Estimate(0.3, 0.3 - 1.959964 * se, 0.3 + 1.959964 * se)
    p_value = ClaimTest.of(AT_LEAST, estimate).p_value
    assert p_value == pytest.approx(2 * norm.sf(0.2 / se), rel=1e-5)


def with_p(p_value):
    return ClaimTest(AT_LEAST, Estimate(0.5, 0.4, 0.6), Verdict.HOLDS, p_value)


def test_holm_rejects_as_in_his_example():
    # Wikipedia, "Holm–Bonferroni method", example: 0.01, 0.04, 0.03, 0.005 at the level 0.05.
    corrected = holm([with_p(p) for p in (0.01, 0.04, 0.03, 0.005)])
    assert [test.verdict is Verdict.HOLDS for test in corrected] == [True, False, False, True]


def test_holm_does_not_count_tests_without_an_interval():
    undefined = ClaimTest.of(AT_LEAST, Undefined("needs a second run"))
    corrected = holm([undefined, with_p(0.03)])
    assert [test.verdict for test in corrected] == [Verdict.UNDECIDED, Verdict.HOLDS]


def test_a_claim_says_its_rule():
    assert AT_LEAST.rule == "at least 0.1"
    assert Claim("narrower", most=0.95).rule == "at most 0.95"
    assert ONE_THIRD.rule == "from 0.283 to 0.383"
