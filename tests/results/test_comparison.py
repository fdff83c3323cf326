"""compare.json: read as it was written, and refused if it is damaged."""

import math

import pytest
from analyses import blank, edit

from megatron_tokscale.core.checked import write_typed_result
from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.core.schemas import COMPARISON_SCHEMA
from megatron_tokscale.results import Comparison, read_comparison
from megatron_tokscale.results.comparison import NO_SECOND_SEED, Change, ChangedToken, Passage
from megatron_tokscale.results.estimate import Estimate


@pytest.fixture
def written(tmp_path):
    """A comparison without noise runs, with a token of either kind, in a file."""
    undecided = Change(7, *[NO_SECOND_SEED] * 4)
    decided = Change(7, 2.5, Estimate(4.5, 1.0, 8.0, 4.5), 5, 0.5)
    token = blank(
        ChangedToken, token=3, document=None, time_a=2.0, time_b=1.0, z=4.0, q_value=NO_SECOND_SEED
    )
    with_text = blank(
        ChangedToken, time_a=1.0, time_b=1.0, z=4.0, q_value=0.01, passage=Passage("a", "b", "c")
    )
    overall = blank(Comparison.__annotations__["overall"], gained=undecided, lost=decided)
    record = blank(Comparison, overall=overall, gained=(token,), lost=(with_text,))
    path = tmp_path / "compare.json"
    write_typed_result(path, COMPARISON_SCHEMA, record)
    return path, record


def test_comparison_is_read_as_it_was_written(written):
    path, record = written
    found = read_comparison(path)
    assert found.overall.gained == record.overall.gained
    assert found.overall.lost == record.overall.lost
    assert found.lost[0].passage == Passage("a", "b", "c")
    assert found.lost[0].q_value == 0.01
    assert found.gained[0].document is None
    assert found.gained[0].q_value == NO_SECOND_SEED
    assert math.isnan(found.overall.learned_a)


def test_changed_comparison_is_refused_with_one_line(written):
    path, _ = written
    text = path.read_text()
    path.write_text(text.replace('"token": 3', '"token": 4'))
    with pytest.raises(TokscaleError, match="checksum is wrong; run `megatron-tokscale compare`"):
        read_comparison(path)
    path.write_text(text)
    edit(path, schema_version=COMPARISON_SCHEMA + 1)
    with pytest.raises(TokscaleError, match="reads up to"):
        read_comparison(path)
