"""A plan that changes under a run leaves its past alone, and loses and repeats no sample."""

import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.data import (
    Cut,
    DatasetIdentity,
    Decision,
    Plan,
    PlanProvenance,
    Replanning,
    Stage,
    Stratum,
    build_index,
    followed_plan,
    with_decisions,
)
from megatron_tokscale.data.dataset import PlannedDataset
from megatron_tokscale.data.history import (
    load_run_plan,
    resume,
    save_decisions,
    save_run_plan,
)
from megatron_tokscale.data.index import extend_index
from megatron_tokscale.data.record import BlendRecord, DataRecord, PlanRecord, record_path
from megatron_tokscale.data.strata import Strata
from megatron_tokscale.data.take_over import take_over

SIZES = {"a": 7, "b": 16, "c": 5}
SHARES = {"a": (1.0,), "b": (0.5, 0.25, 0.25), "c": (0.6, 0.4)}
N = 120


def plan_of(names: str, *stages: Stage, **changes) -> Plan:
    fields = {
        "datasets": tuple(DatasetIdentity(name, SIZES[name], 100) for name in names),
        "strata": tuple(
            Stratum(f"{name}/{i}", d, share)
            for d, name in enumerate(names)
            for i, share in enumerate(SHARES[name])
        ),
        "stages": stages,
        "seq_length": 8,
        "seed": 5,
        "cuts": tuple(Cut(name) if len(SHARES[name]) > 1 else None for name in names),
    }
    return Plan(**fields | changes)


PAST = plan_of("ab", Stage(0, (2, 3), (1, 0.2, 0.3, 0.5)), Stage(50, (1, 1)))
OTHER = plan_of("ab", Stage(0, (1, 4)), Stage(70, (3, 1), (1, 0.6, 0.3, 0.1)), seed=77)
MOVED = plan_of("bc", Stage(0, (1, 1), (0.2, 0.4, 0.4, 1, 1)), Stage(80, (1, 3)), seed=77)


class Numbers:
    """Sample i of the dataset with this name is (name, i)."""

    def __init__(self, name: str):
        self.name = name

    def __len__(self):
        return SIZES[self.name]

    def __getitem__(self, index):
        return {"value": (self.name, int(index))}


def dataset_of(plan: Plan, *, consumed: int = 0, gone: str = "") -> PlannedDataset:
    """The same cut of the same data for each plan."""
    names = [dataset.name for dataset in plan.datasets]
    sizes = [0 if name in gone else SIZES[name] for name in names]
    ranked = [
        np.random.default_rng(SIZES[name]).permutation(SIZES[name]) if cut and size else None
        for name, cut, size in zip(names, plan.cuts, sizes, strict=True)
    ]
    datasets = [None if name in gone else Numbers(name) for name in names]
    strata = Strata(plan, sizes, ranked)
    return PlannedDataset(plan, datasets, build_index(plan, N), strata, consumed=consumed)


def values(dataset: PlannedDataset, start: int = 0) -> list[tuple[str, int]]:
    return [dataset[k]["value"] for k in range(start, N)]


def names_of(dataset: PlannedDataset, start: int, stop: int) -> list[str]:
    strata = dataset.plan.strata
    return [strata[dataset.locate(k)[0]].name for k in range(start, stop)]


def assert_nothing_lost_or_repeated(stream, stratum_of):
    """Each sample of a stratum of n that was drawn m times comes m // n times, or once more."""
    drawn = Counter(stream)
    members: dict[str, list] = {}
    for value, stratum in stratum_of.items():
        members.setdefault(stratum, []).append(value)
    for stratum, own in members.items():
        counts = [drawn[value] for value in own]
        assert max(counts) - min(counts) <= 1, stratum


def stratum_of_values() -> dict[tuple[str, int], str]:
    """Which stratum each sample is in, by going through every stratum once."""
    plan = plan_of("abc", Stage(0, (1, 1, 1)))
    dataset = dataset_of(plan)
    return {
        (plan.datasets[plan.strata[z].dataset].name, int(number)): plan.strata[z].name
        for z in range(plan.n_strata)
        for number in dataset.strata.numbers(z)
    }


