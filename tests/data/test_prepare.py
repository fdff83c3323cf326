"""`prepare` sets a plan up: the stream is that of its parts, put together by hand."""

from dataclasses import replace

import numpy as np
import pytest

from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.data import Cut, DatasetIdentity, Plan, Stage, Stratum, build_index
from megatron_tokscale.data.dataset import PlannedDataset
from megatron_tokscale.data.prepare import JobDataset, PlanPart, check_draws, match_job, prepare
from megatron_tokscale.data.samples import SampleScores
from megatron_tokscale.data.strata import Strata, rank_samples

SIZES = (20, 30)
N = 60


class Numbers:
    """A dataset whose samples are their numbers."""

    def __init__(self, size):
        self.size = size

    def __len__(self):
        return self.size

    def __getitem__(self, number):
        return {"number": number}


def scores():
    rng = np.random.default_rng(3)
    return SampleScores(*rng.random((5, SIZES[0])))


@pytest.fixture
def plan():
    return Plan(
        datasets=(DatasetIdentity("a", 5, 200), DatasetIdentity("b", 7, 300)),
        strata=(Stratum("a/0", 0, 0.5), Stratum("a/1", 0, 0.5), Stratum("b", 1)),
        stages=(Stage(0, (0.5, 0.5), (0.9, 0.1, 1.0)), Stage(30, (0.2, 0.8))),
        seq_length=8,
        seed=5,
        cuts=(Cut("scores"), None),
    )


def parts(scores=scores):
    return [PlanPart(Numbers(size), f"key{size}", scores) for size in SIZES]


def stream(dataset):
    return [dataset[k] for k in range(len(dataset))]


def test_the_samples_are_those_of_the_parts_put_together(plan, tmp_path):
    ranked = [rank_samples(plan, 0, SIZES[0], scores()), None]
    expected = PlannedDataset(
        plan,
        [Numbers(size) for size in SIZES],
        build_index(plan, N),
        Strata(plan, SIZES, ranked),
    )
    built = prepare(plan, parts(), N, tmp_path, build=True)
    assert stream(built) == stream(expected)

    def no_scores():
        raise AssertionError("the strata are on disk")

    mapped = prepare(plan, parts(no_scores), N, tmp_path, build=False)
    assert stream(mapped) == stream(expected)
    later = prepare(plan, parts(no_scores), N - 20, tmp_path, build=True, offset=20)
    assert stream(later) == stream(expected)[20:]


def test_another_model_chunk_shares_the_index(plan, tmp_path):
    first = prepare(plan, parts(), N, tmp_path, build=True, shares_index=True)
    again = prepare(plan, parts(), N, tmp_path, build=True, shares_index=True, like=first)
    assert first.index.is_shared
    assert again.index is first.index and again.strata is first.strata


def test_nothing_is_written_for_a_plan_that_repeats_a_stratum_too_often(plan, tmp_path):
    strict = replace(plan, max_epochs=1.0)
    with pytest.raises(TokscaleError, match="'a/0' of the plan would be repeated"):
        prepare(strict, parts(), N, tmp_path, build=True)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(TokscaleError, match="'a/0' of the plan would be repeated"):
        check_draws(strict, SIZES, N, 0)
    with pytest.raises(TokscaleError, match="'b' of the plan has no training samples"):
        check_draws(plan, (SIZES[0], 0), N, 0)
    check_draws(plan, SIZES, N, 0)


def test_a_job_of_other_data_or_other_documents_is_refused(plan):
    known = replace(plan, documents=((0, 4), (0, 6)))
    found = [JobDataset(known.datasets[1], (0, 6)), JobDataset(known.datasets[0], (0, 4))]
    assert match_job(known, found, 8, 0) == [1, 0]
    with pytest.raises(TokscaleError, match="its training part of a is documents 0 to 4"):
        match_job(known, [found[0], replace(found[1], documents=(0, 5))], 8, 0)
    with pytest.raises(TokscaleError, match="the plan is for other data: it has a"):
        match_job(known, [found[0]], 8, 0)
