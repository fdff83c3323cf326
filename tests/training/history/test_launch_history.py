"""A run's record is what happened: not what the flags of the job that goes on with it say."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from jobs import EOD, SEQ_LENGTH, TRAINING, VOCAB_SIZE, Corpus, job_flags, run_alone, run_forked
from megatrons import INSTALLED, OLD, python_path
from recorded_job import start

from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.laws.multi_power.learning_rates import learning_rates
from megatron_tokscale.probe.build import ProbeSettings, build_probe_set
from megatron_tokscale.store import Run
from megatron_tokscale.trace.trace import Trace
from megatron_tokscale.training.history.counts import NOTE
from megatron_tokscale.training.history.reckon import read_saved

pytestmark = pytest.mark.megatron

RATE = 3e-3
CONSTANT = ("--lr-decay-style", "constant", "--lr-warmup-iters", "0", "--lr-decay-iters", "64")
BY_SAMPLES = ("--lr-decay-style", "constant", "--lr-decay-samples", "512")
USE_CHECKPOINT = "--use-checkpoint-opt_param-scheduler"
EVERY_4 = ("--save-interval", "4")
_IN_ITERS = ("--lr-decay-iters", "--lr-warmup-iters")


def train(
    corpus: Corpus, *flags: str, without: tuple[str, ...] = (), version: str = INSTALLED
) -> str:
    words = ("-m", "megatron_tokscale.pretrain", *job_flags(corpus, *flags, without=without))
    return run_forked(1, *words, python_path=python_path(version))


def by_samples(
    corpus: Corpus, *flags: str, without: tuple[str, ...] = (), version: str = INSTALLED
) -> str:
    without = (*_IN_ITERS, *without)
    return train(corpus, *BY_SAMPLES, *flags, without=without, version=version)


def probe(corpus: Corpus, schedule: str = "linear:4") -> tuple[str, ...]:
    return ("--tokscale-probe-set", str(corpus.probe_set), "--tokscale-probe-schedule", schedule)


def replay(corpus: Corpus, folder: Path, out: Path, *flags: str, version: str = INSTALLED) -> Run:
    words = ("--tokscale-probe-set", str(corpus.probe_set), "--tokscale-replay", str(folder))
    flags = ("--tokscale-dir", str(out), "--lr", "1", "--train-iters", "2", *flags)
    train(corpus, *words, *flags, version=version)
    return Run.open(out)


def sums(run: Run) -> dict[int, float]:
    return {record.step: record.lr_sum for record in run.records}


def tokens(run: Run) -> dict[int, int | None]:
    return {record.step: record.consumed_tokens for record in run.records}


def constant_sums(*steps: int) -> object:
    return pytest.approx({step: RATE * step for step in steps}, rel=1e-12)


def make_probe_set(corpus: Corpus, path: Path, seq_length: int) -> None:
    settings = ProbeSettings(
        data_path=corpus.data_path,
        split=TRAINING["--split"],
        seq_length=seq_length,
        vocab_size=VOCAB_SIZE,
        n_tokens=700,
        eod=EOD,
    )
    build_probe_set(settings).save(path)


def logged_rates(output: str) -> list[float]:
    """The learning rate of each step, as Megatron logs it after the step: the next one's."""
    lines = [line for line in output.splitlines() if " learning rate: " in line]
    return [float(line.split(" learning rate: ")[1].split()[0]) for line in lines]


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


def test_a_checkpoint_that_does_not_tell_its_run_is_said_to_be_taken_on_trust(corpus, tmp_path):
    flags = (*DIST, *CONSTANT, "--train-iters", "64", "--save", str(tmp_path / "a"))
    train(corpus, *flags, "--exit-interval", "4")
    other = ("--save", str(tmp_path / "b"), *probe(corpus), "--seed", "7", "--exit-interval", "4")
    train(corpus, *flags, *other)
    on = ("--load", str(tmp_path / "a"), "--save", str(tmp_path / "b"), "--exit-interval", "8")
    output = train(corpus, *flags, *on, *probe(corpus))
    assert "does not tell its run" in output


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
    assert not run.analysis.exists()
    kept = tmp_path / "tokscale/abandoned" / before.info.run_id
    assert (kept / "analysis/fits.parquet").read_text() == "of the old run"
    assert json.loads((kept / "run.json").read_text())["launches"][0]["seed"] == 1


@pytest.fixture(scope="module")
def stepped(corpus: Corpus, tmp_path_factory) -> Path:
    """Checkpoints of a job without the plugin, of 4 samples in its first step and 16 in others."""
    folder = tmp_path_factory.mktemp("stepped")
    save = ("--save", str(folder), "--save-interval", "2", "--exit-interval", "8")
    steps = ("--step-batch-size-schedule", "0:4 64:16", "--train-samples", "512")
    words = job_flags(
        corpus, *BY_SAMPLES, *save, *steps, without=(*_IN_ITERS, "--global-batch-size")
    )
    run_forked(1, "-m", "megatron_tokscale.pretrain", *words)
    return folder