@pytest.mark.parametrize("consumed", range(1, N))
def test_a_plan_takes_over_at_any_sample_where_the_first_left_off(consumed):
    plan = take_over(PAST, OTHER, consumed)
    dataset = dataset_of(plan)
    stream = values(dataset)
    assert stream[:consumed] == values(dataset_of(PAST))[:consumed]
    assert_nothing_lost_or_repeated(stream, stratum_of_values())
    weights = [plan.intervals(k + 1)[-1][2].weights for k in range(consumed, N)]
    assert weights == [OTHER.intervals(k + 1)[-1][2].weights for k in range(consumed, N)]


@pytest.mark.parametrize("consumed", range(1, N))
def test_a_dataset_is_added_and_another_left_out_at_any_sample(consumed):
    plan = take_over(PAST, MOVED, consumed)
    assert [dataset.name for dataset in plan.datasets] == ["a", "b", "c"]
    whole, without_a = dataset_of(plan), dataset_of(plan, consumed=consumed, gone="a")
    stream = values(whole)
    assert stream[:consumed] == values(dataset_of(PAST))[:consumed]
    assert values(without_a, consumed) == stream[consumed:]
    assert "a" not in {name for name, _ in stream[consumed:]}
    assert_nothing_lost_or_repeated(stream, stratum_of_values())
    after = Counter(name for name, _ in stream[consumed:])
    target = MOVED.target_D(N) - MOVED.target_D(consumed)
    # What the past owes a dataset that stays is repaid: less than a sample of each of three.
    assert after["c"] == pytest.approx(target[1], abs=2.5)


def test_drawing_from_a_missing_dataset_is_refused():
    plan = take_over(PAST, MOVED, 60)
    with pytest.raises(TokscaleError, match="'a/0' of the plan has no training samples"):
        dataset_of(plan, consumed=59, gone="a")


def test_the_past_stays_when_plans_take_over_again_and_again():
    once = take_over(PAST, MOVED, 40)
    twice = take_over(once, replace(PAST, stages=(Stage(0, (1, 5)),)), 75)
    stream = values(dataset_of(twice))
    assert stream[:75] == values(dataset_of(once))[:75]
    assert_nothing_lost_or_repeated(stream, stratum_of_values())
    steps = [(step.at, step.plan) for step in twice.accepted]
    assert steps[0] == (40, MOVED.fingerprint)
    assert steps[1][0] == 75


def test_datasets_that_join_do_not_change_how_the_others_weights_round():
    """Sums of eight and more numbers are taken in another order than sums of fewer."""
    rng = np.random.default_rng(0)
    added = tuple(DatasetIdentity(f"new{i}", 5, 50) for i in range(9))
    for n in (3, 7, 12):
        old = tuple(DatasetIdentity(f"d{i}", 10, 100) for i in range(n))
        weights = [tuple(rng.random(n).tolist()) for _ in range(2)]
        past = Plan(
            old,
            tuple(Stratum(row.name, d) for d, row in enumerate(old)),
            (Stage(0, weights[0]), Stage(3000, weights[1])),
            seq_length=8,
            seed=1,
        )
        given = Plan(
            added,
            tuple(Stratum(row.name, d) for d, row in enumerate(added)),
            (Stage(0, (1.0,) * 9),),
            seq_length=8,
            seed=1,
        )
        plan = take_over(past, given, 6000)
        for new, known in zip(plan.segments, past.segments, strict=False):
            assert new.weights[:n] == known.weights
        before, after = build_index(past, 6000), build_index(plan, 6000)
        assert np.array_equal(before.stratum_N, after.stratum_N)
        assert np.array_equal(before.draw_N, after.draw_N)


