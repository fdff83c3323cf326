"""The parts that the studies of data plans share: metric of speed, ledger, steps and chain.

Nothing is trained here. Shapes: K probes, S seeds.
"""

import json
import math
import sys
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import scipy.stats
from reweighting import chain as chain_module
from reweighting import speed
from reweighting.arms import ARMS, UNIFORM
from reweighting.chain import Chain, Training
from reweighting.ledger import Ledger
from reweighting.steps import Step, run_logged, run_steps

from megatron_tokscale.cli.entry import make_parser
from megatron_tokscale.core.errors import TokscaleError

STEP_K = np.arange(0, 751, 10)
T = 600


# The metric


def power_law(step_K, faster=1.0):
    """A loss of 1 + 20 t^-0.3; the model learns `faster` times as fast."""
    return speed.Curve(step_K, 1 + 20 * (np.maximum(step_K, 1) * faster) ** -0.3)


def test_loss_and_slope_at_the_end_are_those_of_the_power_law():
    curve = power_law(STEP_K)
    end = speed.at_end(curve.step_K, curve.loss_K, T)
    above = 20 * T**-0.3
    assert end.loss == pytest.approx(1 + above, abs=1e-4)
    assert end.slope == pytest.approx(0.3 * above, rel=3e-3)


@pytest.mark.parametrize("factor", [0.9, 1.0, 1.05, 1.2])
def test_a_known_shift_of_the_clock_is_measured(factor):
    arm_S, uniform_S = [power_law(STEP_K, factor)], [power_law(STEP_K)]
    found = speed.compare(arm_S, uniform_S, T, speed.pooled_slope(uniform_S, T))
    # By difference over slope: ln(speed-up) of a power law with exponent a is (1 - f^-a) / a.
    by_slope = 100 * (1 - math.exp(-(1 - factor**-0.3) / 0.3))
    assert found.faster_S[0] == pytest.approx(by_slope, abs=0.1)
    # By first passage: the steps are those of the uniform arm, divided by the factor.
    assert found.passage_S[0] == pytest.approx(100 * (1 - 1 / factor), abs=0.1)


def test_only_the_last_two_fifths_until_the_end_count():
    curve = power_law(STEP_K)
    loss_K = np.where((STEP_K < 0.6 * T) | (STEP_K > T), 99.0, curve.loss_K)
    assert speed.at_end(STEP_K, loss_K, T) == speed.at_end(STEP_K, curve.loss_K, T)


def test_fewer_than_four_probes_near_the_end_are_refused():
    step_K = np.array([0, 300, 400, 500, 600])
    with pytest.raises(TokscaleError, match="3 probes lie in the last 40% of 600 steps"):
        speed.at_end(step_K, power_law(step_K).loss_K, T)


def test_noise_of_single_probes_moves_the_difference_at_the_end_less_than_first_passage():
    rng = np.random.default_rng(0)

    def noisy(curve):
        return replace(curve, loss_K=curve.loss_K + rng.normal(0, 0.006, len(STEP_K)))

    uniform_S = [noisy(power_law(STEP_K)) for _ in range(200)]
    arm_S = [noisy(power_law(STEP_K, 1.05)) for _ in range(200)]
    found = speed.compare(arm_S, uniform_S, T, speed.pooled_slope(uniform_S, T))
    expected = 100 * (1 - math.exp(-(1 - 1.05**-0.3) / 0.3))
    assert np.mean(found.faster_S) == pytest.approx(expected, abs=0.5)
    assert np.std(found.faster_S) < np.nanstd(found.passage_S)


def test_a_loss_that_never_arrives_has_no_passage():
    assert math.isnan(speed.first_passage(STEP_K, power_law(STEP_K).loss_K, 1.0))
    assert speed.describe_passage([5.0, math.nan, 15.0], -25) == "at most -1.7"


