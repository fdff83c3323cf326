"""`transfer_run` on two runs on disk: the file, the text, and what is refused."""

import json
import shutil

import numpy as np
import planted_pairs
import pytest
from runs import plain_probe_set, probe_steps, write_run

from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.core.records import to_json
from megatron_tokscale.fit import fit_run
from megatron_tokscale.results.estimate import Undefined, format_estimate
from megatron_tokscale.results.fitted import read_fit
from megatron_tokscale.results.transfer import read_transfer
from megatron_tokscale.results.verdict import Verdict
from megatron_tokscale.spectrum.evidence.run_transfer import transfer_run
from megatron_tokscale.spectrum.evidence_text import describe_transfer
from megatron_tokscale.store import Run

STEPS = probe_steps(40)


def runs_of(folder, scenario, documents=30):
    """A planted pair of fitted runs."""
    rng = np.random.default_rng(0)
    text = planted_pairs.text_of(documents, rng)
    made = []
    for name, loss_NK in zip(
        "ab", getattr(planted_pairs, scenario)(text, planted_pairs.axis(), rng), strict=True
    ):
        run = write_run(folder / name, STEPS, loss_NK, text.probe_set)
        fit_run(run)
        made.append(run)
    return made


@pytest.fixture(scope="module")
def genuine(tmp_path_factory):
    return runs_of(tmp_path_factory.mktemp("genuine"), "genuine")


def test_times_that_agree_transfer_and_the_text_says_so(genuine):
    source, target = genuine
    transfer = transfer_run(source, target, n_resamples=100, seed=0)
    stored = json.loads(target.paths.transfer.read_text())
    assert stored["transfers"] == [to_json(transfer)]
    assert read_transfer(target, read_fit(target)) == (transfer,)
    for tests in (transfer.absolute, transfer.by_loss):
        assert set(tests) == {"dataset", "frequency decile", "position decile", "document"}
        assert tests["document"].test.verdict is Verdict.HOLDS
    for found in (transfer.order, transfer.falls):
        assert found.test.verdict is Verdict.HOLDS
    assert {test.verdict for test in transfer.surface.tests.values()} == {Verdict.HOLDS}
    assert (transfer.n_units, transfer.fit.unit_kind) == (30, "documents")
    assert transfer.clock == "lr-sum"
    lines = describe_transfer(transfer).splitlines()
    by_document = [line for line in lines if line.strip().startswith("document ")]
    assert len(by_document) == 2
    assert all(line.endswith(": holds") for line in by_document)
    for found in (transfer.order, transfer.falls):
        number = format_estimate(found.test.estimate)
        assert f"      holds: {number} ({found.test.claim.rule})" in lines
    assert sum(line.endswith(": no test") for line in lines) == 2


def test_permuted_times_do_not_transfer_and_the_text_says_so(tmp_path):
    transfer = transfer_run(*runs_of(tmp_path, "permuted"), n_resamples=100, seed=0)
    found = [
        each.test
        for tests in (transfer.absolute, transfer.by_loss)
        for each in tests.values()
        if each.test
    ]
    found += [transfer.order.test, transfer.falls.test, *transfer.surface.tests.values()]
    assert all(test.verdict is not Verdict.HOLDS for test in found)
    assert "holds" not in describe_transfer(transfer)


def test_the_same_source_replaces_its_entry(genuine):
    source, target = genuine
    for seed in (1, 2):
        transfer_run(source, target, n_resamples=5, seed=seed)
    stored = json.loads(target.paths.transfer.read_text())
    assert [each["settings"]["seed"] for each in stored["transfers"]] == [2]


def test_runs_of_other_probe_sets_are_refused(genuine, tmp_path):
    other = write_run(
        tmp_path / "other", STEPS, np.ones((400, 40), np.float32), plain_probe_set(400)
    )
    fit_run(other)
    with pytest.raises(TokscaleError, match="watch different tokens"):
        transfer_run(other, genuine[1])


def test_runs_without_a_fit_are_refused(genuine, tmp_path):
    _, target = genuine
    bare = write_run(tmp_path / "bare", STEPS, target.read_losses() + 1, target.probe_set)
    for pair in ((bare, target), (target, bare)):
        with pytest.raises(TokscaleError, match=r"run `megatron-tokscale fit .*bare` first"):
            transfer_run(*pair)


def test_fits_in_different_units_of_time_share_the_sum_of_learning_rates(genuine, tmp_path):
    source, target = genuine
    other = write_run(tmp_path / "tokens", STEPS, target.read_losses(), target.probe_set)
    fit_run(other, time="tokens")
    transfer = transfer_run(source, other, n_resamples=100, seed=0)
    assert transfer.clock == "lr-sum"
    same = transfer_run(source, target, n_resamples=100, seed=0)
    for name, each in same.absolute.items():
        found = transfer.absolute[name].events.value
        np.testing.assert_allclose(found, each.events.value, atol=0.02)
    assert transfer.falls.test == same.falls.test


def test_a_short_run_has_no_covariance_of_falls_and_says_so(genuine, tmp_path):
    source, target = genuine
    late = STEPS >= 3000
    short = [
        write_run(tmp_path / name, STEPS[late], run.read_losses()[:, late], run.probe_set)
        for name, run in (("a", source), ("b", target))
    ]
    for run in short:
        fit_run(run)
    transfer = transfer_run(*short, n_resamples=20, seed=0)
    assert "octaves of time" in transfer.falls.undefined
    assert transfer.falls.undefined in describe_transfer(transfer)


def test_runs_whose_losses_do_not_overlap_have_no_alignment_by_loss(genuine, tmp_path):
    source, target = genuine
    better = write_run(tmp_path / "b", STEPS, target.read_losses() - 100, target.probe_set)
    fit_run(better)
    transfer = transfer_run(source, better, n_resamples=5, seed=0)
    assert isinstance(transfer.by_loss, Undefined)
    assert "aligned by loss: " in describe_transfer(transfer)
    assert "dataset" in transfer.absolute


def test_a_run_is_not_its_own_source(tmp_path, local_losses):
    steps, loss_NK = local_losses[:2]
    run = write_run(tmp_path / "run", steps, loss_NK[:160])
    fit_run(run)
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    for source in (run, Run.open(tmp_path / "copy")):
        with pytest.raises(TokscaleError, match=r"has the losses of .*run; expected other runs"):
            transfer_run(source, run)