def test_replanning_has_the_datasets_in_the_new_order():
    how = Replanning((3.0, 1.0), (16, 5), train_samples=200, strength=2.0)
    given = replace(MOVED, replanning=how, provenance=PlanProvenance("manual"))
    plan = take_over(PAST, given, 60)
    assert plan.replanning == Replanning(
        (0.0, 3.0, 1.0), (0, 16, 5), train_samples=200, strength=2.0
    )
    assert plan.provenance == PlanProvenance("manual")


def test_strata_keep_their_samples_when_datasets_join_and_leave():
    """MOVED leaves a out and adds c: its strata are b's three and c's two."""
    past = replace(PAST, replanning=Replanning(stratum_samples=(7, 8, 4, 3)))
    given = replace(MOVED, replanning=Replanning(stratum_samples=(8, 4, 3, 2, 1)))
    assert take_over(past, given, 60).replanning.stratum_samples == (7, 8, 4, 3, 2, 1)
    assert take_over(PAST, given, 60).replanning.stratum_samples == ()


def recut(shares) -> Plan:
    strata = tuple(Stratum(f"b/{i}", 0, share) for i, share in enumerate(shares))
    return plan_of("b", Stage(0, (1,)), strata=strata)


CANNOT_BE_ACCEPTED = {
    "of another length": (replace(OTHER, seq_length=16), "sequence length 16"),
    "cut otherwise": (recut((0.25, 0.5, 0.25)), "the plan cuts b into other strata"),
    "of other scores": (plan_of("b", Stage(0, (1,)), cuts=(Cut("new"),)), "the plan cuts b into"),
    "with twins": (
        plan_of(
            "aa", Stage(0, (1, 1)), strata=(Stratum("a/0", 0), Stratum("a/1", 1)), cuts=(None, None)
        ),
        "twins",
    ),
    "of new data under an old name": (
        plan_of("a", Stage(0, (1,)), datasets=(DatasetIdentity("a", 9, 130),)),
        "other data under a name in the run's past, a/0",
    ),
}


@pytest.mark.parametrize("what", CANNOT_BE_ACCEPTED)
def test_a_plan_with_other_strata_or_data_cannot_take_over(what):
    given, message = CANNOT_BE_ACCEPTED[what]
    with pytest.raises(TokscaleError, match=message):
        take_over(PAST, given, 60)


# Decisions


def test_a_decision_holds_from_its_start_on_also_over_later_stages():
    plan = with_decisions(PAST, [Decision(3, 30, (9, 1)), Decision(8, 90, (1, 9))])
    weights = [plan.intervals(k + 1)[-1][2].weights for k in (0, 29, 30, 50, 89, 90, 5000)]
    first, second, third = (0.4, 0.6), (0.9, 0.1), (0.1, 0.9)
    assert weights == [first, first, second, second, second, third, third]
    within = [plan.intervals(k + 1)[-1][2].within for k in (29, 30, 49, 50, 90)]
    assert within[:3] == [PAST.segments[0].within] * 3
    assert within[3:] == [PAST.segments[1].within] * 2
    assert plan.decisions[1] == Decision(8, 90, (1, 9))


@pytest.mark.parametrize("start", range(1, N))
def test_a_decision_extends_the_index_in_place_and_leaves_what_is_before(start):
    index = build_index(PAST, N).shared()
    before = index.stratum_N.copy(), index.draw_N.copy()
    plan = with_decisions(PAST, [Decision(0, start, (1, 5))])
    extend_index(plan, index, start)
    anew = build_index(plan, N)
    assert np.array_equal(index.stratum_N, anew.stratum_N)
    assert np.array_equal(index.draw_N, anew.draw_N)
    assert np.array_equal(index.stratum_N[:start], before[0][:start])
    assert np.array_equal(index.draw_N[:start], before[1][:start])
    assert_nothing_lost_or_repeated(values(dataset_of(plan)), stratum_of_values())


# What a job follows that starts or goes on


def test_a_new_job_follows_its_plan_whatever_the_directory_holds(tmp_path):
    save_run_plan(PAST, [Decision(1, 10, (1, 2))], tmp_path)
    assert resume(OTHER, tmp_path, 0, 0, accept=False) == (OTHER, [])


