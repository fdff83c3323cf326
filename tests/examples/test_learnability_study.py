"""The study of data plans: its statistics, tables, steps and text. Nothing is trained here.

Shapes: K probes, D datasets, S seeds.
"""

import importlib
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.stats

from megatron_tokscale.cli.entry import make_parser
from megatron_tokscale.core.errors import TokscaleError

EXAMPLE = Path(__file__).parents[2] / "examples" / "learnability_study"
STEP_K = np.arange(0, 1001, 20)
MODULES = ("corpora", "arms", "speed", "tables", "study")


@pytest.fixture(scope="module")
def example():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLE))
        yield {name: importlib.import_module(name) for name in MODULES}
        for name in MODULES:
            sys.modules.pop(name)


@pytest.fixture
def speed(example):
    return example["speed"]


@pytest.fixture
def arms(example):
    return example["arms"]


@pytest.fixture
def study(arms, tmp_path):
    return arms.Study.open(tmp_path / "study", arms.Settings())


# Statistics


@pytest.mark.parametrize("target", [1.9, 1.4567, 1.25])
def test_a_target_on_a_straight_curve_is_reached_where_the_line_is(speed, target):
    loss_K = 2 - STEP_K / 1000
    assert speed.steps_to_reach(STEP_K, loss_K, target) == pytest.approx(1000 * (2 - target))


def test_between_probes_the_curve_is_a_chord(speed):
    step_K = np.array([0, 100, 300])
    loss_K = np.array([4.0, 3.0, 2.0])
    assert speed.steps_to_reach(step_K, loss_K, 2.25) == pytest.approx(250)
    assert speed.steps_to_reach(step_K, loss_K, 3.0) == 100
    assert speed.steps_to_reach(step_K, loss_K, 5.0) == 0


def test_a_target_below_the_curve_is_never_reached(speed):
    assert math.isnan(speed.steps_to_reach(STEP_K, 2 - STEP_K / 1000, 0.99))


def test_the_first_arrival_counts(speed):
    loss_K = np.array([3.0, 1.0, 3.0, 1.0])
    assert speed.steps_to_reach(np.array([0, 10, 20, 30]), loss_K, 2.0) == 5


def test_the_running_median_takes_out_a_spike_and_keeps_a_line(speed):
    loss_K = 2 - STEP_K / 1000
    spiked_K = loss_K.copy()
    spiked_K[7] -= 1
    assert np.allclose(speed.smooth(loss_K), loss_K)
    by_hand = [sorted(spiked_K[k - 1 : k + 2])[1] for k in range(1, len(loss_K) - 1)]
    assert np.array_equal(speed.smooth(spiked_K), [spiked_K[0], *by_hand, spiked_K[-1]])
    assert speed.steps_to_reach(STEP_K, speed.smooth(spiked_K), 1.5) == pytest.approx(500)


def test_half_the_steps_are_50_percent_faster(speed):
    assert speed.faster(400, 800) == 50
    assert speed.faster(1000, 800) == -25


def test_the_interval_is_scipys_for_students_t_with_two_degrees_of_freedom(speed):
    values_S = [3.0, 7.0, 4.0]
    mean, half = speed.interval(values_S)
    by_scipy = scipy.stats.ttest_1samp(values_S, 0).confidence_interval(0.95)
    assert (mean - half, mean + half) == pytest.approx((by_scipy.low, by_scipy.high))
    # 95% quantile as in printed tables of t: 4.303
    assert half == pytest.approx(4.303 * math.sqrt(13 / 3) / math.sqrt(3), rel=1e-3)
    assert speed.describe(values_S) == f"4.7 [{by_scipy.low:.1f}, {by_scipy.high:.1f}]"


def test_one_seed_has_no_interval(speed):
    assert math.isnan(speed.interval([3.0])[1])
    assert speed.describe([3.0]) == "3.0"
    assert speed.describe([]) == "-"


def test_runs_that_never_arrive_make_a_bound(speed):
    assert speed.describe_censored([5.0, math.nan, 15.0], -25) == "at most -1.7"
    some, none = [10.0, math.nan], [10.0, 20.0]
    assert speed.describe_difference(none, some, -25) == "at least 22.5"
    assert speed.describe_difference(some, none, -25) == "at most -22.5"
    assert speed.describe_difference(some, some, -25) == "-"


