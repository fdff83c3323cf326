"""Which samples a stratum holds and in which order, against sorting by hand."""

import pickle
from collections import Counter
from dataclasses import replace
from itertools import chain, pairwise

import numpy as np
import pytest

from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.data import Cut, DatasetIdentity, Plan, Stage, Stratum
from megatron_tokscale.data.samples import SampleScores
from megatron_tokscale.data.strata import Strata, load_or_build_strata, rank_samples

SHARES = ((0.25, 0.25, 0.3, 0.2), (1.0,), (0.5, 0.5))
CUTS = (Cut("web-scores", unlearned=True), None, Cut("code-scores"))
SIZES = [203, 10, 37]
KEYS = ["key-web", "key-books", "key-code"]


def plan_of(shares=SHARES, cuts=CUTS, **changes) -> Plan:
    plan = Plan(
        datasets=tuple(DatasetIdentity(f"d{d}", 10, 100) for d in range(len(shares))),
        strata=tuple(
            Stratum(f"d{d}/{i}", d, share)
            for d, row in enumerate(shares)
            for i, share in enumerate(row)
        ),
        stages=(Stage(0, (1.0,) * len(shares)),),
        seq_length=8,
        seed=5,
        cuts=cuts,
    )
    return replace(plan, **changes)


def scores_of(size: int, seed: int) -> SampleScores:
    """With ties, samples without a drop and samples without any score."""
    rng = np.random.default_rng(seed)
    time_N, unlearned_N = rng.integers(0, 50, size).astype(float), rng.integers(0, 9, size) / 8
    time_N[::7] = np.nan
    unlearned_N[::11] = np.nan
    drop_N = np.where(np.isnan(time_N), 0.0, 1.0)
    return SampleScores(time_N, drop_N, drop_N, unlearned_N, rng.integers(0, 30, size) / 3)


def scores(dataset: int) -> SampleScores:
    return scores_of(SIZES[dataset], seed=dataset)


def build(folder, plan=None, sizes=SIZES, keys=KEYS, scores_of=scores, *, build=True) -> Strata:
    return load_or_build_strata(plan or plan_of(), sizes, keys, scores_of, folder, build=build)


def held(strata: Strata, stratum: int, epoch: int = 0) -> list[int]:
    size = int(strata.size_Z[stratum])
    located = [strata.locate(stratum, draw) for draw in range(epoch * size, (epoch + 1) * size)]
    assert all(found[1] == epoch for found in located)
    return [found[2] for found in located]


def sorted_by_hand(order, size, n_unlearned, of: SampleScores) -> list[int]:
    if order == "frequency":
        return sorted(range(size), key=lambda j: of.surprisal_N[j])
    unlearned = [0.0 if np.isnan(u) else u for u in of.unlearned_N]
    never = sorted(range(size), key=lambda j: unlearned[j])[size - n_unlearned :]
    time = [-np.inf if np.isnan(t) else t for t in of.learning_time_N]
    others = sorted((j for j in range(size) if j not in {*never}), key=lambda j: time[j])
    return [*others, *never]


@pytest.mark.parametrize("order", ["learning-time", "frequency"])
@pytest.mark.parametrize("unlearned", [False, True])
@pytest.mark.parametrize("size", [0, 1, 3, 203])
def test_samples_are_ranked_as_python_sorts_them(order, unlearned, size):
    plan = plan_of(cuts=(Cut("s", order, unlearned), *CUTS[1:]))
    n_unlearned = size - round(0.8 * size) if unlearned else 0
    of = scores_of(size, seed=1)
    ranked = rank_samples(plan, 0, size, of)
    assert ranked.dtype == np.int32
    assert ranked.tolist() == sorted_by_hand(order, size, n_unlearned, of)


def test_the_last_stratum_holds_the_samples_with_most_never_learned_tokens(tmp_path):
    strata, of = build(tmp_path), scores(0)
    never = held(strata, 3)
    others = {*range(SIZES[0])} - {*never}
    unlearned_N = np.nan_to_num(of.unlearned_N)
    assert min(unlearned_N[never]) >= max(unlearned_N[[*others]])
    assert len(never) == SIZES[0] - round(0.8 * SIZES[0])


def test_strata_of_learning_time_follow_each_other(tmp_path):
    strata, of = build(tmp_path), scores(2)
    time_N = np.where(np.isnan(of.learning_time_N), -np.inf, of.learning_time_N)
    early, late = held(strata, 5), held(strata, 6)
    assert max(time_N[early]) <= min(time_N[late])