def test_a_job_resumes_under_earlier_decisions_but_not_under_later_ones(tmp_path):
    decisions = [Decision(5, 30, (1, 2)), Decision(10, 60, (2, 1))]
    save_run_plan(PAST, decisions, tmp_path)
    assert resume(PAST, tmp_path, 80, 10, accept=False) == (PAST, decisions)
    assert resume(PAST, tmp_path, 72, 9, accept=False) == (PAST, decisions[:1])
    assert resume(PAST, tmp_path, 32, 4, accept=False) == (PAST, [])
    assert followed_plan(tmp_path) == with_decisions(PAST, decisions)


def test_the_limit_on_epochs_is_that_of_the_jobs_plan(tmp_path):
    save_run_plan(PAST, [], tmp_path)
    limited = replace(PAST, max_epochs=9.0)
    assert resume(limited, tmp_path, 30, 3, accept=False) == (limited, [])


def test_a_plan_with_the_same_past_is_followed_from_there_on(tmp_path):
    save_run_plan(PAST, [], tmp_path)
    longer = replace(PAST, stages=(*PAST.stages, Stage(90, (1, 9))))
    assert resume(longer, tmp_path, 90, 9, accept=False) == (longer, [])
    with pytest.raises(TokscaleError, match="orders them otherwise"):
        resume(longer, tmp_path, 91, 9, accept=False)


def test_a_plan_with_another_past_takes_over_only_if_accepted_and_once(tmp_path):
    decisions = [Decision(5, 30, (1, 2)), Decision(10, 60, (2, 1))]
    save_run_plan(PAST, decisions, tmp_path)
    with pytest.raises(TokscaleError, match=r"orders them otherwise; .* --tokscale-override-plan"):
        resume(OTHER, tmp_path, 72, 9, accept=False)
    plan, left = resume(OTHER, tmp_path, 72, 9, accept=True)
    assert left == []
    past = with_decisions(PAST, decisions[:1])
    assert plan == take_over(past, OTHER, 72)
    assert values(dataset_of(plan))[:72] == values(dataset_of(past))[:72]
    save_run_plan(plan, [], tmp_path)
    for accept in (True, False):
        assert resume(OTHER, tmp_path, 96, 12, accept=accept) == (plan, [])


def test_provenance_does_not_tell_which_plan_took_over(tmp_path):
    save_run_plan(PAST, [], tmp_path)
    plan, _ = resume(OTHER, tmp_path, 72, 9, accept=True)
    other = replace(OTHER, seed=78)
    for given in ("0", other.fingerprint):
        save_run_plan(
            replace(plan, provenance=PlanProvenance(settings={"given": given})), [], tmp_path
        )
        assert resume(OTHER, tmp_path, 96, 12, accept=False)[0].stages == plan.stages
        with pytest.raises(TokscaleError, match="orders them otherwise"):
            resume(other, tmp_path, 96, 12, accept=False)


def test_a_plan_with_other_limits_on_decisions_is_another_plan(tmp_path):
    save_run_plan(PAST, [], tmp_path)
    tight = replace(PAST, replanning=Replanning(max_change=1.1))
    assert resume(tight, tmp_path, 30, 3, accept=False) == (tight, [])


def test_without_a_known_past_a_plan_is_refused(tmp_path):
    with pytest.raises(TokscaleError, match="no plan is known for the 40 samples"):
        resume(PAST, tmp_path, 40, 5, accept=False)
    assert resume(PAST, tmp_path, 40, 5, accept=True) == (PAST, [])


# On disk


