"""A plan is for the data that it was made for, in whatever order the job has them."""

import pytest

from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.data import DatasetIdentity, Plan, Stage, Stratum, match_datasets

A, B, C = (DatasetIdentity(name, 10, 100) for name in "abc")


def plan_of(*datasets: DatasetIdentity, stages=None) -> Plan:
    return Plan(
        datasets=datasets,
        strata=tuple(Stratum(f"{d}", d) for d in range(len(datasets))),
        stages=stages or (Stage(0, (1.0,) * len(datasets)),),
        seq_length=8,
        seed=0,
    )


@pytest.mark.parametrize(
    ("planned", "found", "order"),
    [
        ((A, B, C), (A, B, C), [0, 1, 2]),
        ((A, B, C), (C, A, B), [1, 2, 0]),
        ((A, A, B), (A, B, A), [0, 2, 1]),  # twins in the order they come
        ((A,), (A,), [0]),
    ],
)
def test_each_dataset_is_found_once(planned, found, order):
    assert match_datasets(plan_of(*planned), found, 8) == order


def test_other_data_are_refused():
    larger = DatasetIdentity("a", 11, 100)
    with pytest.raises(TokscaleError, match=r"it has a \(10 .* the job has a \(11 sequences"):
        match_datasets(plan_of(A, B), [larger, B], 8)
    with pytest.raises(TokscaleError, match=r"it has b .* the job has no other dataset"):
        match_datasets(plan_of(A, B), [A], 8)
    with pytest.raises(TokscaleError, match="it lacks c"):
        match_datasets(plan_of(A, B), [A, B, C], 8)
    with pytest.raises(TokscaleError, match="sequence length 8, the job's is 16"):
        match_datasets(plan_of(A), [A], 16)


def test_a_dataset_that_is_no_longer_drawn_from_may_be_missing():
    plan = plan_of(A, B, stages=(Stage(0, (1, 1)), Stage(100, (0, 1))))
    assert match_datasets(plan, [B], 8, consumed=100) == [None, 0]
    assert match_datasets(plan, [B], 8, consumed=2000) == [None, 0]
    assert match_datasets(plan, [B, A], 8, consumed=100) == [1, 0]
    with pytest.raises(TokscaleError, match="it has a"):
        match_datasets(plan, [B], 8, consumed=99)
    again = plan_of(A, B, stages=(Stage(0, (1, 1)), Stage(100, (0, 1)), Stage(200, (1, 1))))
    with pytest.raises(TokscaleError, match="it has a"):
        match_datasets(again, [B], 8, consumed=100)