def test_differences_are_paired_by_seed(speed):
    method_S, control_S = [10.0, 30.0, 50.0], [9.0, 28.0, 47.0]
    paired = scipy.stats.ttest_rel(method_S, control_S).confidence_interval(0.95)
    expected = f"2.0 [{paired.low:.1f}, {paired.high:.1f}]"
    assert speed.describe_difference(method_S, control_S, -25) == expected


# Tables


@pytest.fixture
def found(example, arms, speed):
    """Baselines fall by 1 nat in 1000 steps, the method in 500 and one control never."""

    def curve(slope: float, seed: int):
        loss_K = np.maximum(5 + 0.1 * seed - slope * STEP_K, 1)
        return speed.Curve(STEP_K, np.stack([loss_K] * len(example["corpora"].WEIGHTS)))

    slopes = {"baseline": 1e-3, "frontier": 2e-3, "uniform": 1e-4}
    curves = {(arm, seed): curve(slope, seed) for arm, slope in slopes.items() for seed in range(3)}
    del curves["frontier", 2]
    return example["tables"].Found(arms.Settings(steps=800), curves)


def test_a_method_twice_as_steep_is_50_percent_faster(found):
    assert found.speed_rows() == [
        ["baseline", "0.0, 0.0, 0.0", "0.0 [0.0, 0.0]"],
        ["frontier", "50.0, 50.0", "50.0 [50.0, 50.0]"],
        ["uniform", "< -25, < -25, < -25", "at most -25.0"],
    ]


def test_the_method_is_compared_over_the_seeds_that_both_have(found):
    assert found.difference_rows() == [
        ["frontier - baseline", "50.0 [50.0, 50.0]", "-0.8000 [-0.8000, -0.8000]"],
        ["frontier - uniform", "at least 75.0", "-1.5200 [-1.5200, -1.5200]"],
    ]


def test_losses_are_those_at_T(found):
    rows = {row[0]: row[1:] for row in found.loss_rows()}
    assert rows["baseline"][:2] == ["4.300 [4.052, 4.548]", ""]
    assert rows["uniform"][1] == "0.7200 [0.7200, 0.7200]"
    assert rows["frontier"][2:] == ["3.450"] * 5


def test_a_blend_weighs_its_datasets(speed):
    curve = speed.Curve(STEP_K, np.stack([np.full(len(STEP_K), x) for x in (1.0, 5.0)]))
    assert np.allclose(curve.blend_K([0.3, 0.1]), 2.0)
    assert curve.at(30).tolist() == [1.0, 5.0]


def test_a_report_names_the_runs_that_it_lacks(example, study):
    text = example["tables"].report(study)
    assert "Not finished: baseline seed 0" in text
    assert "frequency seed 2" in text
    assert "`python examples/learnability_study/study.py`" in text
    assert str(study.folder) not in text


# Steps


def test_a_step_whose_result_exists_is_skipped(arms, tmp_path):
    done = []

    def step(name: str):
        path = tmp_path / name

        def do() -> None:
            done.append(name)
            path.touch()

        return arms.Step(name, path.exists, do)

    phases = [[step("a"), step("b")], [step("c")]]
    (tmp_path / "b").touch()
    arms.run_steps(phases, 2)
    arms.run_steps(phases, 2)
    assert done == ["a", "c"]


def test_a_step_that_fails_stops_the_phases_behind_it_but_not_its_own(arms, tmp_path):
    def fail() -> None:
        raise TokscaleError("disk full")

    good, later = tmp_path / "good", tmp_path / "later"
    phase = [arms.Step("bad", lambda: False, fail), arms.Step("good", good.exists, good.touch)]
    with pytest.raises(TokscaleError, match="bad: disk full"):
        arms.run_steps([phase, [arms.Step("later", later.exists, later.touch)]], 1)
    assert good.exists()
    assert not later.exists()


def test_a_step_that_leaves_no_result_is_an_error(arms):
    with pytest.raises(TokscaleError, match="lazy: ended early"):
        arms.run_steps([[arms.Step("lazy", lambda: False, lambda: None)]], 1)


def test_a_folder_holds_one_study(arms, study):
    assert arms.Study.open(study.folder, study.settings).folder == study.folder
    with pytest.raises(TokscaleError, match="other settings"):
        arms.Study.open(study.folder, arms.Settings(layers=7))


