"""The primary tests in planted worlds: they hold with steps, and do not without.

One pair of runs of each kind; the rates over many: benchmarks/results/evidence.md.
"""

import evidence
import pytest

SEED, TOKENS = 1000, 6000


@pytest.mark.slow
@pytest.mark.parametrize("common", evidence.COMMON)
@pytest.mark.parametrize("world", ["A3", "B1", "B2"])
def test_every_primary_test_holds_where_tokens_fall_in_steps(world, common):
    found = evidence.repetition(world, common, SEED, TOKENS)
    assert found["verdicts"] == dict.fromkeys(evidence.PRIMARY, "holds")


@pytest.mark.slow
@pytest.mark.parametrize("common", evidence.COMMON)
@pytest.mark.parametrize("world", ["C", "D"])
def test_no_primary_test_holds_without_steps(world, common):
    found = evidence.repetition(world, common, SEED, TOKENS)
    assert "holds" not in found["verdicts"].values()


def test_a_study_that_was_stopped_computes_no_repetition_twice(tmp_path):
    path = tmp_path / "lines.jsonl"
    evidence.Lines(path).add(("run", "B1", 0.0, 0, 100), {"verdicts": {}})
    lines = evidence.Lines(path)
    assert lines.once(("run", "B1", 0.0, 0, 100), None) == {"verdicts": {}}
    assert lines.once(("run", "C", 0.0, 0, 100), lambda: 1) == 1
    assert len(path.read_text().splitlines()) == 2
