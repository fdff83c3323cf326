"""The past of a run as its checkpoints tell it; elsewhere unknown, never a guess."""

from argparse import Namespace
from dataclasses import replace

import pytest
from runs import launch, plain_probe_set

from megatron_tokscale.store import LossRecord
from megatron_tokscale.training.history.counts import TrainingCounts
from megatron_tokscale.training.history.past import NOTE, beginning, read_note
from megatron_tokscale.training.history.reckon import past_of_job, reckon, reckon_or_none
from megatron_tokscale.training.history.saved import SavedCheckpoint

RATE = 3e-3


def saved(step, samples, *, num_steps=None, **flags):
    """A checkpoint of a job at a constant rate; `flags` replace its arguments."""
    args = {
        "consumed_train_samples": samples,
        "global_batch_size": 8,
        "micro_batch_size": 2,
        "data_parallel_size": 1,
        "seq_length": 32,
        "train_iters": 100,
        "train_samples": None,
        "lr": RATE,
        "min_lr": RATE / 10,
        "lr_decay_style": "constant",
        "seed": 1234,
    }
    count = samples if num_steps is None else num_steps
    return SavedCheckpoint(step, Namespace(**args | flags), {"num_steps": count})


def chain(*checkpoints):
    past, previous = beginning(0), None
    for checkpoint in checkpoints:
        past, previous = reckon(past, previous, checkpoint), checkpoint
    return past


def test_equal_settings_are_reckoned_step_by_step():
    past = chain(saved(4, 32), saved(10, 80))
    assert (past.tokens, past.tokens_before) == (80 * 32, 72 * 32)
    assert past.lr_sum == pytest.approx(10 * RATE)
    assert [row.step for row in past.launches] == [0]


def test_a_batch_size_that_does_not_give_the_samples_makes_all_unknown():
    past = chain(saved(4, 48))
    assert (past.tokens, past.lr_sum, past.samples) == (None, None, 48)
    later = chain(saved(4, 48), saved(8, 80))
    assert (later.tokens, later.lr_sum) == (None, None)


def test_a_change_of_the_batch_size_is_placed_by_the_samples():
    past = chain(saved(4, 32), saved(8, 96, global_batch_size=16, seq_length=64))
    assert past.tokens == 32 * 32 + 64 * 64
    assert past.lr_sum == pytest.approx(8 * RATE)
    assert [(row.step, row.seq_length) for row in past.launches] == [(0, 32), (4, 64)]


def test_a_change_of_the_rate_that_cannot_be_placed_makes_the_sum_unknown():
    past = chain(saved(4, 32), saved(8, 64, lr_decay_style="linear"))
    assert (past.tokens, past.lr_sum) == (64 * 32, None)
    # Another length of a decay that a constant rate does not have changes no rate.
    past = chain(saved(4, 32), saved(8, 64, train_iters=200))
    assert past.lr_sum == pytest.approx(8 * RATE)


def test_a_change_of_the_sequence_length_that_cannot_be_placed_makes_tokens_unknown():
    past = chain(saved(4, 32), saved(8, 64, seq_length=64))
    assert past.tokens is None
    assert past.lr_sum == pytest.approx(8 * RATE)


def test_a_scheduler_that_starts_anew_is_followed_and_one_that_jumps_is_not():
    warm = {"lr_warmup_iters": 4}
    # 0, 1/4, 2/4, 3/4 of the peak, and the same again.
    past = chain(saved(4, 32, **warm), saved(8, 64, num_steps=32, **warm))
    assert past.lr_sum == pytest.approx(2 * RATE * 1.5)
    assert chain(saved(4, 32, **warm), saved(8, 64, num_steps=48, **warm)).lr_sum is None
    assert chain(saved(4, 32, num_steps=24)).lr_sum is None
    assert chain(saved(4, 32, num_steps=24, fp16=True)).lr_sum == pytest.approx(3 * RATE)


def test_a_schedule_that_was_overridden_says_nothing_of_what_was_before():
    override = {"override_opt_param_scheduler": True}
    assert chain(saved(4, 32, **override)).lr_sum is None
    past = chain(saved(4, 32), saved(8, 96, global_batch_size=16, lr=1e-2, **override))
    assert (past.tokens, past.lr_sum) == (96 * 32, None)


def test_without_the_schedulers_state_the_flags_must_rule_out_skipped_updates():
    def without(**flags):
        return replace(saved(4, 32, **flags), scheduler=None)

    assert chain(without()).lr_sum == pytest.approx(4 * RATE)
    assert chain(without(fp16=True)).lr_sum is None
    assert chain(without(no_load_optim=True)).lr_sum is None


def test_steps_that_were_skipped_apply_no_rate():
    past = chain(saved(4, 32, num_steps=24, skipped_train_samples=8))
    assert (past.tokens, past.lr_sum) == (32 * 32, pytest.approx(3 * RATE))


def note(step, samples, launches, **changes):
    past = replace(beginning(0), step=step, samples=samples, tokens=7, lr_sum=0.5, **changes)
    return TrainingCounts(past, 32).past(step, samples, launches).to_json()


def test_a_note_counts_only_at_its_own_step_and_samples():
    launches = (launch(0), launch(8))
    args = Namespace(**{NOTE: note(8, 64, launches)})
    past = read_note(args, 8, 64)
    assert (past.tokens, past.lr_sum, past.source) == (7, 0.5, "the checkpoint")
    assert past.launches == launches[:1]  # the other has taken no step yet
    assert read_note(args, 9, 64) is None
    assert read_note(args, 8, 72) is None
    for damaged in (None, 3, {}, {"step": 8}, {**note(8, 64, ()), "more": 1}):
        assert read_note(Namespace(**{NOTE: damaged}), 8, 64) is None


def record(step, tokens, lr_sum):
    fingerprint = plain_probe_set(8).fingerprint
    return LossRecord(step, 64, tokens, 0.0, lr_sum, 0.0, 0.0, 0.0, fingerprint, "test")


def test_a_job_takes_its_past_from_the_note_then_the_losses_then_the_settings():
    checkpoint = saved(8, 64)
    setattr(checkpoint.args, NOTE, note(8, 64, (launch(0),)))
    on_disk = record(8, 9, 0.25)
    found = past_of_job(8, 64, checkpoint, on_disk, ())
    assert (found.tokens, found.lr_sum) == (7, 0.5)
    found = past_of_job(8, 64, saved(8, 64), on_disk, (launch(0), launch(8)))
    assert (found.tokens, found.lr_sum, found.launches) == (9, 0.25, (launch(0),))
    found = past_of_job(8, 64, saved(8, 64), None, ())
    assert (found.tokens, found.lr_sum) == (64 * 32, pytest.approx(8 * RATE))
    assert found.source == "reckoned from the checkpoint's settings"
    for unfit in (saved(7, 64), saved(8, 56), None):
        found = past_of_job(8, 64, unfit, record(7, 9, 0.25), ())
        assert (found.tokens, found.lr_sum, found.source) == (None, None, "unknown")
    assert past_of_job(0, 0, checkpoint, on_disk, (launch(0),)) == beginning(0)


def test_a_checkpoint_that_lacks_settings_tells_nothing():
    bare = SavedCheckpoint(8, Namespace(consumed_train_samples=64), None)
    assert reckon_or_none(beginning(0), None, bare) is None
    assert past_of_job(8, 64, bare, None, ()).tokens is None
    assert SavedCheckpoint.from_state_dict({"args": None, "iteration": 8}) is None
    assert SavedCheckpoint.from_state_dict(None) is None
