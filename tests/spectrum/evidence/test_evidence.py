"""Every evidence test passes on runs that have what it claims, and fails on runs that do not.

A few pairs of each kind; the rates over 200: benchmarks/results/evidence.md.
"""

import evidence
import pytest

SEEDS = (1000, 1001, 1002)
POWERFUL = {"frequency decile", "learning-time decile", "document"}


@pytest.mark.parametrize("scenario", list(evidence.SCENARIOS))
def test_each_evidence_test_passes_where_its_claim_is_planted_and_only_there(scenario):
    should_pass = evidence.SCENARIOS[scenario]
    for_certain = {}
    for seed in SEEDS:
        for test, passed in evidence.verdicts(scenario, seed).items():
            claim, _, grouping = test.partition(", ")
            if claim not in should_pass or grouping in POWERFUL | {""}:
                for_certain.setdefault((test, claim in should_pass), []).append(passed)
    assert for_certain
    for (test, expected), passed in for_certain.items():
        right = sum(each is expected for each in passed)
        assert right >= len(SEEDS) - 1, f"{test} on {scenario}: {passed}"