def test_between_probes_the_curve_is_a_chord():
    step_K, loss_K = np.array([0, 100, 300, 500]), np.array([4.0, 3.0, 2.0, 1.0])
    assert speed.first_passage(step_K, loss_K, 2.25) == pytest.approx(250)
    assert speed.first_passage(step_K, loss_K, 5.0) == 0


def test_the_running_median_takes_out_a_spike_and_keeps_a_line():
    line_K = 2 - STEP_K / 1000
    spiked_K = line_K.copy()
    spiked_K[7] -= 1
    assert np.allclose(speed.smooth(line_K), line_K)
    by_hand = [sorted(spiked_K[k - 1 : k + 2])[1] for k in range(1, len(line_K) - 1)]
    assert np.array_equal(speed.smooth(spiked_K), [spiked_K[0], *by_hand, spiked_K[-1]])


def test_the_interval_is_scipys_for_students_t():
    values_S = [3.0, 7.0, 4.0]
    mean, half = speed.interval(values_S)
    by_scipy = scipy.stats.ttest_1samp(values_S, 0).confidence_interval(0.95)
    assert (mean - half, mean + half) == pytest.approx((by_scipy.low, by_scipy.high))
    assert speed.describe(values_S) == f"4.7 [{by_scipy.low:.1f}, {by_scipy.high:.1f}]"


def test_one_seed_has_no_interval():
    assert math.isnan(speed.interval([3.0])[1])
    assert speed.describe([3.0]) == "3.0"
    assert speed.describe([]) == "-"


# The ledger


def test_a_ledger_gives_back_what_was_added(tmp_path):
    path = tmp_path / "ledger.jsonl"
    Ledger(path, {"steps": 3}).add("fall/0", {"step": np.array([0, 123456]), "loss": [1.2345678]})
    again = Ledger(path, {"steps": 3})
    assert "fall/0" in again and "fall/1" not in again
    assert again["fall/0"] == {"step": [0, 123456], "loss": [1.2346]}
    assert len(path.read_text().splitlines()) == 2


def test_a_value_that_is_not_finite_becomes_null(tmp_path):
    path = tmp_path / "ledger.jsonl"
    Ledger(path, {}).add("run", {"deep": {"values": [math.nan, math.inf, 1.0]}})
    assert json.loads(path.read_text().splitlines()[1])["deep"]["values"] == [None, None, 1.0]


def test_a_ledger_of_other_settings_is_refused(tmp_path):
    path = tmp_path / "ledger.jsonl"
    Ledger(path, {"steps": 3}).add("fall/0", {"loss": []})
    with pytest.raises(TokscaleError, match="holds results of other settings"):
        Ledger(path, {"steps": 4})


def test_a_result_is_added_once(tmp_path):
    ledger = Ledger(tmp_path / "ledger.jsonl", {})
    ledger.add("run", {"loss": 1.0})
    with pytest.raises(TokscaleError, match="has a result of run"):
        ledger.add("run", {"loss": 2.0})
    assert ledger["run"] == {"loss": 1.0}


def test_a_damaged_line_is_named(tmp_path):
    path = tmp_path / "ledger.jsonl"
    Ledger(path, {}).add("run", {"loss": 1.0})
    path.write_text(path.read_text() + '{"name": "half')
    with pytest.raises(TokscaleError, match=r"line 3 of .* is damaged"):
        Ledger(path, {})


# Steps


def test_a_step_whose_result_exists_is_skipped(tmp_path):
    done = []

    def step(name: str):
        path = tmp_path / name

        def do() -> None:
            done.append(name)
            path.touch()

        return Step(name, path.exists, do)

    phases = [[step("a"), step("b")], [step("c")]]
    (tmp_path / "b").touch()
    run_steps(phases, 2)
    run_steps(phases, 2)
    assert done == ["a", "c"]


def test_a_step_that_fails_stops_the_phases_behind_it_but_not_its_own(tmp_path):
    def fail() -> None:
        raise TokscaleError("disk full")

    good, later = tmp_path / "good", tmp_path / "later"
    phase = [Step("bad", lambda: False, fail), Step("good", good.exists, good.touch)]
    with pytest.raises(TokscaleError, match="bad: disk full"):
        run_steps([phase, [Step("later", later.exists, later.touch)]], 1)
    assert good.exists()
    assert not later.exists()


