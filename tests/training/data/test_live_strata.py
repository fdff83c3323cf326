"""Strata that are corrected while a job trains, from the documents that its plan keeps out."""

from dataclasses import replace

import numpy as np
import pytest
from jobs import EOD, SEQ_LENGTH, TRAINING, VOCAB_SIZE, Corpus
from numpy.testing import assert_allclose
from planned_jobs import BATCH, make_scores
from recorded_job import run_recorded

from megatron_tokscale.cli import main
from megatron_tokscale.data import Plan
from megatron_tokscale.data.history import load_run_plan
from megatron_tokscale.data.scores import scores_path
from megatron_tokscale.store import Run

STEPS, ASKED = 12, 6


@pytest.fixture(scope="module")
def scores(corpus: Corpus, tmp_path_factory):
    """Scores of both datasets: the later in the file, the more a document falls."""
    folder = tmp_path_factory.mktemp("scores")
    for seed, prefix in enumerate(corpus.prefixes):
        scores = make_scores(prefix, seed)
        falls = np.linspace(0.1, 0.6, scores.n_documents).astype(np.float32)
        replace(scores, fall_Q=falls).save(folder / scores_path(prefix).name)
    return folder


@pytest.fixture(scope="module")
def folder(corpus: Corpus, scores, tmp_path_factory):
    """A job by the verbs: a plan by falls, a probe set of what it keeps out, live weights."""
    folder = tmp_path_factory.mktemp("live")
    plan, strata = folder / "plan.json", folder / "strata.safetensors"
    data = ["--data-path", *corpus.data_path, "--split", TRAINING["--split"]]
    job = ["--seq-length", str(SEQ_LENGTH), "--train-samples", str(STEPS * BATCH)]
    cut = ["--scores", str(scores), "--quantiles", "3", "--held-out", "8"]
    main(["plan", "build", "fall", *data, *job, *cut, "--out", str(plan)])
    tokens = ["--tokens", "1200", "--vocab-size", str(VOCAB_SIZE), "--eod", str(EOD)]
    where = ["--plan", str(plan), "--scores-dir", str(scores)]
    main(["probe", "build", *where, *tokens, "--out", str(strata)])
    flags = (
        *("--train-iters", str(STEPS), "--save", str(folder / "run"), "--save-interval", "100"),
        *("--tokscale-probe-set", str(corpus.probe_set), str(strata)),
        *("--tokscale-probe-schedule", "linear:1", "--tokscale-replan-interval", str(ASKED)),
        *("--tokscale-plan", str(plan), "--tokscale-scores-dir", str(scores)),
    )
    run_recorded(corpus, folder / "seen", 1, *flags)
    return folder


@pytest.mark.megatron
def test_strata_follow_the_losses_of_the_documents_that_are_kept_out(folder):
    plan, decisions = load_run_plan(folder / "run")
    assert plan == Plan.load(folder / "plan.json")
    (decision,) = decisions
    run = Run.open(folder / "run/probe-sets/strata")
    assert run.probe_set.datasets == tuple(stratum.name for stratum in plan.strata)

    # Slopes by numpy's polyfit; then strength, floor and change as in docs/guides/live.md.
    chosen = (run.step_K <= ASKED) & (run.step_K >= ASKED / 2)
    loss_NK = run.read_losses().astype(np.float64)[:, chosen]
    x_K = np.log(run.step_K[chosen])
    slope_Z = np.array(
        [
            -np.polyfit(x_K, loss_NK[run.probe_set.dataset_N == z].mean(0), 1)[0]
            for z in range(plan.n_strata)
        ]
    )
    assert (slope_Z > 0).all()
    base_Z = 0.5 * plan.share_Z
    wanted_Z = base_Z * slope_Z**0.8
    wanted_Z = 0.25 * base_Z + 0.75 * wanted_Z / wanted_Z.sum()
    current_Z = plan.weight_Z(plan.intervals(ASKED * BATCH + 1)[-1][2])
    step_Z = wanted_Z - current_Z
    most_Z = np.where(step_Z > 0, 0.5, 1 - 1 / 1.5) * current_Z
    expected_Z = current_Z + step_Z * min(1, *(most_Z / np.abs(step_Z)))
    assert_allclose(decision.within, expected_Z, rtol=1e-5)
    assert_allclose(decision.weights, (expected_Z[:3].sum(), expected_Z[3:].sum()), rtol=1e-5)
    assert np.abs(expected_Z / current_Z - 1).max() > 0.02