def test_every_arm_of_every_seed_is_planned_and_run_once(arms, study):
    names = [step.name for phase in study.phases() for step in phase]
    assert len(set(names)) == len(names)
    for seed in range(3):
        for arm in arms.ARMS:
            assert f"{arm}, seed {seed}" in names
            assert (f"plan of {arm}, seed {seed}" in names) == (arm != "baseline")
    assert study.phases("none") == [[]]
    assert len(study.phases("baselines")) == 4


def test_arms_differ_in_their_plan_alone(arms, study, monkeypatch):
    commands = {}
    monkeypatch.setattr(arms, "run_logged", lambda words, log: commands.update({log: words}))
    for arm in arms.ARMS:
        study._run_step(arm, 1).do()
    baseline = commands.pop(study.run_folder("baseline", 1) / "train.log")
    for log, words in commands.items():
        run = str(log.parent)
        plan = ["--tokscale-plan", str(study.plan(log.parent.name[:-2], 1))]
        same = [str(study.run_folder("baseline", 1)) if word == run else word for word in words]
        assert same == [*baseline, *plan]


def test_every_verb_of_the_study_is_parsed(arms, study, monkeypatch):
    commands = []
    monkeypatch.setattr(arms, "run_logged", lambda words, log: commands.append(words))
    monkeypatch.setattr(study.__class__, "_write_data", lambda self: None)
    for phase in study.phases():
        for step in phase:
            step.do()
    verbs = [words[3:] for words in commands if words[2] == "megatron_tokscale.cli"]
    assert len(verbs) == 2 + 1 + 1 + 3 * (len(arms.ARMS) - 1)  # probe sets, fit, score, plans
    for words in verbs:
        make_parser().parse_args(words)


def test_a_command_that_fails_names_its_log(arms, tmp_path):
    log = tmp_path / "run" / "train.log"
    with pytest.raises(TokscaleError, match="exit code 3; see the end of"):
        arms.run_logged([sys.executable, "-c", "print('why'); raise SystemExit(3)"], log)
    assert log.read_text().endswith("why\n")


# Text


@pytest.fixture(scope="module")
def corpora(example):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(example["corpora"], "_DOCUMENTED", ("networkx",))
        yield example["corpora"]


@pytest.fixture(scope="module")
def texts(corpora):
    return corpora.texts(20_000)


@pytest.mark.slow
def test_every_kind_of_text_is_there_in_documents_of_the_right_length(corpora, texts):
    assert list(texts) == list(corpora.WEIGHTS)
    for name, documents in texts.items():
        enough = 4_000 if name == corpora.NOISE else 20_000
        assert enough <= sum(map(len, documents)) < enough + 1500
        assert len(set(documents)) == len(documents)
        assert all(200 <= len(document) <= 1500 for document in documents)


@pytest.mark.slow
def test_texts_are_the_same_on_every_call(corpora, texts):
    assert corpora.texts(20_000) == texts


def test_a_text_is_cut_at_its_borders(corpora):
    first, second, third = "a" * 150 + "\n", "b" * 150 + "\n", "c" * 900 + "\n" + "d" * 900 + "\n"
    cut = list(corpora.pieces(f"{first}\n{second}\n{third}", corpora._PARAGRAPH))
    assert cut == [first + second, "c" * 900 + "\n", "d" * 900 + "\n"]


def test_checksums_have_the_entropy_of_random_characters(texts):
    """SHA-256 in base64: 43 characters, all but the last (4 bits) of 6 bits each."""
    hashes = [line.split(",")[0] for document in texts["checksums"] for line in document.split()]
    assert {len(each) for each in hashes} == {43}
    counts = np.unique(list("".join(each[:-1] for each in hashes)), return_counts=True)[1]
    assert len(counts) == 64
    assert scipy.stats.chisquare(counts).pvalue > 1e-4


def test_datasets_and_tokenizer_are_written_and_counted(corpora, texts, tmp_path, monkeypatch):
    from megatron_tokscale.core.files import read_json

    pytest.importorskip("megatron.core")
    monkeypatch.setattr(corpora, "texts", lambda characters: texts)
    folder = tmp_path / "data"
    corpora.write_data(folder, tmp_path / "tokenizer.json", 20_000, 300)
    counts = read_json(folder / "data.json")
    assert list(counts) == list(corpora.WEIGHTS)
    for name, count in counts.items():
        assert (folder / f"{name}.bin").stat().st_size == 2 * count["tokens"]
        assert count["tokens"] > count["documents"] > 0