def test_a_plan_that_was_left_in_between_is_resumed_only_if_accepted(tmp_path):
    """From sample 40 to 60 the job ran without it; from 60 on it follows it again."""
    save_run_plan(PAST, [], tmp_path)
    planned = DataRecord((), PlanRecord("cache", PAST.fingerprint, N, ()))
    planned.save(record_path(tmp_path))
    DataRecord((), BlendRecord(None, None, N), start=40).save(record_path(tmp_path))
    with pytest.raises(TokscaleError, match="samples 40 to 59 were drawn without the plan"):
        resume(PAST, tmp_path, 60, 15, accept=False)
    assert resume(PAST, tmp_path, 40, 10, accept=False) == (PAST, [])
    assert resume(PAST, tmp_path, 60, 15, accept=True) == (PAST, [])
    replace(planned, start=60).save(record_path(tmp_path))
    assert resume(PAST, tmp_path, 80, 20, accept=False) == (PAST, [])


def test_a_run_killed_while_writing_keeps_its_plan_and_decisions(tmp_path):
    """The decisions are written first; then the plan."""
    decisions = [Decision(5, 30, (1, 2))]
    save_run_plan(PAST, decisions, tmp_path)
    save_decisions(OTHER, [], tmp_path)
    assert load_run_plan(tmp_path) == (PAST, decisions)
    OTHER.save(tmp_path / "tokscale/plan.json")
    assert load_run_plan(tmp_path) == (OTHER, [])
    save_run_plan(OTHER, decisions, tmp_path)
    content = json.loads((tmp_path / "tokscale/replans.json").read_text())
    assert list(content["decisions"]) == [OTHER.fingerprint]


def test_decisions_are_read_back_to_the_bit(tmp_path):
    decisions = [Decision(5, 30, (1 / 3, 2 / 3)), Decision(9, 60, (0.1 + 0.2, 0.7))]
    save_run_plan(PAST, decisions, tmp_path)
    assert load_run_plan(tmp_path) == (PAST, decisions)


def spoil(change):
    def apply(path):
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))

    return apply


SPOILED = {
    "of another plan": (spoil(lambda c: c.update(decisions={"0": []})), "not of the plan beside"),
    "of another kind": (spoil(lambda c: c.update(kind="x")), "not of the plan beside"),
    "newer": (spoil(lambda c: c.update(schema_version=9)), "schema version 9"),
    "malformed": (spoil(lambda c: c.update(decisions={PAST.fingerprint: [{}]})), "is damaged"),
    "torn": (lambda path: path.write_text("{"), "is not JSON"),
}


@pytest.mark.parametrize("what", SPOILED)
def test_spoiled_decisions_are_refused(tmp_path, what):
    save_run_plan(PAST, [Decision(5, 30, (1, 2))], tmp_path)
    change, message = SPOILED[what]
    change(tmp_path / "tokscale/replans.json")
    with pytest.raises(TokscaleError, match=message):
        load_run_plan(tmp_path)


@pytest.mark.parametrize(
    ("section", "value"),
    [
        ("replanning", {"strength": 9.0}),
        ("replanning", {"base_weights": [1.0, 9.0]}),
        ("replanning", {"train_samples": 7}),
        ("accepted", [{"at": 3, "after": "0", "plan": "1"}]),
        ("decisions", [{"step": 3, "start": 900, "weights": [1.0, 1.0]}]),
    ],
)
def test_settings_that_decide_weights_cannot_be_edited_in_a_run(tmp_path, section, value):
    """Not even by someone who removes the checksum: another plan has other decisions."""
    save_run_plan(PAST, [], tmp_path)
    path = tmp_path / "tokscale/plan.json"
    content = json.loads(path.read_text())
    content[section] = {**content[section], **value} if section == "replanning" else value
    path.write_text(json.dumps(content))
    with pytest.raises(TokscaleError, match="is damaged or was edited"):
        load_run_plan(tmp_path)
    del content["checksum"]
    path.write_text(json.dumps(content))
    with pytest.raises(TokscaleError, match=r"is not of the plan beside it; .*; restore either"):
        load_run_plan(tmp_path)


def test_a_run_without_decisions_follows_its_plan(tmp_path):
    PAST.save(tmp_path / "tokscale/plan.json")
    assert followed_plan(tmp_path) == PAST
