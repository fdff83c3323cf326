"""The scored range on planted worlds, and its two ends on curves made by hand.

Shapes: N tokens, K probes.
"""

import math
from dataclasses import replace

import numpy as np
import pytest
from planted_worlds import UNIGRAM_STEP, WORLDS, axis, seeds, text_of
from runs import launch, log_time, write_run
from scipy import stats

from megatron_tokscale.results.scored_range import RangeEnd, RangeStart
from megatron_tokscale.spectrum.scored_range import (
    LEAST_PROBES,
    certain_part,
    label_entropy,
    probe_rates,
    scored_range,
    scored_range_of,
)
from megatron_tokscale.store import Run

X_K = log_time([0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048])
LOSS_K = np.array([8, 7.8, 7.0, 6.4, 5.9, 5.5, 5.2, 5.0, 4.8, 4.6, 4.4, 4.2, 4.0])
CONSTANT_K = np.full(13, 1e-3)


def test_the_entropy_of_uniform_labels_is_the_logarithm_of_their_number():
    assert label_entropy(np.repeat(np.arange(50), 4000)) == pytest.approx(math.log(50), abs=2e-4)


def test_the_correction_removes_most_of_the_bias_of_small_counts():
    share_V = np.arange(1, 401.0) ** -0.5
    share_V /= share_V.sum()
    rng = np.random.default_rng(0)
    drawn = [rng.choice(400, 2000, p=share_V) for _ in range(50)]
    truth = stats.entropy(share_V)
    plain = np.mean([stats.entropy(np.bincount(label_N)) for label_N in drawn])
    corrected = np.mean([label_entropy(label_N) for label_N in drawn])
    assert abs(corrected - truth) < 0.2 * abs(plain - truth)


@pytest.mark.parametrize("world", ["B1", "B2", "B3", "C"])
def test_in_worlds_with_a_unigram_phase_the_range_starts_after_it(world):
    rng = np.random.default_rng(1)
    text, x_K = text_of(6000, rng), axis()
    loss_NK = seeds(WORLDS[world], text, x_K, rng, runs=1)[0]
    entropy = label_entropy(text.label_N)
    assert entropy == pytest.approx(text.entropy, abs=0.1)
    found = scored_range(x_K, loss_NK.mean(axis=0), entropy, np.ones(len(x_K)))
    assert found.start_reason is RangeStart.UNIGRAM_PHASE
    assert math.log(UNIGRAM_STEP) < found.from_x < math.log(8 * UNIGRAM_STEP)
    assert found.to_x == x_K[-1]


def test_the_range_starts_at_the_first_probe_at_the_entropy():
    found = scored_range(X_K, LOSS_K, 5.9, CONSTANT_K)
    assert (found.from_x, found.to_x) == (X_K[4], X_K[-1])
    assert found.holds(X_K).tolist() == [k >= 4 for k in range(13)]
    assert "step 8 to 2048" in found.describe("step")
    assert "5.90 nats" in found.describe("step")


@pytest.mark.parametrize(
    ("entropy", "reason"),
    [
        (None, RangeStart.NO_LABELS),
        (3.0, RangeStart.NEVER_BELOW),
        (4.8, RangeStart.FEW_PROBES),
    ],
)
def test_a_range_without_an_end_of_the_unigram_phase_starts_at_the_first_probe(entropy, reason):
    found = scored_range(X_K, LOSS_K, entropy, CONSTANT_K)
    assert (found.from_x, found.start_reason) == (X_K[1], reason)
    assert str(reason) in found.describe("step")


def test_probes_after_the_rate_has_halved_are_not_scored_and_the_warm_up_is_no_decay():
    rate_K = np.array([0, 0.1, 0.3, 1, 1, 1, 1, 1, 0.9, 0.7, 0.4, 0.6, 0.1])
    found = scored_range(X_K, LOSS_K, None, rate_K)
    assert (found.to_x, found.end_reason) == (X_K[9], RangeEnd.DECAY)


def test_a_decay_that_leaves_too_few_probes_is_scored():
    rate_K = np.where(np.arange(13) < LEAST_PROBES, 1.0, 0.1)
    found = scored_range(X_K, LOSS_K, None, rate_K)
    assert (found.to_x, found.end_reason) == (X_K[-1], RangeEnd.FEW_PROBES)


@pytest.mark.parametrize(
    ("width", "end"), [(0.3, X_K[-1] - 0.6), (np.nan, X_K[-1]), (2.5, X_K[-1])]
)
def test_events_are_certain_up_to_two_widths_before_the_end_unless_little_remains(width, end):
    scored = scored_range(X_K, LOSS_K, 5.9, CONSTANT_K)
    found = certain_part(scored, X_K, width)
    assert (found.from_x, found.to_x) == (scored.from_x, pytest.approx(end))
    assert (found.end_reason is RangeEnd.UNCERTAIN) == (width == 0.3)


def test_most_probes_count_where_checkpoints_are_evenly_spaced():
    x_K = log_time(np.arange(1, 36))
    scored = scored_range(x_K, np.linspace(4, 3, 35), None, np.full(35, np.nan))
    assert certain_part(scored, x_K, 0.6) == scored  # 10 of 35 would remain, and 66% of the range
    assert certain_part(scored, x_K, 0.3).end_reason is RangeEnd.UNCERTAIN  # 19 of 35 remain


def test_a_range_that_ends_before_the_uncertain_events_stays_as_it_is():
    rate_K = np.where(np.arange(13) < 10, 1.0, 0.1)
    scored = scored_range(X_K, LOSS_K, None, rate_K)
    assert certain_part(scored, X_K, 0.3) == scored


def test_without_rates_the_range_ends_at_the_last_probe():
    found = scored_range(X_K, LOSS_K, None, np.full(13, np.nan))
    assert (found.to_x, found.end_reason) == (X_K[-1], RangeEnd.NO_RATES)


def test_rates_come_from_the_schedule_where_a_record_has_none(tmp_path):
    run = write_run(tmp_path / "run", [0, 1, 4, 16, 64, 100], np.ones((16, 6)))
    linear = replace(
        run.launches[0].learning_rate,
        decay_style="linear",
        decay_samples=400.0,
        peak=2e-3,
        minimum=0.0,
    )
    blank = tuple(replace(record, learning_rate=math.nan) for record in run.records)
    info = replace(run.info, launches=(launch(learning_rate=linear),))
    replayed = Run(run.path, info, run.tokens, blank)
    expected_K = 2e-3 * (1 - run.step_K / 100)
    np.testing.assert_allclose(probe_rates(replayed), expected_K)
    assert (probe_rates(run) == 1e-3).all()


def test_a_run_has_the_range_of_its_labels_and_rates(tmp_path):
    run = write_run(tmp_path / "run", np.exp(X_K).round().astype(int), np.ones((16, 13)))
    found = scored_range_of(run, run.x_K(), LOSS_K)
    entropy = label_entropy(run.probe_set.label_N)
    assert found == scored_range(run.x_K(), LOSS_K, entropy, probe_rates(run))