@pytest.mark.parametrize("sizes", [SIZES, [0, 0, 0], [1, 1, 1], [7, 2, 5], [1000, 3, 999]])
def test_sizes_are_differences_of_rounded_cumulative_shares(sizes):
    plan = plan_of()
    expected = []
    for row, size in zip(SHARES, sizes, strict=True):
        bounds = [round(sum(row[:i]) * size) for i in range(len(row) + 1)]
        expected += [stop - start for start, stop in pairwise(bounds)]
    found = plan.sizes_Z(sizes)
    assert found.tolist() == expected
    assert [found[:4].sum(), found[4], found[5:].sum()] == sizes


def test_shares_that_do_not_quite_sum_to_one_leave_no_sample_out():
    third = round(1 / 3, 7)
    plan = plan_of(((third, third, third),), (Cut("s"),))
    for size in (1, 2, 3, 10, 100_000, 10_000_001):
        assert plan.sizes_Z([size]).sum() == size


def test_each_sample_is_in_exactly_one_stratum_of_its_dataset(tmp_path):
    strata = build(tmp_path)
    assert strata.size_Z.tolist() == strata.plan.sizes_Z(SIZES).tolist()
    for dataset, size in enumerate(SIZES):
        of_dataset = [held(strata, z) for z in strata.plan.strata_of(dataset)]
        assert sorted(chain(*of_dataset)) == list(range(size))
        for z in strata.plan.strata_of(dataset):
            assert strata.locate(z, 0)[0] == dataset


def test_every_epoch_of_a_stratum_is_whole_and_in_another_order(tmp_path):
    strata = build(tmp_path)
    for z in range(len(strata.size_Z)):
        epochs = [held(strata, z, epoch) for epoch in range(4)]
        assert all(Counter(epoch) == Counter(epochs[0]) for epoch in epochs)
        assert len({tuple(epoch) for epoch in epochs}) == 4


def test_draws_located_together_are_those_located_alone(tmp_path):
    strata = build(tmp_path)
    rng = np.random.default_rng(0)
    for z, size in enumerate(strata.size_Z.tolist()):
        draws = rng.permutation(np.arange(3 * size + 2))
        epochs, numbers = strata.locate_many(z, draws)
        expected = [strata.locate(z, int(draw))[1:] for draw in draws]
        assert list(zip(epochs.tolist(), numbers.tolist(), strict=True)) == expected
    none = strata.locate_many(0, np.empty(0, np.int64))
    assert [len(array) for array in none] == [0, 0]


def test_an_empty_stratum_does_not_disturb_the_others(tmp_path):
    strata = build(tmp_path, sizes=[1, 10, 1], scores_of=lambda d: scores_of(1, d))
    assert sorted(strata.size_Z.tolist()) == [0, 0, 0, 0, 1, 1, 10]


def test_one_rank_builds_and_the_others_map_what_it_built(tmp_path):
    with pytest.raises(TokscaleError, match="shared by all nodes"):
        build(tmp_path, build=False)
    built = build(tmp_path)
    files = {file: file.stat().st_mtime_ns for file in tmp_path.iterdir()}
    assert len(files) == 2, "the dataset that is not cut needs none"

    def nobody_asks(dataset):
        raise AssertionError(dataset)

    for again in (True, False):
        mapped = build(tmp_path, scores_of=nobody_asks, build=again)
        for z in range(len(built.size_Z)):
            assert held(mapped, z) == held(built, z)
    assert {file: file.stat().st_mtime_ns for file in tmp_path.iterdir()} == files


def test_an_uncut_dataset_is_never_scored(tmp_path):
    asked = []
    build(tmp_path, scores_of=lambda d: asked.append(d) or scores(d))
    assert asked == [0, 2]


def test_the_file_name_of_ranks_changes_with_everything_that_decides_them(tmp_path):
    first = plan_of()
    build(tmp_path, first)
    web = replace(CUTS[0], scores="others")
    changes = [
        *({"cuts": (cut, *CUTS[1:])} for cut in (web, replace(CUTS[0], unlearned=False))),
        {"cuts": (replace(CUTS[0], order="frequency"), *CUTS[1:])},
    ]
    names = {file.name for file in tmp_path.iterdir()}
    for change in changes:
        build(tmp_path, replace(first, **change))
        now = {file.name for file in tmp_path.iterdir()}
        assert len(now - names) >= 1, change
        names = now
    build(tmp_path, plan_of(((0.25, 0.25, 0.25, 0.25), *SHARES[1:])))
    build(tmp_path, first, keys=["another", *KEYS[1:]])
    build(tmp_path, first, sizes=[204, 10, 37], scores_of=lambda d: scores_of([204, 10, 37][d], d))
    assert len({file.name for file in tmp_path.iterdir()}) == len(names) + 3


