"""Samples that a plan leaves out, against lists that are rearranged by hand.

Shapes: N draws.
"""

import pickle
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from megatron.training.datasets.data_samplers import MegatronPretrainingSampler
from torch.utils.data import DataLoader

from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.data import (
    Cut,
    DatasetIdentity,
    Decision,
    Plan,
    Skip,
    Stage,
    Stratum,
    build_index,
    epoch_permutation,
    with_decisions,
)
from megatron_tokscale.data.dataset import PlannedDataset
from megatron_tokscale.data.history import resume, save_run_plan, skips_of_run
from megatron_tokscale.data.index import count_strata
from megatron_tokscale.data.match import check_skipped_order
from megatron_tokscale.data.prepare import check_skips
from megatron_tokscale.data.skips import SkippedDraws
from megatron_tokscale.data.strata import Strata
from megatron_tokscale.data.take_over import take_over

KEY = 12345
ORDER = "--seed 1, --split 1,0,0"


def natural(size, n_draws):
    """The samples of a stratum, draw by draw, without skips."""
    epochs = -(-n_draws // size)
    return [epoch_permutation(size, KEY, e)(i) for e in range(epochs) for i in range(size)]


def rearranged(stream, samples, first, end):
    """The rule, on a list: places of the samples get what comes next behind the end."""
    behind = [sample for sample in stream[end:] if sample not in samples]
    stream = list(stream[:end])
    for j in range(first, end):
        if stream[j] in samples:
            stream[j] = behind.pop(0)
    return stream + behind


def skip_of(samples, first, end, start=0):
    return Skip(start, "s", tuple(sorted(samples)), first, end, ORDER)


CASES = [
    # size, skips of (samples, first, end)
    (11, [({3}, 4, 9)]),
    (11, [({0, 5, 10}, 0, 11)]),
    (7, [({1, 2}, 3, 20)]),
    (7, [({1, 2, 3, 4, 5, 6}, 3, 20)]),
    (7, [({1}, 30, 30)]),
    (7, [({1}, 0, 0)]),
    (20, [({2, 3}, 5, 15), ({7, 11}, 9, 15)]),
    (20, [({2, 3}, 5, 50), ({2, 7, 11}, 9, 55), ({0, 1}, 56, 70)]),
    (20, [({5}, 30, 50), ({7, 11}, 9, 48)]),
    (5, [({0}, 1, 12), ({1}, 2, 12), ({2}, 3, 12), ({3}, 4, 12)]),
]


def chain(size, skips):
    draws = None
    for samples, first, end in skips:
        draws = SkippedDraws(
            skip_of(samples, first, end), np.array(sorted(samples)), size, KEY, draws
        )
    return draws


@pytest.mark.parametrize(("size", "skips"), CASES)
def test_draws_are_those_of_a_list_that_is_rearranged_by_hand(size, skips):
    stream = expected = natural(size, 150 * size)
    for samples, first, end in skips:
        expected = rearranged(expected, samples, first, end)
    n_draws = 100
    draws = chain(size, skips)
    assert [stream[draws.draw(j)] for j in range(n_draws)] == expected[:n_draws]
    found_N = chain(size, skips).draws(np.arange(n_draws))
    assert [stream[j] for j in found_N] == expected[:n_draws]


@pytest.mark.parametrize(("size", "skips"), CASES)
def test_no_draw_is_made_twice_and_each_tells_where_it_came_from(size, skips):
    found_N = chain(size, skips).draws(np.arange(100))
    assert len({*found_N.tolist()}) == 100
    assert chain(size, skips).origins(found_N).tolist() == list(range(100))
    assert chain(size, skips).reach(100) > found_N.max()
    others = np.setdiff1d(np.arange(found_N.max()), chain(size, skips).draws(np.arange(9000)))
    assert (chain(size, skips).origins(others) == -1).all()


@pytest.mark.parametrize("size", [1, 2, 5, 64, 1000, 4097])
def test_positions_are_the_inverse_of_images(size):
    permutation = epoch_permutation(size, KEY, 3)
    images = permutation.many(np.arange(size))
    assert permutation.positions(images).tolist() == list(range(size))


# Two datasets whose samples tell where they are from: sample i of dataset d is 1000 d + i.
SIZES = [40, 30]
N = 100
START = 24


class Numbers:
    def __init__(self, dataset, size):
        self.dataset, self.size = dataset, size

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        return {"value": 1000 * self.dataset + index}


PLAN = Plan(
    datasets=tuple(DatasetIdentity(f"d{i}", 10, 100) for i in range(2)),
    strata=(Stratum("d0/0", 0, 0.5), Stratum("d0/1", 0, 0.5), Stratum("d1", 1)),
    stages=(Stage(0, (1, 1), (0.5, 0.5, 1)), Stage(50, (2, 1), (0.8, 0.2, 1))),
    seq_length=8,
    seed=5,
    cuts=(Cut("a"), None),
)
RANKED = [np.random.default_rng(0).permutation(SIZES[0]), None]


def planned(plan, n=N):
    datasets = [Numbers(d, size) for d, size in enumerate(SIZES)]
    return PlannedDataset(plan, datasets, build_index(plan, n), Strata(plan, SIZES, RANKED))


def values(plan, n=N):
    dataset = planned(plan, n)
    return [dataset[k]["value"] for k in range(n)]


def without(plan, left_out, start=START, n=N):
    """The plan without some values from a sample on."""
    index = build_index(plan, n)
    first_Z, end_Z = (count_strata(index.stratum_N[:k], plan.n_strata) for k in (start, n))
    strata = Strata(plan, SIZES, RANKED)
    skips = []
    for z, stratum in enumerate(plan.strata):
        own = {1000 * stratum.dataset + int(i): int(i) for i in strata.numbers(z)}
        numbers = tuple(sorted(own[value] for value in left_out if value in own))
        if numbers:
            counts = int(first_Z[z]), int(end_Z[z])
            skips.append(Skip(start, stratum.name, numbers, *counts, ORDER))
    return replace(plan, skips=(*plan.skips, *skips))


def stratum_of(value):
    if value >= 1000:
        return 2
    return int(value not in set(RANKED[0][:20].tolist()))


def bad_values(plan=PLAN):
    """Two values of each stratum that are drawn after the start."""
    drawn = values(plan)[START:]
    return [v for z in range(3) for v in list(dict.fromkeys(drawn))[::3] if stratum_of(v) == z][:6]


def test_all_other_positions_keep_their_samples_and_replacements_are_of_the_same_stratum():
    before, left_out = values(PLAN), set(bad_values())
    after = values(without(PLAN, left_out))
    assert after[:START] == before[:START]
    n_replaced = 0
    for old, new in zip(before[START:], after[START:], strict=True):
        if old in left_out:
            n_replaced += 1
            assert stratum_of(new) == stratum_of(old)
        else:
            assert new == old
    assert n_replaced >= len(left_out)


def test_no_sample_is_drawn_after_it_is_left_out_even_beyond_the_planned_end():
    left_out = set(bad_values())
    assert not left_out & {*values(without(PLAN, left_out), 400)[START:]}


def test_every_other_sample_is_drawn_as_often_as_before_or_more_and_as_evenly():
    """Places go to the samples whose turn is next, so counts in a stratum differ by 1 at most."""
    left_out = set(bad_values())
    before, after = Counter(values(PLAN)), Counter(values(without(PLAN, left_out)))
    assert sum(after.values()) == sum(before.values())
    kept = [v for d, size in enumerate(SIZES) for v in range(1000 * d, 1000 * d + size)]
    kept = [value for value in kept if value not in left_out]
    assert all(after[value] >= before[value] for value in kept)
    for z in range(3):
        counts = [after[value] for value in kept if stratum_of(value) == z]
        assert max(counts) - min(counts) <= 1


def test_the_first_to_take_a_place_is_the_next_that_the_training_would_draw():
    """With as many samples more in its planned end, each stratum would have drawn these next."""
    left_out = set(bad_values())
    before, longer = values(PLAN), values(PLAN, 400)
    after = values(without(PLAN, left_out))
    for z in range(3):
        upcoming = [v for v in longer[N:] if stratum_of(v) == z and v not in left_out]
        places = [
            k for k in range(START, N) if before[k] in left_out and stratum_of(before[k]) == z
        ]
        assert [after[k] for k in places] == upcoming[: len(places)]


def test_a_longer_training_continues_behind_the_replacements():
    left_out = set(bad_values())
    plan = without(PLAN, left_out)
    assert values(plan, 300)[:N] == values(plan)


@pytest.mark.parametrize("n_ranks", [1, 2, 4])
@pytest.mark.parametrize("workers", [0, 2])
def test_ranks_workers_and_restarts_see_the_same_samples(n_ranks, workers):
    plan = without(PLAN, bad_values())
    expected = values(plan)
    dataset = planned(plan)
    found = {}
    for consumed in (0, 40):
        for rank in range(n_ranks):
            sampler = MegatronPretrainingSampler(N, consumed, 2, rank, n_ranks)
            loader = DataLoader(dataset, batch_sampler=sampler, num_workers=workers)
            stream = [value for batch in loader for value in batch["value"].tolist()]
            places = [k for batch in sampler for k in batch]
            found |= dict(zip(places, stream, strict=True))
    assert [found[k] for k in sorted(found)] == [expected[k] for k in sorted(found)]
    copy = pickle.loads(pickle.dumps(dataset))
    assert [copy[k]["value"] for k in range(N)] == expected


def test_skips_after_skips_leave_what_the_job_has_drawn_by_then():
    first, second = bad_values()[:3], bad_values()[3:]
    one = without(PLAN, first)
    two = without(one, second, start=60)
    assert values(two)[:60] == values(one)[:60]
    assert not {*first, *second} & {*values(two, 300)[60:]}
    replaced = [k for k in range(60, N) if values(one)[k] in second]
    assert [k for k in range(60, N) if values(two)[k] != values(one)[k]] == replaced


def test_a_job_resumes_under_a_plan_with_skips_ahead_without_an_override(tmp_path):
    save_run_plan(PLAN, [], tmp_path)
    plan = without(PLAN, bad_values())
    for consumed in (START - 8, START):
        assert resume(plan, tmp_path, consumed, 3, accept=False) == (plan, [])
    save_run_plan(plan, [], tmp_path)
    assert resume(plan, tmp_path, START + 8, 4, accept=False) == (plan, [])
    with pytest.raises(TokscaleError, match="orders them otherwise"):
        resume(PLAN, tmp_path, START + 8, 4, accept=False)


@pytest.mark.parametrize("accept", [False, True])
def test_a_skip_in_the_past_of_a_job_is_refused(tmp_path, accept):
    save_run_plan(PLAN, [], tmp_path)
    with pytest.raises(TokscaleError, match=f"from sample {START} on, the run has consumed 32"):
        resume(without(PLAN, bad_values()), tmp_path, 32, 4, accept=accept)


def test_a_plan_that_takes_over_keeps_the_skips_of_the_past():
    one = without(PLAN, bad_values()[:3])
    other = replace(PLAN, stages=(Stage(0, (1, 3)),))
    taken = take_over(one, other, 50)
    assert taken.skips == one.skips
    assert values(taken)[:50] == values(one)[:50]
    assert not {*bad_values()[:3]} & {*values(taken, 300)[START:]}
    later = without(take_over(one, other, 50), bad_values()[3:], start=50)
    combined = take_over(one, replace(other, skips=later.skips[len(one.skips) :]), 50)
    assert combined.skips == later.skips
    assert values(combined) == values(later)


def test_a_plan_with_skips_is_another_plan_only_from_their_start_on(tmp_path):
    plan = without(PLAN, bad_values())
    assert plan.fingerprint != PLAN.fingerprint
    assert plan.fingerprint_until(START) == PLAN.fingerprint_until(START)
    assert plan.fingerprint_until(START + 1) != PLAN.fingerprint_until(START + 1)
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan


def test_the_limit_on_epochs_counts_the_samples_that_are_left():
    """Half of a stratum of 30 is left out from its first draw on: an epoch is 15 samples."""
    plan = without(PLAN, [1000 + i for i in range(15)], start=0)
    draws = PLAN.target_Z(N)[2]
    for limit, refused in ((draws / 15 - 0.2, True), (draws / 15 + 0.2, False)):
        limited = replace(plan, max_epochs=limit)
        if refused:
            with pytest.raises(TokscaleError, match=r"repeated for .* epochs"):
                Strata(limited, SIZES, RANKED).check(limited, N)
        else:
            Strata(limited, SIZES, RANKED).check(limited, N)


def test_draws_that_the_job_has_made_are_not_replaced():
    plan = without(PLAN, bad_values())
    check_skips(plan, build_index(PLAN, N), START)
    early = replace(plan, skips=tuple(replace(skip, first=0) for skip in plan.skips))
    with pytest.raises(TokscaleError, match="from its draw 0 on"):
        check_skips(early, build_index(PLAN, N), START)


def test_a_job_that_follows_the_skips_resumes_after_live_weights_have_moved_their_first_draws(
    tmp_path,
):
    """A decision before the start draws more of a stratum than the skip had counted by then."""
    plan = without(PLAN, bad_values())
    save_run_plan(plan, [], tmp_path)
    decision = Decision(2, START - 16, (9.0, 1.0))
    decided = with_decisions(plan, [decision])
    index = build_index(decided, N)
    with pytest.raises(TokscaleError, match="the job has made"):
        check_skips(decided, index, START)
    check_skips(decided, index, START, skips_of_run(tmp_path))
    assert skips_of_run(tmp_path / "new") == ()


def test_a_job_that_numbers_the_samples_otherwise_is_refused():
    plan = without(PLAN, [1003])
    check_skipped_order(plan, ["--seed 2", ORDER])
    check_skipped_order(plan, [None, None])
    with pytest.raises(TokscaleError, match=r"d1 .* numbered by --seed 1"):
        check_skipped_order(plan, [ORDER, "--seed 2, --split 1,0,0"])


@pytest.mark.parametrize(
    ("samples", "match"),
    [((40,), "expected some of its 30"), (tuple(range(30)), "and not all")],
)
def test_samples_that_a_stratum_does_not_hold_or_all_of_it_are_refused(samples, match):
    plan = replace(PLAN, skips=(Skip(0, "d1", samples, 0, 10, ORDER),))
    with pytest.raises(TokscaleError, match=match):
        planned(plan)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"stratum": "other"}, "one of its strata"),
        ({"first": 5, "end": 3}, "numbers that ascend"),
        ({"samples": ()}, "one or more"),
        ({"samples": (3, 2)}, "ascend"),
        ({"samples": (-1,)}, "0 or more"),
        ({"start": -1}, "0 or more"),
    ],
)
def test_a_malformed_skip_is_refused(change, match):
    skip = Skip(3, "d1", (1, 2), 0, 10, ORDER)
    with pytest.raises(TokscaleError, match=match):
        replace(PLAN, skips=(replace(skip, **change),))
    with pytest.raises(TokscaleError, match="starts of 0 or more"):
        replace(PLAN, skips=(skip, replace(skip, start=2)))
