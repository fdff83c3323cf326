import json
from dataclasses import replace

import numpy as np
import pytest

from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.data import (
    Acceptance,
    Cut,
    DatasetIdentity,
    Decision,
    Plan,
    PlanProvenance,
    PlanSources,
    Replanning,
    Stage,
    Stratum,
    match_datasets,
)

WEB = DatasetIdentity("web", 120, 5000)
CODE = DatasetIdentity("code", 30, 900)
SHUFFLED = {"scores": "f", "order": "learning-time", "unlearned": False, "shuffle_seed": 3}


def two_stages(**changes) -> Plan:
    plan = Plan(
        datasets=(WEB, CODE),
        strata=(Stratum("web", 0), Stratum("code", 1)),
        stages=(Stage(0, (3, 1)), Stage(100, (1, 1))),
        seq_length=64,
        seed=7,
        provenance=PlanProvenance("manual"),
    )
    return replace(plan, **changes)


def test_a_plan_read_back_is_the_plan_written(tmp_path):
    plan = two_stages(stages=(Stage(0, (0.1, 0.2)), Stage(9, (1 / 3, 0.0))))
    plan.save(tmp_path / "plan.json")
    read = Plan.load(tmp_path / "plan.json")
    assert read == plan
    assert read.fingerprint == plan.fingerprint


def test_weights_are_normalised_and_targets_add_up_over_stages():
    plan = two_stages()
    assert plan.segments[0].weights == (0.75, 0.25)
    np.testing.assert_allclose(plan.target_Z(60), [45, 15])
    np.testing.assert_allclose(plan.target_Z(150), [75 + 25, 25 + 25])


def test_a_stage_that_changes_nothing_changes_nothing():
    once = two_stages(stages=(Stage(0, (3, 1)),))
    thrice = two_stages(stages=(Stage(0, (3, 1)), Stage(5, (0.75, 0.25)), Stage(9, (6, 2))))
    assert thrice.segments == once.segments
    assert thrice.fingerprint == once.fingerprint


def with_strata(**changes) -> Plan:
    """Web in three strata, the last of what is never learned; code in one."""
    plan = Plan(
        datasets=(WEB, CODE),
        strata=(
            Stratum("web/q1", 0, 0.45),
            Stratum("web/q2", 0, 0.45),
            Stratum("web/unlearned", 0, 0.1),
            Stratum("code", 1),
        ),
        stages=(Stage(0, (3, 1)), Stage(100, (3, 1), (1, 2, 1, 1))),
        seq_length=64,
        seed=7,
        cuts=(Cut("0123456789abcdef", unlearned=True), None),
        max_epochs=4.0,
    )
    return replace(plan, **changes)


def test_a_plan_with_strata_read_back_is_the_plan_written(tmp_path):
    sources = PlanSources("run", "reference", None, {"web": "f"})
    settings = {"window": 4.0, "first": None, "points": {"0": [1, 2.5]}, "moves": True}
    for plan in (
        with_strata(),
        with_strata(provenance=PlanProvenance("p", "frequency", sources, settings, "0.1")),
        with_strata(cuts=(Cut("f", "frequency", True), None), max_epochs=None),
        with_strata(
            replanning=Replanning((3, 1), (90, 20), 400, strength=2, floor=0.5, max_change=3),
            decisions=(Decision(8, 50, (1, 1)),),
            accepted=(Acceptance(30, "0", "1"),),
        ),
    ):
        plan.save(tmp_path / "plan.json")
        read = Plan.load(tmp_path / "plan.json")
        assert read == plan
        assert read.fingerprint == plan.fingerprint


def test_a_stage_without_weights_within_draws_every_sample_alike():
    plan = with_strata()
    first, second = plan.segments
    np.testing.assert_allclose(plan.weight_Z(first), [0.75 * 0.45, 0.75 * 0.45, 0.075, 0.25])
    np.testing.assert_allclose(plan.weight_Z(second), [0.75 / 4, 0.75 / 2, 0.75 / 4, 0.25])
    np.testing.assert_allclose(
        plan.target_Z(140),
        100 * np.array([0.3375, 0.3375, 0.075, 0.25])
        + 40 * np.array([0.1875, 0.375, 0.1875, 0.25]),
    )
    np.testing.assert_allclose(plan.target_D(140), [105, 35])


