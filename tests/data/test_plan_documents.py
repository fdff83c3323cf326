"""A plan knows which documents it was made for, and a job with others is refused."""

import json
from dataclasses import replace

import pytest
from jobs import Corpus
from planned_jobs import plan_of

from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.corpus.source import DataSource
from megatron_tokscale.data import Plan
from megatron_tokscale.data.match import check_documents
from megatron_tokscale.data.take_over import take_over
from megatron_tokscale.reweight.job import job_of
from megatron_tokscale.reweight.planning import Uniform, make_plan

# 300 documents each.
AT_90, AT_80 = ((0, 270), (0, 270)), ((0, 240), (0, 240))


@pytest.fixture
def plan(corpus: Corpus):
    return plan_of(corpus.prefixes, {0: (0.5, 0.5)})


@pytest.mark.parametrize(
    ("split", "documents"), [("90,10,0", AT_90), ("900,100,0", AT_90), ("80,20,0", AT_80)]
)
def test_a_plan_that_is_made_knows_its_training_part(corpus, tmp_path, split, documents):
    made = make_plan(job_of(DataSource(corpus.data_path, split), 64, 32, 1), Uniform())
    assert made.documents == documents
    made.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == made
    parts = {"train": corpus.data_path, "valid": corpus.data_path}
    made = make_plan(job_of(DataSource(parts, None), 64, 32, 1), Uniform())
    assert made.documents == (
        (0, 300),
        (0, 300),
    )


def test_a_plan_that_does_not_say_its_training_part_is_read(plan, tmp_path):
    plan.save(tmp_path / "plan.json")
    content = json.loads((tmp_path / "plan.json").read_text())
    del content["documents"], content["checksum"]
    (tmp_path / "plan.json").write_text(json.dumps(content))
    old = Plan.load(tmp_path / "plan.json")
    assert old == plan
    assert old.fingerprint == plan.fingerprint
    known = {replace(plan, documents=documents).fingerprint for documents in (AT_90, AT_80)}
    assert len({*known, plan.fingerprint}) == 3


def test_another_training_part_is_refused_and_an_unknown_one_is_not(plan):
    check_documents(plan, [0, 1], AT_80)
    made = replace(plan, documents=((0, 270), (10, 10)))
    check_documents(made, [0, 1], ((0, 270), (0, 0)))
    check_documents(made, [None, 0], ((0, 0),))
    check_documents(replace(plan, documents=((0, 270), (0, 240))), [1, 0], ((0, 240), (0, 270)))
    with pytest.raises(TokscaleError, match="of left is documents 0 to 270, the job's is 0 to 240"):
        check_documents(made, [0, 1], AT_80)


def test_a_damaged_training_part_is_refused(plan):
    with pytest.raises(TokscaleError, match="has 1 training parts for 2 datasets"):
        replace(plan, documents=((0, 270),))
    with pytest.raises(TokscaleError, match="of left in the plan is documents 0 to 301"):
        replace(plan, documents=((0, 301), (0, 270)))


def test_a_plan_that_takes_over_has_the_training_part_of_the_past(plan):
    past, given = replace(plan, documents=AT_90), replace(plan, seed=9, documents=AT_90)
    assert take_over(past, given, 10).documents == AT_90
    assert take_over(past, replace(given, documents=()), 10).documents == ()
    with pytest.raises(TokscaleError, match="of left is documents 0 to 240, the run's past had 0"):
        take_over(past, replace(given, documents=AT_80), 10)