def test_a_step_that_leaves_no_result_is_an_error():
    with pytest.raises(TokscaleError, match="lazy: ended early"):
        run_steps([[Step("lazy", lambda: False, lambda: None)]], 1)


def test_a_command_that_fails_names_its_log(tmp_path):
    log = tmp_path / "run" / "train.log"
    with pytest.raises(TokscaleError, match="exit code 3; see the end of"):
        run_logged([sys.executable, "-c", "print('why'); raise SystemExit(3)"], log)
    assert log.read_text().endswith("why\n")


# The chain, with a runner that makes the files of every command and nothing else

TRAINING = Training(
    layers=2,
    hidden=64,
    heads=4,
    seq_length=64,
    vocab_size=100,
    eod=0,
    split="97,3,0",
    batch=32,
    steps=600,
    last_step=750,
    learning_rate=2e-3,
    warmup=40,
    save_every=25,
    valid_tokens=1000,
    schedule="linear:15+last",
    scored_tokens=1000,
    by="fall",
    quantiles=4,
    held_out=8,
    replan_every=30,
    arms=tuple(ARMS),
    seeds=(0, 1),
    reference_seed=999,
)


class Study(Chain):
    """A chain over one dataset."""

    @property
    def data_path(self):
        return ["1", str(self.folder / "data" / "text")]

    def write_data(self):
        self.data_done.parent.mkdir(parents=True)
        self.data_done.touch()

    def result_of(self, run):
        return {"loss": [1.0]}


@dataclass
class Runner:
    """A stand-in for `run_logged` and for the jobs that it starts.

    Attributes:
        commands: the commands, in order.
        trained: last step of each run that has ended.
        stopped: runs that end early, once each.
    """

    commands: list = field(default_factory=list)
    trained: dict = field(default_factory=dict)
    stopped: set = field(default_factory=set)

    def run(self, words, log):
        self.commands.append((log, words))
        if "megatron_tokscale.cli" in words:
            out = log.parents[1] / "replay" / "analysis" / "fit.json"
            if "--out" in words:
                out = type(log)(words[words.index("--out") + 1])
            out.parent.mkdir(parents=True, exist_ok=True)
            if not out.exists():
                out.touch()
        elif log.parent.name in self.stopped:
            self.stopped.remove(log.parent.name)
        else:
            self.trained[log.parent] = int(words[words.index("--train-iters") + 1])

    def verbs(self):
        return [words[3:] for _, words in self.commands if words[2] == "megatron_tokscale.cli"]

    def jobs(self):
        return {
            log.parent.name: words
            for log, words in self.commands
            if words[2] == "megatron_tokscale.pretrain"
        }


@pytest.fixture
def runner(monkeypatch):
    runner = Runner()
    monkeypatch.setattr(chain_module, "run_logged", runner.run)
    monkeypatch.setattr(
        chain_module, "is_trained", lambda run, last: runner.trained.get(run) == last
    )
    return runner


@pytest.fixture
def study(tmp_path):
    return Study(tmp_path / "study", TRAINING, Ledger(tmp_path / "ledger.jsonl", {}))


def finish(study):
    run_steps(study.phases().values(), 1)


def test_the_chain_goes_from_data_to_a_job_of_every_arm_and_seed(study, runner):
    finish(study)
    assert study.is_complete()
    expected = {f"{arm}-{seed}" for arm in ARMS for seed in (0, 1)}
    assert set(runner.jobs()) == {"reference", "replay", *expected}
    assert len(runner.verbs()) == 2 + 2 + 2 * len(ARMS) + 2  # probe sets, fit, score, plans, strata


def test_every_verb_of_the_chain_is_parsed(study, runner):
    finish(study)
    for words in runner.verbs():
        make_parser().parse_args(words)


