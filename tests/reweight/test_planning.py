from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from analyses import blank, edit
from scored import run_of

from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.core.records import to_json
from megatron_tokscale.data import DatasetIdentity, Plan, build_index
from megatron_tokscale.results.spectrum import DatasetCounts
from megatron_tokscale.reweight import (
    Guards,
    Job,
    Manual,
    Uniform,
    make_plan,
    plan_by_hand,
    plan_run,
    plan_uniform,
    read_spectra,
)

WEB = DatasetIdentity("web", 1000, 640_000)
CODE = DatasetIdentity("code", 500, 320_000)
JOB = Job(
    (WEB, CODE), (2, 1), train_samples=12_000, seq_length=64, seed=3, epoch_samples=(10_000, 5_000)
)


@pytest.fixture
def run(tmp_path):
    """A reference run of 1000 steps of 8 samples: web learned around step 30, code around 300."""
    return run_of(tmp_path / "run", ["web", "code"], [30, 300])


def edit_info(run, **changes):
    edit(run.paths.spectrum, **changes)


def test_a_plan_from_a_run_leads_from_what_is_learned_first_to_what_is_learned_later(run, tmp_path):
    plan = plan_run(run, JOB, tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    weights_TD = np.array([stage.weights for stage in plan.stages])
    web_T = weights_TD[:, 0]
    assert web_T[0] == pytest.approx(2 / 3)
    assert web_T.max() > 0.75
    assert web_T[-1] < 0.5
    assert [stratum.name for stratum in plan.strata] == ["web", "code"]
    assert plan.provenance.policy == "dataset"
    assert plan.provenance.sources.run == str(run.path)
    assert plan.provenance.control is None
    assert plan.max_epochs == 4.0


def test_a_plan_keeps_its_guards(run, tmp_path):
    guards = Guards(floor=0.4, max_change=1.2, max_epochs=1.0)
    plan = plan_run(run, JOB, tmp_path / "plan.json", guards=guards)
    weights_TD = np.array([stage.weights for stage in plan.stages])
    base_D = np.array([2 / 3, 1 / 3])
    assert (weights_TD >= 0.4 * base_D - 1e-12).all()
    ratio = weights_TD[1:] / weights_TD[:-1]
    assert 1 / 1.2 - 1e-9 <= ratio.min() < ratio.max() <= 1.2 + 1e-9
    count_Z = np.bincount(build_index(plan, JOB.train_samples).stratum_N)
    assert (count_Z / JOB.epoch_samples).max() <= 1.001


def test_the_uniform_control_is_one_stage_of_base_weights(tmp_path):
    plan = plan_uniform(JOB, tmp_path / "plan.json")
    assert [stage.weights for stage in plan.segments] == [(2 / 3, 1 / 3)]


def test_the_runs_datasets_may_have_other_names_than_the_jobs(run, tmp_path):
    job = replace(JOB, datasets=(replace(WEB, name="web_text"), replace(CODE, name="code_text")))
    with pytest.raises(TokscaleError, match="watched no tokens of web_text, code_text"):
        plan_run(run, job, tmp_path / "plan.json")
    plan_run(run, job, tmp_path / "plan.json", datasets=["web", "code"])


def test_namesakes_get_strata_of_their_own():
    plan = make_plan(replace(JOB, datasets=(WEB, replace(WEB, n_tokens=700_000))), Uniform())
    assert [stratum.name for stratum in plan.strata] == ["web#0", "web#1"]


def test_weights_by_hand_are_kept_as_they_are(tmp_path):
    manual = Manual({0: [1, 0], 6000: [0.01, 0.99]})
    plan = plan_by_hand(manual, JOB, tmp_path / "plan.json", guards=Guards(floor=0.5))
    assert [stage.weights for stage in plan.stages] == [(1, 0), (0.01, 0.99)]
    assert Plan.load(tmp_path / "plan.json").provenance.policy == "manual"


def test_stages_beyond_the_end_of_training_are_left_out():
    plan = make_plan(JOB, Manual({0: [1, 1], 12_000: [1, 0]}))
    assert len(plan.stages) == 1


@pytest.mark.parametrize("policy", [Uniform(), Manual({0: [0, 1]})])
def test_too_many_epochs_are_refused(policy):
    with pytest.raises(TokscaleError, match="would be repeated"):
        make_plan(replace(JOB, train_samples=100_000), policy)
    make_plan(replace(JOB, train_samples=100_000), policy, Guards(max_epochs=None))


def test_the_training_part_counts_for_epochs():
    with pytest.raises(TokscaleError, match="stratum 'web' would be repeated for 8 epochs"):
        make_plan(replace(JOB, epoch_samples=(1000, 5000)), Uniform())


def test_an_existing_plan_is_not_overwritten(run, tmp_path):
    plan_run(run, JOB, tmp_path / "plan.json")
    before = (tmp_path / "plan.json").read_bytes()
    with pytest.raises(TokscaleError, match="choose another name"):
        plan_uniform(JOB, tmp_path / "plan.json")
    assert (tmp_path / "plan.json").read_bytes() == before


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"base_weights": (1,)}, "1 base weights for 2"),
        ({"base_weights": (1, 0)}, "expected a positive one"),
        ({"base_weights": (1, float("nan"))}, "expected a positive one"),
        ({"train_samples": 0}, "has 0 samples of 64 tokens; expected 1"),
        ({"epoch_samples": (9, 0)}, "code .* has not enough training tokens"),
    ],
)
def test_a_job_that_does_not_fit_together_is_refused(change, sentence):
    with pytest.raises(TokscaleError, match=sentence):
        replace(JOB, **change)


def test_a_run_without_a_spectrum_is_refused(run):
    run.paths.spectrum_arrays.unlink()
    with pytest.raises(
        TokscaleError, match=r"spectrum\.npz is not there; run `megatron-tokscale spectrum"
    ):
        read_spectra(run)


def test_a_damaged_spectrum_is_refused(run):
    path = run.paths.spectrum_arrays
    whole = path.read_bytes()
    for damaged in (b"", whole[:300], b"x" * 100):
        path.write_bytes(damaged)
        with pytest.raises(TokscaleError, match="damaged"):
            read_spectra(run)
    path.write_bytes(whole)
    edit_info(run, datasets=[to_json(blank(DatasetCounts, name="web", n_tokens=5))])
    with pytest.raises(TokscaleError, match="has shape"):
        read_spectra(run)


def test_a_dataset_without_watched_tokens_has_no_spectrum(run):
    counts = (("web", 5), ("code", 0))
    datasets = [to_json(blank(DatasetCounts, name=name, n_tokens=n)) for name, n in counts]
    edit_info(run, datasets=datasets)
    assert read_spectra(run).names == ("web",)


def test_a_run_that_does_not_know_its_samples_is_refused(run):
    run.records = tuple(SimpleNamespace(step=r.step, consumed_samples=0) for r in run.records)
    with pytest.raises(TokscaleError, match="consumed samples"):
        read_spectra(run)
