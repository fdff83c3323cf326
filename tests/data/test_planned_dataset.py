"""Tiny datasets whose values tell where they came from: sample i of dataset d is 1000 d + i."""

import pickle
from collections import Counter

import numpy as np
import pytest
from megatron.training.datasets.data_samplers import MegatronPretrainingSampler
from torch.utils.data import DataLoader

from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.data import Cut, DatasetIdentity, Plan, Stage, Stratum, build_index
from megatron_tokscale.data.dataset import PlannedDataset
from megatron_tokscale.data.strata import Strata

SIZES = [7, 16, 1, 30]
STAGES = ((0, (1, 2, 0.1, 3)), (40, (3, 1, 0.3, 1)), (41, (0, 1, 0, 1)), (90, (1, 1, 1, 1)))
N = 200


class Numbers:
    def __init__(self, dataset: int, size: int):
        self.dataset, self.size = dataset, size

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        if not 0 <= index < self.size:
            raise IndexError(index)
        return {"value": 1000 * self.dataset + index}


def plan_of(sizes=SIZES, stages=STAGES) -> Plan:
    return Plan(
        datasets=tuple(DatasetIdentity(f"d{i}", 10, 100) for i in range(len(sizes))),
        strata=tuple(Stratum(f"d{i}", i) for i in range(len(sizes))),
        stages=tuple(Stage(start, weights) for start, weights in stages),
        seq_length=8,
        seed=5,
    )


def planned(n: int = N, sizes=SIZES, stages=STAGES, **attributes) -> PlannedDataset:
    plan = plan_of(sizes, stages)
    datasets = [Numbers(d, size) for d, size in enumerate(sizes)]
    return PlannedDataset(plan, datasets, build_index(plan, n), **attributes)


def stratified(n: int = N) -> PlannedDataset:
    """The same datasets, the second and the fourth in strata that are weighted differently."""
    shares = [[1.0], [0.5, 0.3, 0.2], [1.0], [0.6, 0.4]]
    plan = Plan(
        datasets=plan_of().datasets,
        strata=tuple(
            Stratum(f"d{d}/{i}", d, share)
            for d, row in enumerate(shares)
            for i, share in enumerate(row)
        ),
        stages=tuple(
            Stage(start, weights, within)
            for (start, weights), within in zip(
                STAGES,
                (
                    (1, 0.5, 0.3, 0.2, 1, 0.6, 0.4),
                    (1, 0.1, 0.1, 0.8, 1, 1, 0),
                    (1, 1, 2, 3, 1, 0.5, 0.5),
                    (1, 3, 2, 1, 1, 0, 1),
                ),
                strict=True,
            )
        ),
        seq_length=8,
        seed=5,
        cuts=(None, Cut("a"), None, Cut("b")),
    )
    datasets = [Numbers(d, size) for d, size in enumerate(SIZES)]
    ranked = [np.random.default_rng(d).permutation(size) for d, size in enumerate(SIZES)]
    ranked = [rank if cut else None for rank, cut in zip(ranked, plan.cuts, strict=True)]
    strata = Strata(plan, SIZES, ranked)
    return PlannedDataset(plan, datasets, build_index(plan, n), strata)


def values(dataset, order=range(N)) -> list[int]:
    return [dataset[k]["value"] for k in order]


