"""A run's record tells the past as it happened, not as the flags of a resumed job would have it."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from jobs import SEQ_LENGTH, Corpus, run_alone
from launch_jobs import (
    CONSTANT,
    EVERY_4,
    RATE,
    USE_CHECKPOINT,
    by_samples,
    constant_sums,
    logged_rates,
    make_probe_set,
    probe,
    sums,
    tokens,
    train,
)
from megatrons import INSTALLED, OLD

from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.laws.multi_power.learning_rates import learning_rates
from megatron_tokscale.store import Run
from megatron_tokscale.trace.trace import Trace
from megatron_tokscale.training.history.past import NOTE
from megatron_tokscale.training.history.saved import read_checkpoint

pytestmark = pytest.mark.megatron


@pytest.mark.parametrize(
    ("first", "second", "version"), [(16, 8, INSTALLED), (8, 16, OLD[0]), (8, 16, OLD[-1])]
)
def test_another_batch_size_on_resume_changes_no_past(corpus, tmp_path, first, second, version):
    save = ("--save", str(tmp_path), "--load", str(tmp_path), *EVERY_4, *probe(corpus))
    save = (*save, "--train-samples", "512")
    for batch, last in ((first, "8"), (second, "16")):
        flags = ("--global-batch-size", str(batch), "--exit-interval", last)
        by_samples(corpus, *save, *flags, version=version)
    run = Run.open(tmp_path)
    assert sums(run) == constant_sums(0, 4, 8, 12, 16)
    in_tokens = {0: 0, 4: 4 * first, 8: 8 * first}
    in_tokens |= {12: 8 * first + 4 * second, 16: 8 * first + 8 * second}
    assert tokens(run) == {step: n * SEQ_LENGTH for step, n in in_tokens.items()}
    assert [launch.step for launch in run.launches] == [0, 8]
    assert [launch.batch.global_batch_size for launch in run.launches] == [first, second]
    assert np.all(np.diff(run.x_K("lr-sum")[1:]) > 0)


def branch(trunk: Path, folder: Path) -> tuple[str, ...]:
    return ("--load", str(trunk), "--save", str(folder), "--ckpt-step", "8")


@pytest.fixture(scope="module")
def trunk(corpus: Corpus, tmp_path_factory) -> Path:
    """Eight probed steps at a constant rate, in a checkpoint of the torch_dist format."""
    folder = tmp_path_factory.mktemp("trunk")
    save = ("--save", str(folder), "--ckpt-format", "torch_dist", "--train-iters", "8")
    train(corpus, *CONSTANT, *save, *EVERY_4, *probe(corpus))
    return folder


DIST = ("--ckpt-format", "torch_dist", "--train-iters", "16", *EVERY_4)


def test_a_schedule_that_is_overridden_on_resume_counts_from_there(corpus, trunk, tmp_path):
    new = ("--lr-decay-style", "linear", "--lr-decay-iters", "32", "--lr-warmup-iters", "0")
    override = ("--override-opt_param-scheduler", *probe(corpus, "linear:1"))
    output = train(corpus, *DIST, *branch(trunk, tmp_path), *new, *override)
    run = Run.open(tmp_path)
    # Linear from 3e-3 at step 0 to 3e-4 at step 32: the rate of the step after n steps.
    expected = {8: 8 * RATE}
    for n in range(8, 16):
        expected[n + 1] = expected[n] + 3e-3 - 2.7e-3 * n / 32
    assert sums(run) == pytest.approx(expected, rel=1e-9)
    assert logged_rates(output)[:2] == pytest.approx([3e-3 - 2.7e-3 * n / 32 for n in (9, 10)])
    rate_T = learning_rates(run)
    np.testing.assert_allclose(rate_T, [RATE] * 8 + np.diff(list(expected.values())).tolist())
    before, after = run.launches
    assert (before.step, after.step, after.learning_rate.decay_style) == (0, 8, "linear")
    assert before == Run.open(trunk).launches[0]


def test_an_optimizer_left_behind_keeps_the_sum(corpus, trunk, tmp_path):
    new = ("--lr-decay-style", "linear", "--lr-decay-iters", "32", "--lr-warmup-iters", "4")
    train(
        corpus,
        *DIST,
        *branch(trunk, tmp_path),
        *new,
        "--no-load-optim",
        "--no-load-rng",
        *probe(corpus),
    )
    # The scheduler starts anew: 0, 1/4, 2/4, 3/4 and 4/4 of the peak, then down over 28 steps.
    rates = [RATE * n / 4 for n in range(5)] + [RATE - 2.7e-3 * n / 28 for n in range(1, 4)]
    expected = {8: 8 * RATE, 12: 8 * RATE + sum(rates[:4]), 16: 8 * RATE + sum(rates)}
    assert sums(Run.open(tmp_path)) == pytest.approx(expected, rel=1e-9)


def test_two_branches_have_one_past_and_the_trunk_keeps_its_own(corpus, trunk, tmp_path):
    before = (trunk / "tokscale/run.json").read_bytes()
    for name, batch in (("left", 12), ("right", 16)):
        flags = ("--global-batch-size", str(batch), USE_CHECKPOINT, *CONSTANT)
        train(corpus, *DIST, *branch(trunk, tmp_path / name), *flags, *probe(corpus))
        run = Run.open(tmp_path / name)
        assert sums(run) == constant_sums(8, 12, 16)
        samples = {step: 64 + (step - 8) * batch for step in (8, 12, 16)}
        assert tokens(run) == {step: n * SEQ_LENGTH for step, n in samples.items()}
    assert (trunk / "tokscale/run.json").read_bytes() == before


def test_losses_of_a_branch_in_the_same_directory_are_not_the_trunks(corpus, trunk, tmp_path):
    shutil.copytree(trunk / "tokscale", tmp_path / "tokscale")
    flags = (*DIST, *CONSTANT, *probe(corpus), "--tokscale-dir", str(tmp_path))
    flags = (*flags, "--train-iters", "64", USE_CHECKPOINT)
    first = ("--load", str(trunk), "--exit-interval", "12")
    train(corpus, *flags, *first, "--save", str(tmp_path / "t"))
    at_12 = Run.open(tmp_path).read_losses_at(12)
    train(corpus, *flags, *first, "--save", str(tmp_path / "b"), "--global-batch-size", "4")
    assert not np.array_equal(Run.open(tmp_path).read_losses_at(12), at_12)
    on = ("--load", str(tmp_path / "t"), "--save", str(tmp_path / "t"), "--exit-interval", "16")
    output = train(corpus, *flags, *on)
    assert "from after step 8 are not of the steps that have led to this job's checkpoint" in output
    run = Run.open(tmp_path)
    np.testing.assert_array_equal(run.read_losses_at(12), at_12)
    assert sums(run) == constant_sums(0, 4, 8, 12, 16)
    assert tokens(run) == {step: step * 8 * SEQ_LENGTH for step in (0, 4, 8, 12, 16)}
    with pytest.raises(TokscaleError, match="from sample 64 on a launch of which this directory"):
        Trace.open(tmp_path).sample(64)
    output = train(corpus, *on[:2], *flags, "--exit-interval", "17")
    assert "set aside" not in output


def test_losses_beside_a_checkpoint_without_a_note_are_taken_for_the_runs_with_a_line(
    corpus, tmp_path
):
    flags = (*DIST, *CONSTANT, "--train-iters", "64", "--save", str(tmp_path / "a"))
    train(corpus, *flags, "--exit-interval", "4")
    other = ("--save", str(tmp_path / "b"), *probe(corpus), "--seed", "7", "--exit-interval", "4")
    train(corpus, *flags, *other)
    on = ("--load", str(tmp_path / "a"), "--save", str(tmp_path / "b"), "--exit-interval", "8")
    output = train(corpus, *flags, *on, *probe(corpus))
    assert "does not name its run" in output


def test_tokens_of_another_sequence_length_are_added(corpus, trunk, tmp_path):
    long = tmp_path / "long.safetensors"
    make_probe_set(corpus, long, 2 * SEQ_LENGTH)
    length = ("--seq-length", str(2 * SEQ_LENGTH), "--max-position-embeddings", "64")
    flags = (
        "--tokscale-probe-set",
        str(long),
        "--tokscale-probe-schedule",
        "tokens:list:3072,4096+last",
    )
    train(corpus, *DIST, *branch(trunk, tmp_path / "b"), *length, *CONSTANT, USE_CHECKPOINT, *flags)
    run = Run.open(tmp_path / "b")
    # 8 x 8 x 32 = 2048 tokens by step 8, then 8 x 64 = 512 a step.
    assert tokens(run) == {10: 3072, 12: 4096, 16: 6144}
    assert [launch.seq_length for launch in run.launches] == [32, 64]


def test_a_start_at_step_0_is_a_new_run(corpus, tmp_path):
    save = ("--save", str(tmp_path), "--train-iters", "4", "--save-interval", "9", *probe(corpus))
    old = ("--lr", "1e-2", "--seed", "1", "--global-batch-size", "4")
    train(corpus, *save, *CONSTANT, *old)
    shutil.rmtree(tmp_path / "iter_0000004")
    before = Run.open(tmp_path)
    (tmp_path / "analysis").mkdir()
    (tmp_path / "analysis/fits.parquet").write_text("of the old run")
    train(corpus, *save, *CONSTANT)
    run = Run.open(tmp_path)
    (launch,) = run.launches
    assert (launch.seed, launch.batch.global_batch_size, launch.learning_rate.peak) == (
        1234,
        8,
        RATE,
    )
    assert run.info.run_id != before.info.run_id
    assert sums(run) == constant_sums(0, 4)
    assert run.x_K("lr-sum")[1] == pytest.approx(np.log(4))
    assert not run.paths.analysis.exists()
    kept = tmp_path / "tokscale/abandoned" / before.info.run_id
    assert (kept / "analysis/fits.parquet").read_text() == "of the old run"
    assert json.loads((kept / "run.json").read_text())["launches"][0]["seed"] == 1


def test_a_run_of_an_older_schema_is_refused_and_left_as_it_was(corpus, trunk, tmp_path):
    shutil.copytree(trunk / "tokscale", tmp_path / "tokscale")
    path = tmp_path / "tokscale/run.json"
    path.write_text('{"schema_version": 1, "run_id": "0", "probe_fingerprint": "0", "model": {}}')
    before = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")}
    flags = ("--save", str(tmp_path), *EVERY_4, "--train-iters", "2", *probe(corpus))
    job = run_alone(corpus, *CONSTANT, *flags)
    assert job.returncode == 2
    assert job.stderr.count("megatron-tokscale:") == 1
    assert "run.json is of an older schema" in job.stderr
    assert "its schema version is 1; expected 3" in job.stderr
    assert before == {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")}


def test_a_checkpoint_of_a_probed_run_holds_a_note(trunk):
    note = getattr(read_checkpoint(trunk, 8).args, NOTE)
    assert json.loads(json.dumps(note)) == note
    assert (note["step"], note["samples"], note["tokens"]) == (8, 64, 2048)
    assert note["lr_sum"] == pytest.approx(8 * RATE)
