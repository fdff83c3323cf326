"""Weights decided while a job trains: from its losses alone, and the same when it is resumed."""

import json
import shutil
import threading
import time
from argparse import Namespace
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from jobs import Corpus, job_flags
from numpy.testing import assert_allclose, assert_array_equal
from planned_jobs import BATCH, dataset_of, plan_of, stream_of
from recorded_job import read_samples, run_recorded, start
from runs import read_journal

from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.core.files import sealed
from megatron_tokscale.data import (
    Cut,
    Decision,
    PlanProvenance,
    Replanning,
    Stratum,
    build_index,
    with_decisions,
)
from megatron_tokscale.data.history import load_run_plan, save_run_plan
from megatron_tokscale.data.strata import Strata
from megatron_tokscale.store import Run
from megatron_tokscale.training.data import agreement, follower, replan
from megatron_tokscale.training.data.agreement import FollowedPlan
from megatron_tokscale.training.data.follower import Follower
from megatron_tokscale.training.data.replan import Answer, Replanner
from megatron_tokscale.training.events import TrainingState
from megatron_tokscale.training.settings import DECISION_STEPS, JobPlanSettings

STEPS = 20
ASKED = (6, 12)
WEIGHTS = {0: (0.5, 0.5), 120: (0.9, 0.1)}
RANKS, WORKERS, MICRO_BATCH = 2, 2, 2


def flags_of(corpus, folder, *extra):
    return (
        *("--train-iters", str(STEPS), "--save-interval", "4", "--ckpt-format", "torch_dist"),
        *("--num-workers", str(WORKERS), "--tokscale-replan-interval", "6"),
        *("--tokscale-probe-set", str(corpus.probe_set), "--tokscale-probe-schedule", "linear:1"),
        *("--tokscale-plan", str(folder / "plan.json")),
        *("--save", str(folder / "run"), "--load", str(folder / "run"), *extra),
    )


@pytest.fixture(scope="module")
def plan(corpus: Corpus):
    how = Replanning(strength=3.0, floor=0.25, max_change=1.5)
    return plan_of(corpus.prefixes, WEIGHTS, replanning=how)


@pytest.fixture(scope="module")
def undisturbed(corpus: Corpus, plan, tmp_path_factory):
    """A job of twenty steps on two ranks with two workers each, and its output."""
    folder = tmp_path_factory.mktemp("undisturbed")
    plan.save(folder / "plan.json")
    output = run_recorded(corpus, folder / "seen", RANKS, *flags_of(corpus, folder))
    return folder, output


