"""A plan that does not fit the job is refused with one line, and nothing is written."""

from dataclasses import replace

import numpy as np
import pytest
from jobs import Corpus, job_flags
from planned_jobs import make_scores, stratified_plan
from recorded_job import start

from megatron_tokscale.data import Cut

pytestmark = pytest.mark.megatron


@pytest.fixture(scope="module")
def scores(corpus: Corpus):
    return [make_scores(prefix, seed) for seed, prefix in enumerate(corpus.prefixes)]


@pytest.fixture(scope="module")
def plan(corpus: Corpus, scores):
    return stratified_plan(corpus, scores)


def of_other_data(plan, scores):
    return replace(plan, datasets=(replace(plan.datasets[0], n_tokens=1), plan.datasets[1])), scores


def of_another_length(plan, scores):
    return replace(plan, seq_length=16), scores


def without_scores(plan, scores):
    return plan, scores[:1]


def of_other_scores(plan, scores):
    surprisal_Q = np.ones_like(scores[0].surprisal_Q)
    return plan, [replace(scores[0], surprisal_Q=surprisal_Q), scores[1]]


def of_another_tokenizer(plan, scores):
    foreign = replace(scores[1], digest="0" * 16)
    return replace(plan, cuts=(plan.cuts[0], Cut(foreign.fingerprint))), [scores[0], foreign]


def of_another_split(plan, scores):
    drop_Q = scores[0].drop_Q.copy()
    drop_Q[100] = np.nan
    partial = replace(scores[0], drop_Q=drop_Q)
    return replace(plan, cuts=(Cut(partial.fingerprint), plan.cuts[1])), [partial, scores[1]]


def repeated_too_often(plan, scores):
    return replace(plan, max_epochs=1.2), scores


BAD_PLANS = {
    of_other_data: "the plan is for other data: it has left (300 sequences, 1 tokens)",
    of_another_length: "is for sequence length 16, the job has --seq-length 32",
    without_scores: "is not there; expected the scores of right; restore",
    of_other_scores: "the plan was made with scores",
    of_another_tokenizer: "made for other data or another tokenizer",
    of_another_split: "has no score for some training documents",
    repeated_too_often: "stratum 'left/2' of the plan would be repeated for 1.",
}


@pytest.mark.parametrize("spoil", BAD_PLANS, ids=lambda spoil: spoil.__name__)
def test_a_bad_plan_gets_one_line_and_nothing_is_written(corpus, plan, scores, tmp_path, spoil):
    plan, scores = spoil(plan, scores)
    plan.save(tmp_path / "plan.json")
    for one in scores:
        one.save(tmp_path / f"scores/{one.dataset.name}.tokscale.safetensors")
    before = sorted(tmp_path.rglob("*"))
    cache = tmp_path / "cache"
    flags = (
        "--tokscale-plan",
        str(tmp_path / "plan.json"),
        "--tokscale-dir",
        str(tmp_path / "run"),
    )
    flags = (*flags, "--tokscale-scores-dir", str(tmp_path / "scores"), "--train-iters", "14")
    words = job_flags(corpus, *flags, "--data-cache-path", str(cache))
    job = start(1, "-m", "megatron_tokscale.pretrain", *words)
    assert job.code == 2, job.output[-3000:]
    (line,) = job.refusals
    assert BAD_PLANS[spoil] in line
    assert "Traceback" not in job.output
    assert [
        path for path in sorted(tmp_path.rglob("*")) if cache not in (path, path.parent)
    ] == before
    assert not list(cache.glob("tokscale-*-stratum.npy"))