def test_a_finished_chain_does_nothing(study, runner):
    finish(study)
    runner.commands.clear()
    finish(study)
    assert runner.commands == []


def test_a_job_that_was_stopped_is_the_only_one_that_runs_again(study, runner):
    runner.stopped = {"fall-1"}
    with pytest.raises(TokscaleError, match="fall, seed 1: ended early"):
        finish(study)
    assert study.missing() == [("fall", 1)]
    runner.commands.clear()
    finish(study)
    assert list(runner.jobs()) == ["fall-1"] and not runner.verbs()
    assert study.is_complete()


def test_on_a_new_machine_runs_of_the_ledger_are_not_trained_again(study, runner, tmp_path):
    runner.stopped = {"permuted-1"}
    with pytest.raises(TokscaleError):
        finish(study)
    runner.commands.clear()
    elsewhere = replace(study, folder=tmp_path / "elsewhere", ledger=Ledger(study.ledger.path, {}))
    finish(elsewhere)
    assert set(runner.jobs()) == {"reference", "replay", "permuted-1"}
    assert sum(words[:2] == ["plan", "build"] for words in runner.verbs()) == 1


def test_all_arms_of_a_seed_come_before_the_next_seed(study):
    assert [seed for _, seed in study.missing()] == [0] * len(ARMS) + [1] * len(ARMS)


def words_without(words, *flags):
    """Return words without some flags and their values."""
    kept, skipping = [], False
    for word in words:
        if word.startswith("--"):
            skipping = word in flags
        if not skipping:
            kept.append(word)
    return kept


def test_arms_without_live_weights_differ_in_their_plan_alone(study, runner):
    finish(study)
    own = ("--tokscale-plan", "--save", "--load", "--data-cache-path")
    jobs = {name: words_without(words, *own) for name, words in runner.jobs().items()}
    for arm in ("fall", "frontier", "permuted"):
        assert jobs[f"{arm}-1"] == jobs[f"{UNIFORM}-1"]
    live = words_without(jobs["fall-live-1"], "--tokscale-replan-interval", "--tokscale-probe-set")
    assert live == words_without(jobs["fall-1"], "--tokscale-probe-set")


def test_no_two_jobs_share_a_data_cache(study, runner):
    finish(study)
    jobs = runner.jobs().values()
    caches = {words[words.index("--data-cache-path") + 1] for words in jobs}
    assert len(caches) == len(jobs)


def test_live_arms_watch_the_documents_that_their_plan_keeps_out(study, runner):
    finish(study)
    words = runner.jobs()["fall-live-1"]
    at = words.index("--tokscale-probe-set")
    assert words[at + 1 : at + 3] == [str(study.valid), str(study.strata("fall-live", 1))]
    (built,) = [v for v in runner.verbs() if v[-1] == str(study.strata("fall-live", 1))]
    assert built[:4] == ["probe", "build", "--plan", str(study.plan("fall-live", 1))]


def test_all_plans_of_a_seed_share_their_strata(study, runner):
    finish(study)
    strata = ("--by", "--quantiles", "--held-out", "--scores", "--seed")
    found = set()
    for words in runner.verbs():
        if words[:2] == ["plan", "build"] and words[words.index("--seed") + 1] == "0":
            found.add(tuple(words[words.index(flag) + 1] for flag in strata))
    assert found == {("fall", "4", "8", str(study.scores), "0")}


def test_the_scores_come_from_documents_that_the_reference_has_not_seen(study, runner):
    finish(study)
    (build,) = [words for words in runner.verbs() if "--unseen-by" in words]
    assert build[build.index("--unseen-by") + 1] == str(study.reference)
    assert build[build.index("--part") + 1] == "train"
    replay = runner.jobs()["replay"]
    assert replay[replay.index("--tokscale-probe-set") + 1] == str(study.unseen)
    assert replay[replay.index("--tokscale-replay") + 1] == str(study.reference)
    assert replay[replay.index("--train-iters") + 1] == "600"