def first_unfetched(step):
    """Behind the microbatches that torch's loader asks for: two for each worker, and one more."""
    fetched = (2 * WORKERS + 1) * MICRO_BATCH * RANKS
    return step * BATCH + -(-fetched // BATCH) * BATCH


def expected_weights(run: Run, asked: int, current_D) -> np.ndarray:
    """Slopes by numpy's polyfit; then strength, floor and change as in docs/guides/live.md."""
    step_K = run.step_K
    chosen = (step_K <= asked) & (step_K >= asked / 2)
    loss_NK = run.read_losses().astype(np.float64)[:, chosen]
    slope_D = np.array(
        [
            -np.polyfit(np.log(step_K[chosen]), loss_NK[run.probe_set.dataset_N == d].mean(0), 1)[0]
            for d in range(2)
        ]
    )
    wanted_D = 0.5 * (slope_D / slope_D.mean()) ** 3
    wanted_D = 0.25 * 0.5 + 0.75 * wanted_D / wanted_D.sum()
    step_D = wanted_D - current_D
    most_D = np.where(step_D > 0, 0.5, 1 - 1 / 1.5) * current_D
    return current_D + step_D * min(1, *(most_D / np.abs(step_D)))


@pytest.mark.megatron
def test_weights_follow_the_losses_of_the_run(undisturbed, plan):
    folder, output = undisturbed
    run = Run.open(folder / "run")
    assert run.probe_set.datasets == tuple(dataset.name for dataset in plan.datasets)
    known, decisions = load_run_plan(folder / "run")
    assert known == plan
    assert [decision.step for decision in decisions] == list(ASKED)
    assert [row.start for row in decisions] == [
        first_unfetched(asked + DECISION_STEPS) for asked in ASKED
    ]
    current_D = np.array([0.5, 0.5])
    for asked, decision in zip(ASKED, decisions, strict=True):
        current_D = expected_weights(run, asked, current_D)
        assert_allclose(decision.weights, current_D, rtol=1e-6)
        assert np.abs(current_D - 0.5).max() > 0.02

    events = [row for row in read_journal(folder / "run") if row["event"] == "plan changed"]
    assert [row["step"] for row in events] == [asked + DECISION_STEPS for asked in ASKED]
    assert [row["losses_until"] for row in events] == list(ASKED)
    assert [tuple(row["weights"]) for row in events] == [row.weights for row in decisions]
    fingerprints = [with_decisions(plan, decisions[:n]).fingerprint for n in (1, 2)]
    assert [row["plan"] for row in events] == fingerprints
    for fingerprint in (plan.fingerprint, *fingerprints):
        assert output.count(f"plan {fingerprint}") == 1


@pytest.mark.megatron
def test_the_job_trains_on_the_decided_samples(undisturbed, corpus, tmp_path):
    """Workers had fetched ahead under the weights before, and none past the new ones' start."""
    folder, _ = undisturbed
    plan = with_decisions(*load_run_plan(folder / "run"))
    stream = stream_of(dataset_of(plan, corpus.prefixes, STEPS * BATCH, tmp_path))
    assert read_samples(folder / "seen") == stream
    unchanged = build_index(load_run_plan(folder / "run")[0], STEPS * BATCH)
    changed = build_index(plan, STEPS * BATCH)
    first = int(np.argmax(unchanged.stratum_N != changed.stratum_N))
    assert first >= plan.stages[1].start


def assert_same_run(left, right):
    assert load_run_plan(left / "run") == load_run_plan(right / "run")
    left, right = Run.open(left / "run"), Run.open(right / "run")
    assert_array_equal(left.step_K, right.step_K)
    assert_array_equal(left.read_losses(), right.read_losses())


@pytest.mark.megatron
def test_killed_between_request_and_decision_a_resumed_run_is_the_undisturbed_one(
    undisturbed, corpus, plan, tmp_path
):
    plan.save(tmp_path / "plan.json")
    run_recorded(corpus, tmp_path / "seen", RANKS, *flags_of(corpus, tmp_path), stop=10)
    assert load_run_plan(tmp_path / "run") == (plan, [])
    run_recorded(corpus, tmp_path / "seen", RANKS, *flags_of(corpus, tmp_path))
    assert_same_run(tmp_path, undisturbed[0])
    assert read_samples(tmp_path / "seen") == read_samples(undisturbed[0] / "seen")


@pytest.mark.megatron
def test_from_an_earlier_checkpoint_later_decisions_are_made_again(undisturbed, corpus, tmp_path):
    """From step 8: the first question was asked before it and answered after it."""
    folder, _ = undisturbed
    shutil.copytree(folder / "run", tmp_path / "run")
    shutil.copy(folder / "plan.json", tmp_path)
    extra = ("--ckpt-step", "8", "--exit-interval", "12")
    run_recorded(corpus, tmp_path / "seen", RANKS, *flags_of(corpus, tmp_path, *extra))
    plan, decisions = load_run_plan(folder / "run")
    assert load_run_plan(tmp_path / "run") == (plan, decisions[:1])
    run_recorded(corpus, tmp_path / "seen", RANKS, *flags_of(corpus, tmp_path))
    assert_same_run(tmp_path, folder)
    resumed = read_samples(tmp_path / "seen")
    assert next(iter(resumed)) == 8 * BATCH
    assert resumed.items() <= read_samples(folder / "seen").items()


@pytest.mark.megatron
def test_a_plan_edited_under_a_running_job_stops_it(corpus, plan, tmp_path):
    plan.save(tmp_path / "plan.json")
    file = tmp_path / "run/tokscale/plan.json"

    def edit():
        while not file.exists():
            time.sleep(0.01)
        replace(plan, seed=6).save(file)

    editor = threading.Thread(target=edit, daemon=True)
    editor.start()
    words = job_flags(corpus, *flags_of(corpus, tmp_path))
    job = start(1, "-m", "megatron_tokscale.pretrain", *words)
    editor.join()
    assert job.code == 2, job.output[-3000:]
    (line,) = job.refusals
    assert "was changed under this job" in line
    assert "Traceback" not in job.output
    assert Run.open(tmp_path / "run").step_K[-1] == ASKED[0] + DECISION_STEPS


# Without a job


def interval(steps):
    plan = JobPlanSettings(
        path=None, scores_dir=None, overrides=False, steps_between_decisions=steps
    )
    return plan.replan_interval


@pytest.mark.parametrize("steps", [4, 0, -8])
def test_an_interval_too_short_for_a_decision_is_refused(steps):
    with pytest.raises(
        TokscaleError, match=f"--tokscale-replan-interval is {steps}; expected steps above 4"
    ):
        interval(steps)
    assert interval(5) == 5


def state_at(step):
    return TrainingState(step=step, consumed_samples=0, args=Namespace())


class Asked(Replanner):
    """Notes what it is asked and when it decides."""

    def __init__(self, interval, on_disk=(), step=0, decided=()):
        prober = SimpleNamespace(
            last_step=-1,
            steps_on_disk=lambda: list(on_disk),
            wait_for_losses=lambda: None,
            is_writer=False,
        )
        decisions = [Decision(asked, 1, (1.0,)) for asked in decided]
        followed = SimpleNamespace(decisions=decisions)
        super().__init__(interval, None, SimpleNamespace(followed=followed), prober, Namespace())
        self.start = step
        self.log = []

    def _decide(self, state):
        self.log.append((self._asked, state.step))
        self._asked = None

    def run(self, probes, start, stop):
        self.on_train_start(state_at(self.start))
        for step in range(start + 1, stop + 1):
            if step in probes:
                self._prober.last_step = step
            self.on_step(state_at(step))
        return self.log


PROBES = {
    "at every step": range(100),
    "at multiples": range(0, 100, 10),
    "elsewhere": (0, 1, 2, 4, 7, 9, 13, 19, 22, 29, 30, 47, 51, 64, 90),
    "two due in a row": (0, 9, 11, 24, 26, 39, 41),
}


@pytest.mark.parametrize("probes", PROBES)
def test_resumed_at_any_step_the_same_requests_are_decided_at_the_same_steps(probes):
    probes = PROBES[probes]
    whole = Asked(10).run(probes, 0, 100)
    asked = {step for step, _ in whole}
    assert len(asked) >= 3
    for first, second in zip(sorted(asked), sorted(asked)[1:], strict=False):
        assert first // 10 < second // 10
    for at in range(100):
        decided = [question for question, step in whole if step <= at]
        resumed = Asked(10, [step for step in probes if step <= at], at, decided)
        assert resumed.run(probes, at, 100) == [row for row in whole if row[1] > at]


CONSUMED = 40


@pytest.fixture
def following(plan, tmp_path, monkeypatch):
    """A follower of the plan on the only rank, at sample 40 of 160."""
    monkeypatch.setattr(agreement, "first_of_all_ranks", lambda message: message)
    monkeypatch.setattr(agreement.torch.distributed, "get_rank", lambda: 0)

    def refuse(message):
        if message:
            raise TokscaleError(message)

    monkeypatch.setattr(agreement, "refuse_together", refuse)
    plan = replace(plan, max_epochs=1.0)
    found = Follower.__new__(Follower)
    found._run, found.followed = tmp_path, FollowedPlan(plan)
    found.planned = SimpleNamespace(
        index=build_index(plan, 160).shared(), strata=Strata(plan, [110, 1000], [None, None])
    )
    found._record = lambda consumed: None
    save_run_plan(plan, [], tmp_path)
    found.refuse_edits()
    return found


def test_a_decision_that_repeats_a_stratum_too_often_is_not_followed(following, plan, tmp_path):
    before = following.planned.index.stratum_N.copy()
    assert "'left' of the plan would be repeated for" in following.add(
        Decision(3, 60, (0.9, 0.1)), CONSUMED
    )
    assert following.followed.decisions == ()
    assert load_run_plan(tmp_path)[1] == []
    assert_array_equal(following.planned.index.stratum_N, before)
    assert following.add(Decision(3, 60, (0.6, 0.4)), CONSUMED) is None
    assert (
        load_run_plan(tmp_path)[1]
        == [*following.followed.decisions]
        == [Decision(3, 60, (0.6, 0.4))]
    )
    assert_array_equal(
        following.planned.index.stratum_N, build_index(following.plan, 160).stratum_N
    )


def test_a_decision_on_strata_is_kept_agreed_on_and_followed(following, plan, tmp_path):
    strata = (*(Stratum(f"left/{i}", 0, 0.5) for i in range(2)), Stratum("right", 1))
    base = replace(plan, strata=strata, cuts=(Cut("scores"), None))
    following.followed = FollowedPlan(base)
    following.planned.index = build_index(base, 160).shared()
    following.planned.strata = Strata(base, [110, 1000], [np.arange(110, dtype=np.int32), None])
    save_run_plan(base, [], tmp_path)
    decision = Decision(3, 60, (0.6, 0.4), (0.9, 0.1, 1.0))
    assert following.add(decision, CONSUMED) is None
    assert load_run_plan(tmp_path) == (base, [decision])
    assert FollowedPlan.from_text(following.followed.to_text()) == following.followed
    expected = build_index(with_decisions(base, [decision]), 160)
    assert_array_equal(following.planned.index.stratum_N, expected.stratum_N)
    of_left = expected.stratum_N[60:][expected.stratum_N[60:] < 2]
    assert abs((of_left == 0).mean() - 0.9) < 0.03
    other = FollowedPlan(base, (replace(decision, within=None),))
    assert other.plan.fingerprint != following.plan.fingerprint


def test_a_decision_that_cannot_be_written_is_not_followed(following, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(follower, "save_decisions", full)
    assert "No space left" in following.add(Decision(3, 60, (0.6, 0.4)), CONSUMED)
    assert following.plan == following.followed.base


@pytest.mark.parametrize("file", ["plan.json", "replans.json"])
def test_an_edited_file_stops_the_job(following, plan, tmp_path, file):
    if file == "plan.json":
        replace(plan, max_epochs=9.0).save(tmp_path / "tokscale" / file)
    else:
        content = json.loads((tmp_path / "tokscale" / file).read_text())
        row = {"step": 1, "start": 9, "weights": [1, 1]}
        content["decisions"][plan.fingerprint].append(row)
        (tmp_path / "tokscale" / file).write_text(json.dumps(sealed(content)))
    with pytest.raises(
        TokscaleError, match=r"changed under this job \(it has other content now\); restore"
    ):
        following.refuse_edits()


def test_an_edited_provenance_does_not_stop_the_job(following, plan, tmp_path):
    base = replace(following.followed.base, provenance=PlanProvenance("another"))
    base.save(tmp_path / "tokscale/plan.json")
    following.refuse_edits()


@pytest.fixture
def asking(tmp_path):
    """The re-planner of the rank that starts the process."""
    asking = Asked(10)
    asking._prober.is_writer, asking._run = True, tmp_path
    return asking


def test_a_process_that_does_not_end_keeps_the_plan(asking, monkeypatch, tmp_path):
    endless = tmp_path / "endless"
    endless.write_text("#!/bin/sh\nexec sleep 1000\n")
    endless.chmod(0o755)
    monkeypatch.setattr(replan.sys, "executable", str(endless))
    monkeypatch.setattr(replan, "_PATIENCE_SECONDS", 0.1)
    asking._ask(10)
    process = asking._process
    assert asking._answer() == Answer(
        reason="the process that decides has not ended within 0.1 s of the decision; expected "
        "seconds; look at the disk that holds the losses"
    )
    assert process.poll() is not None
    assert asking._process is None


def test_a_process_without_an_answer_keeps_the_plan(asking, monkeypatch):
    monkeypatch.setattr(replan.sys, "executable", "/bin/true")
    asking._ask(10)
    assert asking._answer() == Answer(reason="the process that decides has answered ''")


def test_a_failing_process_keeps_the_plan(asking, monkeypatch):
    monkeypatch.setattr(replan.sys, "executable", "/bin/false")
    asking._ask(10)
    assert asking._answer() == Answer(reason="exit code 1")
    monkeypatch.undo()
    asking._ask(10)
    assert "no run in" in asking._answer().reason
    asking._ask(10)
    process = asking._process
    asking.close()
    assert process.returncode is not None
    assert asking._process is None
