"""The past of steps without the plugin is reckoned from checkpoints, or unknown."""

from pathlib import Path

import numpy as np
import pytest
from jobs import SEQ_LENGTH, Corpus, job_flags, run_forked
from launch_jobs import (
    BY_SAMPLES,
    CONSTANT,
    EVERY_4,
    IN_ITERS,
    RATE,
    by_samples,
    constant_sums,
    logged_rates,
    probe,
    replay,
    sums,
    tokens,
    train,
)
from megatrons import OLD
from recorded_job import start

from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.laws.multi_power.learning_rates import learning_rates
from megatron_tokscale.store import Run, RunPaths
from megatron_tokscale.store.sample_losses import SampleLosses
from megatron_tokscale.training.history.past import NOTE
from megatron_tokscale.training.history.saved import read_checkpoint

pytestmark = pytest.mark.megatron


@pytest.fixture(scope="module")
def stepped(corpus: Corpus, tmp_path_factory) -> Path:
    """Checkpoints of a job without the plugin, of 4 samples in its first step and 16 in others."""
    folder = tmp_path_factory.mktemp("stepped")
    save = ("--save", str(folder), "--save-interval", "2", "--exit-interval", "8")
    steps = ("--step-batch-size-schedule", "0:4 64:16", "--train-samples", "512")
    words = job_flags(
        corpus, *BY_SAMPLES, *save, *steps, without=(*IN_ITERS, "--global-batch-size")
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


def test_a_job_that_resumes_without_a_note_reckons_from_the_checkpoint(corpus, stepped, tmp_path):
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


def test_counts_that_the_last_settings_do_not_explain_are_unknown(corpus, changed, tmp_path):
    save = ("--save", str(tmp_path), "--load", str(changed), "--save-interval", "99")
    save = (*save, "--train-samples", "512", "--exit-interval", "18")
    output = by_samples(corpus, *save, "--global-batch-size", "8", *probe(corpus, "linear:2"))
    run = Run.open(tmp_path)
    assert tokens(run) == {16: None, 18: None}
    assert np.isnan(list(sums(run).values())).all()
    assert "consumed tokens unknown, summed learning rate unknown" in output
    with pytest.raises(TokscaleError, match="has no record of its tokens at step 16"):
        run.x_K("tokens")
    words = (*save, *probe(corpus, "tokens:linear:512"), "--tokscale-dir", str(tmp_path / "t"))
    flags = job_flags(corpus, *BY_SAMPLES, *words, without=IN_ITERS)
    job = start(1, "-m", "megatron_tokscale.pretrain", *flags)
    assert job.code == 2
    (line,) = job.refusals
    assert "counts tokens, and the number consumed by step 16 is unknown" in line
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


def test_a_ramp_up_of_an_older_megatron_is_counted_and_replayed(corpus, tmp_path):
    ramp = ("--rampup-batch-size", "4", "4", "48", "--global-batch-size", "16")
    flags = (*ramp, "--train-samples", "512", "--exit-interval", "8", *EVERY_4)
    recorded = (*probe(corpus), "--tokscale-sample-losses")
    for name, words in (("a", recorded), ("b", ())):
        save = ("--save", str(tmp_path / name))
        by_samples(corpus, *flags, *save, *words, version=OLD[0])
    # 4 samples a step up to 16, 8 up to 32, 12 up to 48 and 16 from there on.
    samples = {0: 0, 4: 16, 6: 32, 8: 32 + 12 + 12}
    run = Run.open(tmp_path / "a")
    assert sums(run) == constant_sums(0, 4, 8)
    assert tokens(run) == {step: samples[step] * SEQ_LENGTH for step in (0, 4, 8)}
    losses = SampleLosses.of_training(RunPaths(tmp_path / "a").samples)
    assert losses.step_sums().n_samples_T.tolist() == [4, 4, 4, 4, 8, 8, 12, 12]
    assert losses.read(1, 8)["sample"].tolist() == list(range(56))
    found = replay(corpus, tmp_path / "b", tmp_path / "c", version=OLD[0])
    assert sums(found) == constant_sums(*found.step_K.tolist())
    assert tokens(found) == {step: samples[step] * SEQ_LENGTH for step in found.step_K.tolist()}
    assert len(found.step_K) > 2


def test_a_ramp_up_that_megatron_ignores_is_not_counted(corpus, tmp_path):
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
    taken = read_checkpoint(tmp_path / "c", 8).scheduler["num_steps"] / 8
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
    output = train(corpus, *SCHEDULES[name], *save, without=IN_ITERS)
    rate_T = learning_rates(Run.open(tmp_path))
    assert len(rate_T) == 8
    # Megatron logs the rate of the next step, to seven digits.
    np.testing.assert_allclose(rate_T[1:], logged_rates(output)[:-1], rtol=1e-6)


def test_a_checkpoint_of_a_run_without_probes_holds_no_note(stepped):
    assert not hasattr(read_checkpoint(stepped, 8).args, NOTE)