def test_weights_within_a_dataset_need_not_sum_to_one_and_may_be_zero_where_nothing_is_drawn():
    doubled = with_strata(stages=(Stage(0, (3, 1), (2, 4, 2, 9)),))
    assert doubled.segments[0].within == (0.25, 0.5, 0.25, 1.0)
    unused = with_strata(stages=(Stage(0, (0, 1), (0, 0, 0, 1)),))
    np.testing.assert_allclose(unused.segments[0].within, (0.45, 0.45, 0.1, 1))


def test_sizes_of_strata_are_rounded():
    assert with_strata().sizes_Z([101, 7]).tolist() == [45, 46, 10, 7]
    assert with_strata().sizes_Z([3, 7]).tolist() == [1, 2, 0, 7]
    assert with_strata().strata_of(0) == range(3)
    assert with_strata().strata_of(1) == range(3, 4)


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 8},
        {"seq_length": 65},
        {"stages": (Stage(0, (3, 1)), Stage(101, (1, 1)))},
        {"stages": (Stage(0, (3, 1)), Stage(100, (1, 1.01)))},
        {"strata": (Stratum("web", 0), Stratum("other", 1))},
        {"datasets": (WEB, replace(CODE, n_tokens=901))},
        {"replanning": Replanning(base_weights=(3, 1))},
        {"replanning": Replanning(epoch_samples=(300, 50))},
        {"replanning": Replanning(train_samples=200)},
        {"replanning": Replanning(strength=2)},
        {"replanning": Replanning(floor=0.5)},
        {"replanning": Replanning(max_change=2)},
        {"decisions": (Decision(8, 50, (3, 1)),)},
        {"accepted": (Acceptance(50, "0", "1"),)},
    ],
)
def test_the_fingerprint_changes_with_everything_that_orders_samples(change):
    assert two_stages(**change).fingerprint != two_stages().fingerprint


@pytest.mark.parametrize(
    "change",
    [
        {"cuts": (Cut("other", unlearned=True), None)},
        {"cuts": (Cut("0123456789abcdef", "frequency", True), None)},
        {"cuts": (Cut("0123456789abcdef", unlearned=False), None)},
        {"stages": (Stage(0, (3, 1)), Stage(100, (3, 1), (1, 3, 1, 1)))},
        {
            "strata": (
                Stratum("web/q1", 0, 0.5),
                Stratum("web/q2", 0, 0.4),
                *with_strata().strata[2:],
            )
        },
    ],
)
def test_the_fingerprint_changes_with_everything_that_fills_a_stratum(change):
    assert with_strata(**change).fingerprint != with_strata().fingerprint


def test_a_limit_on_epochs_is_not_in_the_fingerprint():
    assert with_strata(max_epochs=9.0).fingerprint == with_strata().fingerprint


def test_provenance_is_not_in_the_fingerprint():
    assert two_stages(provenance=PlanProvenance()).fingerprint == two_stages().fingerprint