@pytest.mark.parametrize("cut", range(0, N + 1, 7))
def test_no_sample_is_lost_or_repeated_before_its_epoch_is_over(cut):
    """Of a dataset of n samples drawn m times, each sample was seen m // n times or once more."""
    seen = Counter(values(planned(), range(cut)))
    for dataset, size in enumerate(SIZES):
        counts = [seen[1000 * dataset + i] for i in range(size)]
        assert set(counts) <= {sum(counts) // size, -(-sum(counts) // size)}


def test_each_epoch_is_the_whole_dataset_in_another_order():
    stream = values(planned())
    for dataset, size in enumerate(SIZES):
        own = [value for value in stream if value // 1000 == dataset]
        epochs = [own[i : i + size] for i in range(0, len(own) - size + 1, size)]
        assert len(epochs) >= 1
        for epoch in epochs:
            assert sorted(epoch) == [1000 * dataset + i for i in range(size)]
    d0 = [value for value in stream if value < 1000]
    assert d0[:7] != d0[7:14]


def test_dataset_id_says_where_a_sample_came_from():
    dataset = planned()
    for k in range(N):
        sample = dataset[k]
        assert sample["dataset_id"] == sample["value"] // 1000
        assert sample["dataset_id"].dtype == np.int16


def test_locate_tells_stratum_epoch_and_sample():
    dataset = planned()
    drawn: Counter[int] = Counter()
    for k in range(N):
        stratum, epoch, number = dataset.locate(k)
        assert epoch == drawn[stratum] // SIZES[stratum]
        assert dataset[k]["value"] == 1000 * stratum + number
        drawn[stratum] += 1


@pytest.mark.parametrize("make", [planned, stratified])
def test_the_same_sample_for_any_order_of_access(make):
    expected = values(make())
    dataset = make()
    order = np.random.default_rng(0).permutation(N).tolist()
    assert values(dataset, order) == [expected[k] for k in order]
    assert values(dataset, reversed(range(N))) == expected[::-1]


@pytest.mark.parametrize("make", [planned, stratified])
def test_the_same_samples_from_a_pickled_copy(make):
    assert values(pickle.loads(pickle.dumps(make()))) == values(make())


def batches(dataset, size, workers, consumed, micro=2, batch=8):
    """What each global batch of Megatron's samplers and loaders holds, from `consumed` on."""
    loaders = [
        DataLoader(
            dataset,
            batch_sampler=MegatronPretrainingSampler(len(dataset), consumed, micro, rank, size),
            num_workers=workers,
        )
        for rank in range(size)
    ]
    rounds = [
        value
        for parts in zip(*loaders, strict=True)
        for part in parts
        for value in part["value"].tolist()
    ]
    return [rounds[i : i + batch] for i in range(0, len(rounds) - batch + 1, batch)]


@pytest.mark.parametrize("make", [planned, stratified])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_same_batches_for_any_number_of_ranks_and_workers(make, size, workers):
    expected = values(make())
    found = batches(make(), size, workers, consumed=0)
    assert found == [expected[i : i + 8] for i in range(0, N, 8)]


@pytest.mark.parametrize("make", [planned, stratified])
def test_cut_anywhere_and_resumed_on_another_number_of_ranks_the_stream_goes_on(make):
    expected = values(make())
    for k in range(0, N - 8):
        size = (1, 2, 4)[k % 3]
        found = batches(make(), size, 0, consumed=k)
        assert found == [expected[i : i + 8] for i in range(k, N - 7, 8)]


@pytest.mark.parametrize("cut", range(0, N + 1, 7))
def test_no_sample_of_a_stratum_comes_again_before_its_epoch_is_over(cut):
    dataset = stratified()
    seen = Counter(dataset.locate(k)[::2] for k in range(cut))
    for stratum, size in enumerate(dataset.strata.size_Z.tolist()):
        counts = [count for (z, _), count in seen.items() if z == stratum]
        drawn = sum(counts)
        assert len(counts) == min(size, drawn)
        assert set(counts) <= {drawn // size, -(-drawn // size)}


def test_a_later_part_of_a_plan_as_a_dataset_of_its_own():
    """As Megatron asks for with --phase-transition-iterations: each phase counts from 0."""
    whole, part = planned(), planned(offset=60)
    assert len(part) == N - 60
    assert values(part, range(N - 60)) == values(whole)[60:]
    with pytest.raises(IndexError):
        part[N - 60]


@pytest.mark.parametrize("make", [planned, stratified])
def test_the_order_does_not_depend_on_the_length_of_training(make):
    assert values(make(n=50), range(50)) == values(make(), range(50))


def test_a_dataset_added_later_leaves_the_order_of_the_others():
    """Each stratum's permutation is keyed by its name."""
    alone = values(planned(sizes=[7, 16], stages=((0, (1, 1)),)))
    more = values(planned(sizes=[7, 16, 5], stages=((0, (1, 1, 1)),)))
    for dataset in (0, 1):
        own = [value for value in more if value // 1000 == dataset]
        assert own == [value for value in alone if value // 1000 == dataset][: len(own)]


@pytest.mark.parametrize("make", [planned, stratified])
def test_beyond_the_last_sample_is_an_index_error(make):
    dataset = make()
    assert len(dataset) == N
    for k in (N, N + 1, -1):
        with pytest.raises(IndexError):
            dataset[k]


def test_the_split_is_the_users():
    split = object()
    dataset = planned(split=split, index_split=split)
    assert dataset.split is split
    assert dataset.index_split is split


def test_a_stratum_without_samples_is_refused_unless_it_is_never_drawn():
    with pytest.raises(TokscaleError, match="'d1' of the plan has no training samples"):
        planned(sizes=[3, 0], stages=((0, (1, 1)),))
    planned(sizes=[3, 0], stages=((0, (1, 0)), (N, (1, 1))))


def test_a_number_of_datasets_other_than_the_plans_is_refused():
    dataset = planned()
    with pytest.raises(TokscaleError, match="for 4 datasets, the job has 3"):
        PlannedDataset(dataset.plan, dataset.datasets[:3], dataset.index)
