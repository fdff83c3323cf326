import pickle
from fractions import Fraction

import numpy as np
import pytest

from megatron_tokscale.data import (
    DatasetIdentity,
    Plan,
    Stage,
    Stratum,
    build_index,
    load_or_build_index,
    realised_shares,
)
from megatron_tokscale.data import index as data_index
from megatron_tokscale.errors import TokscaleError


def plan_of(*stages: tuple[int, list[float]], seed: int = 0) -> Plan:
    n = len(stages[0][1])
    return Plan(
        datasets=tuple(DatasetIdentity(f"d{i}", 10, 100) for i in range(n)),
        strata=tuple(Stratum(f"d{i}", i) for i in range(n)),
        stages=tuple(Stage(start, tuple(weights)) for start, weights in stages),
        seq_length=8,
        seed=seed,
    )


def random_plan(rng: np.random.Generator, n_stages: int, n_strata: int, length: int) -> Plan:
    starts = [0, *sorted(rng.choice(np.arange(1, length), n_stages - 1, replace=False).tolist())]
    return plan_of(*((start, rng.dirichlet(np.ones(n_strata)).tolist()) for start in starts))


@pytest.fixture(scope="module")
def megatron_helper():
    helpers = pytest.importorskip("megatron.core.datasets.helpers_cpp")
    return helpers.build_blending_indices


def assert_same(a, b):
    assert np.array_equal(a.stratum_N, b.stratum_N)
    assert np.array_equal(a.draw_N, b.draw_N)


def test_the_reference_is_megatrons_compiled_rule_to_the_element(megatron_helper):
    rng = np.random.default_rng(0)
    for trial in range(60):
        n_strata = int(rng.integers(1, 20))
        weights = rng.dirichlet(np.full(n_strata, 0.3)) + 1e-6
        if trial % 3 == 0:  # ties
            weights = rng.integers(1, 4, n_strata).astype(float)
        plan = plan_of((0, weights.tolist()))
        assert_same(build_index(plan, 500), build_index(plan, 500, megatron_helper))


def test_the_compiled_rule_gives_the_same_index_over_many_stages(megatron_helper):
    rng = np.random.default_rng(1)
    for _ in range(20):
        plan = random_plan(rng, n_stages=6, n_strata=7, length=400)
        assert_same(build_index(plan, 500), build_index(plan, 500, megatron_helper))


def test_one_stage_is_megatrons_blended_dataset(megatron_helper):
    from types import SimpleNamespace

    from megatron.core.datasets.blended_dataset import BlendedDataset

    class Constituent:
        index_split = SimpleNamespace(name="train")
        unique_identifiers: dict[str, str] = {}  # noqa: RUF012

        def __len__(self):
            return 1000

    config = SimpleNamespace(defer_npy_index_mmap=False, path_to_cache=None, fast_cache_load=False)
    weights = [0.31, 5.0, 1.7, 0.02]
    blended = BlendedDataset([Constituent() for _ in weights], weights, 900, config)
    for blend in (None, megatron_helper):
        index = build_index(plan_of((0, weights), (100, weights)), 900, blend)
        assert np.array_equal(index.stratum_N, blended.dataset_index)
        assert np.array_equal(index.draw_N, blended.dataset_sample_index)


def test_draws_of_a_stratum_count_up_through_all_stages():
    rng = np.random.default_rng(2)
    for _ in range(20):
        plan = random_plan(rng, n_stages=8, n_strata=5, length=300)
        index = build_index(plan, 400)
        for z in range(5):
            draws = index.draw_N[index.stratum_N == z]
            assert draws.tolist() == list(range(len(draws)))


def test_the_first_samples_do_not_depend_on_how_many_follow():
    plan = random_plan(np.random.default_rng(3), n_stages=5, n_strata=4, length=100)
    whole = build_index(plan, 150)
    for n in range(151):
        part = build_index(plan, n)
        assert np.array_equal(part.stratum_N, whole.stratum_N[:n])
        assert np.array_equal(part.draw_N, whole.draw_N[:n])


def test_a_stage_added_later_leaves_the_past_alone():
    short = plan_of((0, [1, 2, 3]))
    longer = plan_of((0, [1, 2, 3]), (77, [3, 0, 1]))
    assert np.array_equal(build_index(short, 77).draw_N, build_index(longer, 120).draw_N[:77])


def test_realised_shares_stay_within_two_samples_of_the_plan_at_every_sample():
    rng = np.random.default_rng(4)
    for _ in range(20):
        plan = random_plan(rng, n_stages=6, n_strata=6, length=600)
        index = build_index(plan, 800)
        for n in range(0, 801, 20):
            shares = realised_shares(plan, index, n, [10] * 6)
            assert shares.count_Z.sum() == n
            assert np.abs(shares.count_Z - shares.target_Z).max() < 2