def test_plans_that_differ_later_share_the_fingerprint_until_then():
    longer = two_stages(
        stages=(*two_stages().stages, Stage(200, (0, 1))), replanning=Replanning(strength=2)
    )
    assert longer.fingerprint_until(200) == two_stages().fingerprint_until(200)
    assert longer.fingerprint_until(201) != two_stages().fingerprint_until(201)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"stages": ()}, "expected a stage that starts at sample 0"),
        ({"stages": (Stage(1, (1, 1)),)}, "starts at sample 1; expected .* starts at sample 0"),
        ({"stages": (Stage(0, (1, 1)), Stage(0, (1, 2)))}, "expected ascending starts"),
        (
            {"stages": (Stage(0, (1, 1)), Stage(9, (1, 2)), Stage(5, (1, 1)))},
            "at 9; expected asc",
        ),
        ({"stages": (Stage(0, (1,)),)}, "1 weights for 2 datasets"),
        ({"stages": (Stage(0, (1, -1)),)}, "negative or not finite"),
        ({"stages": (Stage(0, (1, float("nan"))),)}, "negative or not finite"),
        ({"stages": (Stage(0, (1, float("inf"))),)}, "negative or not finite"),
        ({"stages": (Stage(0, (0, 0)),)}, "sum to 0; expected a finite sum above 0"),
        ({"strata": ()}, "has 0 strata; expected 1 to 32766"),
        ({"strata": (Stratum("a", 0), Stratum("a", 1))}, "2 strata of the plan are named 'a'"),
        ({"strata": (Stratum("a", 0), Stratum("b", 2))}, "is of dataset 2"),
        ({"seq_length": 0}, "sequence length is 0; expected 1 token or more"),
        ({"strata": (Stratum("a", 0, 0.5), Stratum("b", 1))}, "sum to .*; expected 1 for each"),
        (
            {"strata": (Stratum("a", 0, 1.5), Stratum("b", 1))},
            "of stratum 'a' of the plan is 1.5; exp",
        ),
        ({"strata": (Stratum("a", 0), Stratum("b", 0))}, "dataset by dataset"),
        ({"strata": (Stratum("a", 1), Stratum("b", 0))}, "dataset by dataset"),
        (
            {"strata": (Stratum("a", 0, 0.5), Stratum("b", 0, 0.5), Stratum("c", 1))},
            "no cut for web; expected one that divides it into 2",
        ),
        ({"cuts": (None,)}, "has 1 cuts; expected 2"),
        ({"cuts": (Cut("f", "length"), None)}, "ranks web by 'length'"),
        ({"stages": (Stage(0, (1, 1), (1,)),)}, "1 weights for 2 strata"),
        ({"stages": (Stage(0, (1, 1), (0, 1)),)}, "within web sum to 0; expected one above 0"),
        ({"stages": (Stage(0, (1, 1), (-1, 1)),)}, "negative or not finite"),
        ({"max_epochs": 0.0}, "limit on epochs is 0.0; expected a number above 0"),
        ({"replanning": Replanning((1, 2, 3))}, "has 3 base weights; expected 2"),
        ({"replanning": Replanning((1, -1))}, r"base weights .* are \[1.0, -1.0\]; expected 0 or"),
        ({"replanning": Replanning((1, float("inf")))}, "expected 0 or more, finite"),
        ({"replanning": Replanning(epoch_samples=(0, 0))}, "and not all 0"),
        ({"replanning": Replanning(train_samples=0)}, "is for 0 samples; expected 1 or more"),
        ({"replanning": Replanning(strength=-1)}, "has strength -1"),
        ({"replanning": Replanning(floor=0)}, "floor 0 and"),
        ({"replanning": Replanning(max_change=1)}, "change 1;"),
    ],
)
def test_a_plan_that_does_not_fit_together_is_refused(change, sentence):
    with pytest.raises(TokscaleError, match=sentence) as caught:
        two_stages(**change)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("edit", "sentence"),
    [
        (lambda content: content.update(kind="other"), "is not a plan"),
        (lambda content: content.pop("kind"), "is not a plan"),
        (lambda content: content.update(schema_version=99), "schema version 99"),
        (lambda content: content.update(schema_version=1), "older version, 1; .*; build it again"),
        (lambda content: content.update(schema_version=3), "older version, 3; .*; build it again"),
        (lambda content: content.pop("schema_version"), "schema version None; expected a whole"),
        (
            lambda content: content.update(cuts=[SHUFFLED, None]),
            "damaged: cuts.0..shuffle_seed is unkn",
        ),
        (lambda content: content.pop("replanning"), "damaged or was edited"),
        (lambda content: content.pop("accepted"), "damaged or was edited"),
        (lambda content: content["replanning"].pop("strength"), "damaged or was edited"),
        (
            lambda content: content["replanning"].update(base_weights="heavy"),
            "damaged: replanning.ba",
        ),
        (lambda content: content["replanning"].update(base_weights=[0, 0]), "not all 0"),
        (
            lambda content: content["replanning"].update(epoch_samples=[1, "2"]),
            "samples.1. is '2'",
        ),
        (lambda content: content["replanning"].update(epoch_samples=[1, 2, 3]), "expected 2"),
        (lambda content: content["replanning"].update(epoch_samples=None), "epoch_samples is None"),
        (lambda content: content["replanning"].update(train_samples="x"), "train_samples is 'x'"),
        (
            lambda content: content["replanning"].update(floor=[1]),
            r"floor is \[1\]; expected a n",
        ),
        (lambda content: content["replanning"].update(floor=0.5), "damaged or was edited"),
        (lambda content: content.update(accepted=7), "accepted is 7; expected a list"),
        (lambda content: content.update(accepted=[{"at": "x"}]), r"accepted\[0\].after is missing"),
        (lambda content: content.update(decisions=[{"step": 1}]), "is missing"),
        (lambda content: content.pop("cuts"), "damaged or was edited"),
        (lambda content: content.update(cuts=[{"order": "frequency"}, None]), "scores is missing"),
        (lambda content: content.update(max_epochs="x"), "max_epochs is 'x'"),
        (lambda content: content["stages"][0].update(within=3), "within is 3"),
        (lambda content: content["strata"][0].pop("share"), "damaged or was edited"),
        (lambda content: content.pop("stages"), "damaged: stages is missing"),
        (lambda content: content.update(seed="x"), "seed is 'x'; expected a whole number"),
        (lambda content: content.update(seq_length=64.5), "seq_length is 64.5; expected a"),
        (lambda content: content.update(stages=[3]), r"stages\[0\] is 3; expected an object"),
        (lambda content: content["stages"][0].update(start=True), "start is True"),
        (lambda content: content["stages"][1].update(weights=["a", "b"]), "weights.0. is 'a'"),
        (lambda content: content["stages"][1].update(weights=[None, 1]), "not finite"),
        (lambda content: content["cuts"].__setitem__(0, {"scores": "f", "order": "x"}), "order is"),
        (lambda content: content.update(provenance={"policy": 3}), "provenance.policy is 3"),
        (lambda content: content.update(provenance=7), "provenance is 7; expected an object"),
        (lambda content: content["stages"][1].update(weights=[0, 0]), "sum to 0; expected"),
        (lambda content: content["datasets"][0].pop("name"), "name is missing"),
    ],
)
def test_a_damaged_plan_file_is_refused_in_one_line_that_names_it(tmp_path, edit, sentence):
    path = tmp_path / "plan.json"
    two_stages().save(path)
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))
    with pytest.raises(TokscaleError, match=sentence) as caught:
        Plan.load(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_plan_file_is_refused(tmp_path):
    with pytest.raises(TokscaleError, match="cannot read"):
        Plan.load(tmp_path / "none.json")


def test_datasets_are_found_in_whatever_order_the_job_has_them():
    assert match_datasets(two_stages(), [CODE, WEB], 64) == [1, 0]


def test_twin_datasets_are_taken_in_order():
    plan = two_stages(datasets=(WEB, WEB))
    assert match_datasets(plan, [WEB, WEB], 64) == [0, 1]


@pytest.mark.parametrize(
    ("found", "seq_length", "sentence"),
    [
        ([WEB, CODE], 128, "sequence length 64, the job's is 128"),
        ([WEB], 64, "it has code .* the job has no other dataset"),
        ([WEB, replace(CODE, n_tokens=901)], 64, r"900 tokens\), the job has code .* 901 tokens"),
        ([WEB, CODE, DatasetIdentity("more", 1, 1)], 64, "it lacks more"),
        ([WEB, WEB], 64, "it has code"),
    ],
)
def test_a_plan_for_other_data_is_refused(found, seq_length, sentence):
    with pytest.raises(TokscaleError, match=sentence):
        match_datasets(two_stages(), found, seq_length)
