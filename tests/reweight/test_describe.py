from dataclasses import replace

import numpy as np
import pytest
from scored import RANGE, SEQ_LENGTH, cut, identity

from megatron_tokscale.data import (
    Acceptance,
    DatasetIdentity,
    Decision,
    Plan,
    PlanProvenance,
    Stage,
    Stratum,
    with_decisions,
)
from megatron_tokscale.reweight import Frontier, Job, Manual, Uniform, describe_plan, make_plan
from megatron_tokscale.reweight.time_map import SameTokens

WEB = DatasetIdentity("web", 1000, 640_000)
CODE = DatasetIdentity("code", 500, 320_000)
JOB = Job(
    (WEB, CODE), (2, 1), train_samples=12_000, seq_length=64, seed=3, epoch_samples=(10_000, 5_000)
)


def rows_of(text: str, name: str) -> list[str]:
    """The two lines of a name: in the table and in the picture."""
    return [line for line in text.splitlines() if line.split(" ")[0] == name]


def picture_of(text: str, name: str) -> str:
    return rows_of(text, name)[1].split("|")[1]


def many_strata(n_datasets: int, n_quantiles: int) -> Plan:
    times = np.random.default_rng(0).normal(11, 1, 200)
    datasets = [cut(f"d{d}", times, lengths=[500] * 200) for d in range(n_datasets)]
    job = Job(
        [identity(dataset) for dataset in datasets],
        [1.0] * n_datasets,
        *(8000, SEQ_LENGTH, 3),
        [dataset.n_samples for dataset in datasets],
    )
    assert len(datasets[0].names) == n_quantiles
    return make_plan(job, Frontier(datasets, SameTokens(RANGE[1]), SEQ_LENGTH))


def test_a_plan_is_shown_with_weights_samples_and_epochs():
    manual = Manual({0: [3, 1], 6000: [1, 3]})
    text = describe_plan(make_plan(JOB, manual, None, PlanProvenance("manual")))
    lines = text.splitlines()
    assert "policy manual; 12,000 samples of 64 tokens" in lines[0]
    assert lines[1] == "2 strata of 2 datasets, 2 stages"
    assert lines[3].split() == ["from", "sample", "0", "6,000"]
    assert lines[4].split() == ["web", "75.00%", "25.00%"]
    assert lines[5].split() == ["code", "25.00%", "75.00%"]
    assert rows_of(text, "web")[1].split("|")[0].split() == ["web", "66.67%"]
    assert rows_of(text, "web")[1].split("|")[2].split() == ["6,000", "0.60"]
    assert rows_of(text, "code")[1].split("|")[2].split() == ["6,000", "1.20"]


@pytest.mark.parametrize(
    ("weight", "shade"),
    [(0.19, " "), (0.21, "░"), (0.39, "░"), (0.41, "▒"), (0.62, "▒"), (0.63, "▓"), (0.99, "▓")],
)
def test_shades_tell_the_weight_relative_to_the_base_share(weight, shade):
    """Of base weights one half each."""
    job = replace(JOB, base_weights=(1, 1))
    text = describe_plan(make_plan(job, Manual({0: [weight, 1 - weight]})))
    assert set(picture_of(text, "web")) == {shade}
    assert "'▓' from 1.25" in text


def test_the_darkest_shade_is_for_much_more_than_the_base_share():
    text = describe_plan(make_plan(replace(JOB, base_weights=(1, 9)), Manual({0: [1, 3]})))
    assert set(picture_of(text, "web")) == {"█"}


def test_time_in_the_picture_is_logarithmic():
    """From 240 to 12,000."""
    text = describe_plan(make_plan(JOB, Manual({0: [2, 1], 1000: [1, 9]})))
    picture = picture_of(text, "web")
    assert len(picture) == 48
    assert picture.index(" ") == pytest.approx(48 * np.log(1000 / 240) / np.log(50), abs=1)
    assert "240" in text.splitlines()[-2].split()
    assert text.splitlines()[-2].endswith("12,000 samples")


def test_a_long_plan_is_shown_at_seven_stages():
    manual = Manual({0: [1, 0], 10_000: [0, 1]}, "linear", n_stages=40)
    header = describe_plan(make_plan(JOB, manual)).splitlines()[3].split()
    assert len(header) == 2 + 7
    assert header[2] == "0"
    assert header[8] == "10,000"


def test_every_stratum_has_a_line_while_they_are_at_most_forty():
    text = describe_plan(many_strata(10, 4))
    assert len(text.splitlines()) == 3 + 41 + 1 + 41 + 2
    assert "a line is a dataset" not in text
    assert rows_of(text, "d3/q2")


def test_more_strata_than_that_are_shown_by_dataset():
    plan = many_strata(11, 4)
    text = describe_plan(plan)
    assert "a line is a dataset" in text
    assert not rows_of(text, "d3/q2")
    draws = plan.target_Z(8000)[12:16].sum()
    assert rows_of(text, "d3")[1].split("|")[2].split()[0] == f"{draws:,.0f}"
    assert set(picture_of(text, "d3")) == {"▒"}


def test_nothing_is_wider_than_a_hundred():
    job = replace(
        JOB,
        datasets=(replace(WEB, name="a" * 60), CODE),
        train_samples=3 * 10**9,
        epoch_samples=(10**10, 10**10),
    )
    manual = Manual({0: [1, 0], 2 * 10**9: [0, 1]}, "linear", n_stages=40)
    text = describe_plan(make_plan(job, manual))
    assert max(map(len, text.splitlines())) <= 100
    assert "…aaa" in text
    assert max(map(len, describe_plan(many_strata(10, 4)).splitlines())) <= 100


def test_stages_decided_while_a_job_trained_are_marked():
    plan = with_decisions(make_plan(JOB, Uniform()), [Decision(100, 800, (1, 1))])
    text = describe_plan(plan)
    assert "2 stages, 1 decided while the job trained (*)" in text
    assert "800*" in text.splitlines()[3]
    stars = text.splitlines()[-3]
    picture = rows_of(text, "web")[1]
    column = stars.index("*") - picture.index("|") - 1
    assert stars.strip() == "*"
    assert column == int(48 * np.log(800 / 240) / np.log(50))  # from 240 to 12,000


def test_a_plan_accepted_in_place_of_another_says_so():
    plan = replace(make_plan(JOB, Uniform()), accepted=(Acceptance(5000, "0", "1"),))
    assert "in place of another plan at sample 5,000" in describe_plan(plan)


def test_a_plan_from_elsewhere_is_shown_too():
    plan = Plan((WEB, CODE), (Stratum("web", 0), Stratum("code", 1)), (Stage(0, (0, 1)),), 64, 3)
    text = describe_plan(plan)
    assert "policy unknown; samples of 64 tokens" in text
    assert "epochs" not in text
    assert "epochs" not in describe_plan(plan, 500)
    assert rows_of(describe_plan(plan, 500), "code")[1].endswith(" 500")


def test_a_control_is_named():
    plan = make_plan(JOB, Uniform(), None, PlanProvenance("frontier", "frequency"))
    assert "policy frontier, control frequency;" in describe_plan(plan)