def test_a_replay_follows_the_batch_sizes_of_the_checkpoints(corpus, stepped, tmp_path):
    run = replay(corpus, stepped, tmp_path, "--global-batch-size", "2", "--seed", "7")
    assert sums(run) == constant_sums(*run.step_K.tolist())
    assert run.step_K.tolist() == [1, 2, 4, 6, 8]  # 1: Megatron saves where the batch changes
    samples = {step: 4 + 16 * (step - 1) for step in sums(run)}
    assert tokens(run) == {step: n * SEQ_LENGTH for step, n in samples.items()}
    (launch,) = run.launches
    assert launch.batch.step_batch_size_schedule == "0:4 64:16"
    assert (launch.seed, launch.learning_rate.peak) == (1234, RATE)


def test_a_job_that_goes_on_without_a_note_reckons_from_the_checkpoint(corpus, stepped, tmp_path):
    save = ("--save", str(tmp_path), "--load", str(stepped), "--save-interval", "9")
    flags = ("--train-samples", "512", "--global-batch-size", "16", "--exit-interval", "10")
    output = by_samples(corpus, *save, *flags, *probe(corpus, "linear:2"))
    assert sums(Run.open(tmp_path)) == constant_sums(8, 10)
    told = (
        "consumed tokens 3712, summed learning rate 0.024 (reckoned from the checkpoint's settings)"
    )
    assert told in output


@pytest.fixture(scope="module")
def changed(corpus: Corpus, tmp_path_factory) -> Path:
    """Checkpoints of a run without the plugin that goes on at step 8 with another batch size."""
    folder = tmp_path_factory.mktemp("changed")
    save = ("--save", str(folder), "--load", str(folder), *EVERY_4, "--train-samples", "512")
    by_samples(corpus, *save, "--global-batch-size", "16", "--exit-interval", "8")
    by_samples(corpus, *save, "--global-batch-size", "8", "--exit-interval", "16")
    return folder


def test_a_replay_places_a_change_of_the_batch_size(corpus, changed, tmp_path):
    run = replay(corpus, changed, tmp_path, "--tokscale-probe-schedule", "list:12")
    assert sums(run) == constant_sums(12)
    again = replay(corpus, changed, tmp_path, "--global-batch-size", "2")
    assert sums(again) == constant_sums(4, 8, 12, 16)
    assert tokens(again) == {step: n * 32 for step, n in ((4, 64), (8, 128), (12, 160), (16, 192))}
    assert again.launches == run.launches
    assert [(row.step, row.batch.global_batch_size) for row in run.launches] == [(0, 16), (8, 8)]


def test_what_the_last_settings_do_not_explain_is_unknown(corpus, changed, tmp_path):
    save = ("--save", str(tmp_path), "--load", str(changed), "--save-interval", "99")
    save = (*save, "--train-samples", "512", "--exit-interval", "18")
    output = by_samples(corpus, *save, "--global-batch-size", "8", *probe(corpus, "linear:2"))
    run = Run.open(tmp_path)
    assert tokens(run) == {16: None, 18: None}
    assert np.isnan(list(sums(run).values())).all()
    assert "consumed tokens unknown, summed learning rate unknown" in output
    with pytest.raises(TokscaleError, match="does not know its tokens at step 16"):
        run.x_K("tokens")
    words = (*save, *probe(corpus, "tokens:linear:512"), "--tokscale-dir", str(tmp_path / "t"))
    flags = job_flags(corpus, *BY_SAMPLES, *words, without=_IN_ITERS)
    job = start(1, "-m", "megatron_tokscale.pretrain", *flags)
    assert job.code == 2
    (line,) = job.refusals
    assert "counts tokens, and how many were consumed by step 16 is unknown" in line
    assert not (tmp_path / "t").exists()