def test_stages_and_limits_share_the_files(tmp_path):
    build(tmp_path)
    names = {file.name for file in tmp_path.iterdir()}
    build(tmp_path, plan_of(stages=(Stage(0, (1, 2, 3)), Stage(9, (1, 1, 1))), max_epochs=3.0))
    assert {file.name for file in tmp_path.iterdir()} == names


def test_damaged_ranks_are_refused(tmp_path):
    build(tmp_path)
    for file in sorted(tmp_path.iterdir()):
        content = file.read_bytes()
        for damaged in (b"", content[:90], content[:-8]):
            file.write_bytes(damaged)
            with pytest.raises(TokscaleError, match=f"{file.name} is") as caught:
                build(tmp_path, build=False)
            assert "\n" not in str(caught.value)
        for array in (np.zeros(5, np.int32), np.zeros(SIZES[0], np.int64)):
            with file.open("wb") as stream:
                np.save(stream, array)
            with pytest.raises(TokscaleError, match=r"holds int.* of shape .*; expected shape"):
                build(tmp_path, build=False)
        file.write_bytes(content)


def test_mapped_strata_are_pickled_as_their_paths(tmp_path):
    sizes = [200_000, 10, 37]
    strata = build(tmp_path, sizes=sizes, scores_of=lambda d: scores_of(sizes[d], d))
    pickled = pickle.dumps(strata)
    assert len(pickled) < 3000
    again = pickle.loads(pickled)
    for z in range(len(strata.size_Z)):
        for draw in (0, 1, 77, 250_000):
            assert again.locate(z, draw) == strata.locate(z, draw)


def test_strata_in_memory_are_pickled_whole():
    plan = plan_of()
    ranked = [rank_samples(plan, 0, SIZES[0], scores(0)), None, np.arange(37, dtype=np.int32)]
    strata = Strata(plan, SIZES, ranked)
    again = pickle.loads(pickle.dumps(strata))
    assert [held(again, z) for z in range(7)] == [held(strata, z) for z in range(7)]


def limited(weights, max_epochs, within=None) -> Plan:
    return plan_of(stages=(Stage(0, weights, within),), max_epochs=max_epochs)


def test_drawing_from_a_stratum_without_samples_is_refused():
    plan = plan_of()
    empty = Strata(plan, [203, 0, 37], [np.arange(203, dtype=np.int32), None, np.arange(37)])
    with pytest.raises(TokscaleError, match="'d1/0' of the plan has no training samples"):
        empty.check(plan, 10)
    empty.check(limited((1, 0, 1), None), 10)
    later = plan_of(stages=(Stage(0, (1, 0, 1)), Stage(100, (1, 1, 1))))
    empty.check(later, 100)
    with pytest.raises(TokscaleError, match="'d1/0' of the plan has no training samples"):
        empty.check(later, 101)


@pytest.mark.parametrize(
    ("n_samples", "refused"), [(60, False), (62, False), (64, True), (6000, True)]
)
def test_a_stratum_is_repeated_for_no_more_epochs_than_its_limit(n_samples, refused):
    """Of every three samples one is of d1's ten; up to one more than twice these is rounding."""
    plan = limited((1, 1, 1), 2.0)
    strata = Strata(plan, [10_000, 10, 10_000], [np.arange(10_000), None, np.arange(10_000)])
    strata.check(limited((1, 1, 1), None), n_samples)
    if not refused:
        strata.check(plan, n_samples)
        return
    times = f"{n_samples / 30:.3g}"
    sentence = f"'d1/0' .* for {times} epochs .*; expected at most 2;"
    with pytest.raises(TokscaleError, match=sentence):
        strata.check(plan, n_samples)


def test_rounding_in_a_tiny_stratum_does_not_hide_another_that_is_repeated_too_often():
    """One sample drawn 2.9 times exceeds its limit by rounding, a thousand drawn 2100 times not."""
    plan = plan_of(((1.0,), (1.0,)), (None, None), stages=(Stage(0, (2.9, 2100)),), max_epochs=2.0)
    strata = Strata(plan, [1, 1000], [None, None])
    with pytest.raises(TokscaleError, match=r"'d1/0' .* would be repeated for 2\.1 epochs"):
        strata.check(plan, 2103)


def test_within_a_dataset_the_limit_is_each_stratums():
    within = (0.7, 0.1, 0.1, 0.1, 1, 0.5, 0.5)
    plan = limited((1, 0, 0), 1.5, within)
    strata = Strata(plan, [1000, 10, 37], [np.arange(1000), None, np.arange(37)])
    strata.check(plan, 500)
    with pytest.raises(TokscaleError, match=r"stratum 'd0/0' .* 1\.68 epochs in 600 samples"):
        strata.check(plan, 600)
