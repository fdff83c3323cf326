import json
from dataclasses import replace

import numpy as np
import pytest

from megatron_tokscale.data import DatasetIdentity, Plan, Stage, Stratum, match_datasets
from megatron_tokscale.errors import TokscaleError

WEB = DatasetIdentity("web", 120, 5000)
CODE = DatasetIdentity("code", 30, 900)


def two_stages(**changes) -> Plan:
    plan = Plan(
        datasets=(WEB, CODE),
        strata=(Stratum("web", 0), Stratum("code", 1)),
        stages=(Stage(0, (3, 1)), Stage(100, (1, 1))),
        seq_length=64,
        seed=7,
        provenance={"policy": "manual"},
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


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 8},
        {"seq_length": 65},
        {"stages": (Stage(0, (3, 1)), Stage(101, (1, 1)))},
        {"stages": (Stage(0, (3, 1)), Stage(100, (1, 1.01)))},
        {"strata": (Stratum("web", 0), Stratum("other", 1))},
        {"datasets": (WEB, replace(CODE, n_tokens=901))},
    ],
)
def test_whatever_decides_the_order_is_in_the_fingerprint(change):
    assert two_stages(**change).fingerprint != two_stages().fingerprint


def test_where_a_plan_came_from_is_not_in_the_fingerprint():
    assert two_stages(provenance={}).fingerprint == two_stages().fingerprint


def test_plans_that_part_later_share_the_fingerprint_until_then():
    longer = two_stages(stages=(*two_stages().stages, Stage(200, (0, 1))))
    assert longer.fingerprint_until(200) == two_stages().fingerprint_until(200)
    assert longer.fingerprint_until(201) != two_stages().fingerprint_until(201)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"stages": ()}, "must start at sample 0"),
        ({"stages": (Stage(1, (1, 1)),)}, "must start at sample 0"),
        ({"stages": (Stage(0, (1, 1)), Stage(0, (1, 2)))}, "starts must ascend"),
        ({"stages": (Stage(0, (1, 1)), Stage(9, (1, 2)), Stage(5, (1, 1)))}, "at 9; starts must"),
        ({"stages": (Stage(0, (1,)),)}, "1 weights for 2 strata"),
        ({"stages": (Stage(0, (1, -1)),)}, "negative or not finite"),
        ({"stages": (Stage(0, (1, float("nan"))),)}, "negative or not finite"),
        ({"stages": (Stage(0, (1, float("inf"))),)}, "negative or not finite"),
        ({"stages": (Stage(0, (0, 0)),)}, "sum to nothing"),
        ({"strata": ()}, "no strata"),
        ({"strata": (Stratum("a", 0), Stratum("a", 1))}, "2 strata of the plan are named 'a'"),
        ({"strata": (Stratum("a", 0), Stratum("b", 2))}, "is of dataset 2"),
        ({"seq_length": 0}, "not positive"),
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
        (lambda content: content.pop("stages"), "malformed"),
        (lambda content: content.update(seed="x"), "malformed"),
        (lambda content: content.update(seq_length=64.5), "malformed"),
        (lambda content: content.update(stages=[3]), "malformed"),
        (lambda content: content["stages"][0].update(start=True), "malformed"),
        (lambda content: content["stages"][1].update(weights=["a", "b"]), "malformed"),
        (lambda content: content["stages"][1].update(weights=[0, 0]), "sum to nothing"),
        (lambda content: content["datasets"][0].pop("name"), "malformed"),
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
        ([WEB, CODE, DatasetIdentity("more", 1, 1)], 64, "it does not know more"),
        ([WEB, WEB], 64, "it has code"),
    ],
)
def test_a_plan_for_other_data_is_refused(found, seq_length, sentence):
    with pytest.raises(TokscaleError, match=sentence):
        match_datasets(two_stages(), found, seq_length)