def test_a_replay_of_a_probed_run_repeats_its_record_and_keeps_its_launches(corpus, tmp_path):
    save = ("--save", str(tmp_path / "a"), "--save-interval", "3", "--train-iters", "6")
    train(corpus, *save, *probe(corpus, "linear:3"))  # warm-up and cosine
    run = Run.open(tmp_path / "a")
    found = replay(corpus, tmp_path / "a", tmp_path / "b", "--global-batch-size", "4")
    for one, other in zip(found.records, run.records[1:], strict=True):
        names = ("step", "consumed_samples", "consumed_tokens", "lr_sum", "learning_rate")
        assert [getattr(one, name) for name in names] == [getattr(other, name) for name in names]
    assert found.launches == run.launches
    before = (tmp_path / "a/tokscale/run.json").read_bytes()
    replay(corpus, tmp_path / "a", tmp_path / "a", "--global-batch-size", "4")
    assert (tmp_path / "a/tokscale/run.json").read_bytes() == before


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
    assert "its schema version is 1; expected 2" in job.stderr
    assert before == {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")}


def test_a_ramp_up_of_an_older_megatron_is_counted_and_replayed(corpus, tmp_path):
    ramp = ("--rampup-batch-size", "4", "4", "48", "--global-batch-size", "16")
    flags = (*ramp, "--train-samples", "512", "--exit-interval", "8", *EVERY_4)
    for name, words in (("a", probe(corpus)), ("b", ())):
        save = ("--save", str(tmp_path / name))
        by_samples(corpus, *flags, *save, *words, version=OLD[0])
    # 4 samples a step up to 16, 8 up to 32, 12 up to 48 and 16 from there on.
    samples = {0: 0, 4: 16, 6: 32, 8: 32 + 12 + 12}
    run = Run.open(tmp_path / "a")
    assert sums(run) == constant_sums(0, 4, 8)
    assert tokens(run) == {step: samples[step] * SEQ_LENGTH for step in (0, 4, 8)}
    found = replay(corpus, tmp_path / "b", tmp_path / "c", version=OLD[0])
    assert sums(found) == constant_sums(*found.step_K.tolist())
    assert tokens(found) == {step: samples[step] * SEQ_LENGTH for step in found.step_K.tolist()}
    assert len(found.step_K) > 2


def test_a_ramp_up_that_megatron_ignores_is_none(corpus, tmp_path):
    """Megatron-core from 0.18 on: every step has the whole batch."""
    cosine = ("--lr-decay-style", "cosine", "--rampup-batch-size", "2", "2", "40")
    for name, words in (("a", probe(corpus)), ("b", ())):
        save = ("--save", str(tmp_path / name), "--train-iters", "8", *EVERY_4)
        train(corpus, *CONSTANT, *cosine, *save, *words)
    # Half a cosine over 64 steps, from 3e-3 down to 3e-4.
    rate_T = 3e-4 + 2.7e-3 * (1 + np.cos(np.pi * np.arange(8) / 64)) / 2
    run = Run.open(tmp_path / "a")
    np.testing.assert_allclose(learning_rates(run), rate_T, rtol=1e-9)
    found = replay(corpus, tmp_path / "b", tmp_path / "c", "--global-batch-size", "2")
    for known in (run, found):
        assert sums(known)[8] == pytest.approx(rate_T.sum(), rel=1e-9)
        assert tokens(known)[8] == 8 * 8 * SEQ_LENGTH
        assert known.launches[0].planned_samples() == 64


def test_an_update_that_is_skipped_applies_no_rate(corpus, tmp_path):
    skip = ("--iterations-to-skip", "3", "5", "--train-iters", "8", *EVERY_4)
    train(corpus, *CONSTANT, *skip, "--save", str(tmp_path / "a"), *probe(corpus))
    assert sums(Run.open(tmp_path / "a")) == pytest.approx({0: 0, 4: 3 * RATE, 8: 6 * RATE})
    assert tokens(Run.open(tmp_path / "a")) == {0: 0, 4: 1024, 8: 2048}
    overflow = ("--fp16", "--initial-loss-scale", str(2**20), "--hysteresis", "1")
    flags = (*overflow, "--train-iters", "8", *EVERY_4)
    for name, words in (("b", probe(corpus)), ("c", ())):
        train(corpus, *CONSTANT, *flags, "--save", str(tmp_path / name), *words)
    taken = read_saved(tmp_path / "c", 8).scheduler["num_steps"] / 8
    assert 0 < taken < 8
    counted = sums(Run.open(tmp_path / "b"))
    assert counted[8] == pytest.approx(taken * RATE)
    found = sums(replay(corpus, tmp_path / "c", tmp_path / "d", "--fp16"))
    assert found == pytest.approx({step: counted[step] for step in (4, 8)})


SCHEDULES = {
    "samples": ("--lr-decay-samples", "64", "--lr-warmup-samples", "24", "--train-samples", "64"),
    "fraction": ("--lr-warmup-fraction", "0.25", "--lr-warmup-init", "1e-3", "--train-iters", "8"),
    "wsd": (
        *("--lr-decay-style", "WSD", "--lr-wsd-decay-iters", "4", "--lr-wsd-decay-style", "cosine"),
        *("--lr-decay-iters", "8", "--lr-warmup-iters", "2", "--train-iters", "8"),
    ),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_record_tells_the_rate_of_every_step(corpus, tmp_path, name):
    save = ("--tokscale-dir", str(tmp_path), *probe(corpus, "linear:1"))
    output = train(corpus, *SCHEDULES[name], *save, without=_IN_ITERS)
    rate_T = learning_rates(Run.open(tmp_path))
    assert len(rate_T) == 8
    # Megatron logs the rate of the next step, to seven digits.
    np.testing.assert_allclose(rate_T[1:], logged_rates(output)[:-1], rtol=1e-6)


def test_a_checkpoint_holds_a_note_only_where_probes_are_taken(trunk, stepped):
    note = getattr(read_saved(trunk, 8).args, NOTE)
    assert json.loads(json.dumps(note)) == note
    assert (note["step"], note["samples"], note["tokens"]) == (8, 64, 2048)
    assert note["lr_sum"] == pytest.approx(8 * RATE)
    assert not hasattr(read_saved(stepped, 8).args, NOTE)