@pytest.mark.parametrize("length", [3, 8, 10, 12, 64])
def test_many_short_stages_neither_starve_nor_favour_a_small_stratum(length):
    tilt = [[0.55, 0.44, 0.01], [0.44, 0.55, 0.01]]
    plan = plan_of(*((length * i, tilt[i % 2]) for i in range(200)))
    n = 200 * length
    shares = realised_shares(plan, build_index(plan, n), n, [10] * 3)
    assert np.abs(shares.count_Z - shares.target_Z).max() < 1


def test_a_thousand_strata_of_unequal_weight_stay_near_the_plan():
    rng = np.random.default_rng(5)
    plan = plan_of(*((500 * i, rng.dirichlet(np.full(1000, 0.2)).tolist()) for i in range(10)))
    index = build_index(plan, 6000)
    for n in range(1000, 6001, 250):
        shares = realised_shares(plan, index, n, [10] * 1000)
        assert np.abs(shares.count_Z - shares.target_Z).max() < 3


def test_after_a_change_draws_come_in_the_order_they_fall_due():
    """Against exact fractions: draw j is due when the cumulative target passes j + 1/2."""
    before, after = [Fraction(1, 2), Fraction(3, 8), Fraction(1, 8)], [Fraction(1, 4)] * 2
    after.append(Fraction(1, 2))
    index = build_index(plan_of((0, [4, 3, 1]), (20, [1, 1, 2])), 100)
    drawn = np.bincount(index.stratum_N[:20], minlength=3).tolist()
    due = [
        ((j + Fraction(1, 2) - 20 * before[z]) / after[z], z, j)
        for z in range(3)
        for j in range(drawn[z], 200)
    ]
    expected = [(z, j) for _, z, j in sorted(due)[:80]]
    assert list(zip(index.stratum_N[20:], index.draw_N[20:], strict=True)) == expected


def test_a_segment_of_many_blocks_is_the_segment_in_one(monkeypatch):
    plan = random_plan(np.random.default_rng(6), n_stages=4, n_strata=5, length=300)
    whole = build_index(plan, 1000)
    monkeypatch.setattr(data_index, "_BLOCK", 37)
    assert_same(build_index(plan, 1000), whole)


def test_a_stratum_without_weight_is_not_drawn():
    plan = plan_of((0, [0, 1, 1]), (50, [1, 0, 0]), (60, [0, 0, 1]))
    index = build_index(plan, 100)
    assert set(index.stratum_N[:50].tolist()) == {1, 2}
    assert set(index.stratum_N[50:60].tolist()) == {0}
    assert set(index.stratum_N[60:].tolist()) == {2}


def test_shares_count_samples_and_epochs():
    plan = plan_of((0, [3, 1]))
    shares = realised_shares(plan, build_index(plan, 400), 400, [100, 50])
    assert shares.count_Z.tolist() == [300, 100]
    assert shares.epochs_Z.tolist() == [3.0, 2.0]
    assert shares.share_Z.tolist() == [0.75, 0.25]


def test_one_rank_builds_and_the_others_map_what_it_built(tmp_path):
    plan = plan_of((0, [3, 1]), (20, [1, 1]))
    with pytest.raises(TokscaleError, match="shared by all nodes"):
        load_or_build_index(plan, 50, tmp_path, build=False)
    built = load_or_build_index(plan, 50, tmp_path, build=True)
    times = {file: file.stat().st_mtime_ns for file in tmp_path.iterdir()}
    loaded = load_or_build_index(plan, 50, tmp_path, build=True)
    assert {file: file.stat().st_mtime_ns for file in tmp_path.iterdir()} == times
    assert_same(built, build_index(plan, 50))
    assert_same(loaded, built)
    assert len(times) == 2


def test_another_plan_or_length_has_files_of_its_own(tmp_path):
    for plan in (plan_of((0, [3, 1])), plan_of((0, [1, 1])), plan_of((0, [3, 1]), seed=1)):
        for n in (10, 11):
            assert_same(load_or_build_index(plan, n, tmp_path, build=True), build_index(plan, n))
    assert len(list(tmp_path.iterdir())) == 12


def test_a_damaged_index_file_is_refused(tmp_path):
    plan = plan_of((0, [3, 1]))
    load_or_build_index(plan, 1000, tmp_path, build=True)
    for file in sorted(tmp_path.iterdir()):
        content = file.read_bytes()
        for damaged in (b"", content[:200], np.zeros(0).tobytes()):
            file.write_bytes(damaged)
            with pytest.raises(TokscaleError, match=f"{file.name} is"):
                load_or_build_index(plan, 1000, tmp_path, build=False)
        file.write_bytes(content)


def test_a_mapped_index_is_pickled_as_its_paths(tmp_path):
    plan = plan_of((0, [3, 1]))
    mapped = load_or_build_index(plan, 100_000, tmp_path, build=True)
    pickled = pickle.dumps(mapped)
    assert len(pickled) < 1000
    assert_same(pickle.loads(pickled), mapped)
    in_memory = build_index(plan, 10)
    assert_same(pickle.loads(pickle.dumps(in_memory)), in_memory)
