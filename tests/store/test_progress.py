"""States of tokens from measured losses, against closed forms and a loop over single tokens.

Shapes: N tokens, K probe steps.
"""

import math
import statistics

import numpy as np
import pytest
from runs import probe_steps

from megatron_tokscale.store.progress import (
    ProgressTracker,
    by_group,
    held_times,
    most_fallen,
)
from megatron_tokscale.store.token_state import TokenState

STEPS = [0, *sorted({round(2 ** (k / 8)) for k in range(8 * 10 + 1)})]  # the default schedule
LAST = STEPS[-1]


def progress_of(steps, loss_NK):
    tracker = ProgressTracker()
    for step, loss_N in zip(steps, np.asarray(loss_NK, np.float32).T, strict=True):
        tracker.add(step, loss_N)
    return tracker.progress()


def falls(*stages):
    """Losses over STEPS that are constant between steps: (from step, loss)."""
    return [next(loss for start, loss in reversed(stages) if step >= start) for step in STEPS]


@pytest.mark.parametrize(
    ("stages", "state"),
    [
        ([(0, 8.0), (100, 1.0)], TokenState.LEARNED),
        ([(0, 8.0), (700, 1.0)], TokenState.UNDER_WAY),
        ([(0, 8.0), (100, 3.0), (700, 1.5)], TokenState.UNDER_WAY),  # 1.5 of 6.5: 23%
        ([(0, 8.0), (100, 3.0), (700, 1.8)], TokenState.LEARNED),  # 1.2 of 6.2: 19%
        ([(0, 8.0)], TokenState.TO_COME),
        ([(0, 8.0), (100, 7.9)], TokenState.TO_COME),  # less than 0.2 nats
        ([(0, 0.6)], TokenState.KNOWN),  # more likely than not
        ([(0, 0.8)], TokenState.TO_COME),
        ([(0, 8.0), (50, 1.0), (300, 2.5)], TokenState.FORGOTTEN),  # 1.5 of 7: 21%
        ([(0, 8.0), (50, 1.0), (300, 2.3)], TokenState.LEARNED),  # 1.3 of 7: 19%
        ([(0, 8.0), (50, 9.5)], TokenState.TO_COME),  # a rare token, which rises at first
        ([(0, 8.0), (50, 9.5), (700, 8.5)], TokenState.UNDER_WAY),
        ([(0, 8.0), (50, 1.0), (300, 5.0), (700, 1.0)], TokenState.UNDER_WAY),
        ([(0, 8.0), (700, math.nan)], TokenState.UNKNOWN),
        ([(0, math.inf), (1, 3.0)], TokenState.UNKNOWN),
    ],
)
def test_a_token_without_noise_has_the_state_of_its_stages(stages, state):
    found = progress_of(STEPS, [falls(*stages), falls((0, 3.0))])
    assert (found.start, found.octave_ago, found.time) == (0, LAST / 2, LAST)
    assert TokenState(found.state_N[0]) is state


def noisy_world(rng, steps, n_tokens=400):
    """Tokens that fall, rise, do both or nothing, with noise of their own."""
    with np.errstate(divide="ignore"):
        x_K = np.log(np.asarray(steps, float))
    loss_NK = np.repeat(rng.uniform(0.2, 9, (n_tokens, 1)), len(steps), axis=1)
    for drop_scale in (4.0, -2.0):
        has_N = rng.random(n_tokens) < 0.5
        drop_N1 = (has_N * rng.uniform(0, 1, n_tokens) * drop_scale)[:, None]
        z_NK = (x_K - rng.uniform(1, 7.5, (n_tokens, 1))) / rng.uniform(0.05, 0.6, (n_tokens, 1))
        loss_NK += drop_N1 * (1 - 1 / (1 + np.exp(-np.clip(z_NK, -60, 60))))
    loss_NK += rng.normal(0, 1, loss_NK.shape) * rng.uniform(0, 0.3, (n_tokens, 1))
    return np.abs(loss_NK).astype(np.float32)


class ByHand:
    """The definitions in `store.progress` for single tokens, from all probes at once."""

    def __init__(self, steps, loss_NK):
        self.times = held_by_hand(list(steps))
        columns = [list(steps).index(time) for time in self.times]
        self.rows = np.asarray(loss_NK, float)[:, columns].tolist()
        self.now = len(self.times) - 1
        self.ago = max(k for k, time in enumerate(self.times) if time <= self.times[-1] / 2)

    def level(self, row, k):
        """The median of three neighbours within a factor of 1.5, and its variance."""
        first = max(min(k - 1, self.now - 2), 0)
        three = self.times[first : first + 3]
        if three[0] == 0 or three[2] > 1.5 * three[0]:
            return row[k], 1.0
        return statistics.median(row[first : first + 3]), 0.449

    def own_noise(self, row):
        """The median departure from the lines between neighbours since an octave ago."""
        found = []
        for k in range(max(min(self.ago - 1, self.now - 5), 0) + 1, self.now):
            if self.times[k - 1] > 0:
                before, at, after = (math.log(time) for time in self.times[k - 1 : k + 2])
                share = (at - before) / (after - before)
                line = row[k - 1] * (1 - share) + row[k + 1] * share
                found.append(abs(row[k] - line) / math.sqrt(1 + share**2 + (1 - share) ** 2))
        return statistics.median(found) / 0.6745

    def states(self):
        own = [self.own_noise(row) for row in self.rows]
        bins = [int(self.level(row, self.now)[0] / 0.25) for row in self.rows]
        found = []
        for row, noise, of in zip(self.rows, own, bins, strict=True):
            like = [each**2 for each, other in zip(own, bins, strict=True) if other == of]
            found.append(self.state(row, math.sqrt((noise**2 + statistics.mean(like)) / 2)))
        return found

    def state(self, row, noise):
        def counts(fall, variance, more=0.0):
            return fall >= max(0.2, (3 * math.sqrt(variance) + more) * noise)

        (end, of_end), (before, of_before) = self.level(row, self.now), self.level(row, self.ago)
        kept = row[1:-1]  # the first probe, like the last, is in no block
        blocks = [statistics.mean(kept[k : k + 8]) for k in range(0, len(kept) - 7, 8)]
        lowest, start = min([*blocks, end]), row[0]
        of_start = 1 if self.times[0] else 0
        has_fallen = counts(start - end, of_start + of_end)
        since = start - end if has_fallen else 0
        if counts(before - end, of_end + of_before) and before - end >= 0.2 * since:
            return TokenState.UNDER_WAY
        depth = math.sqrt(2 * math.log(max(len(blocks), 1)) / 8)
        is_lost = counts(end - lowest, 1 / 8 + of_end, depth)
        is_lost = is_lost and counts(start - lowest, of_start + 1 / 8)
        if is_lost and end - lowest >= 0.2 * (start - lowest):
            return TokenState.FORGOTTEN
        if has_fallen:
            return TokenState.LEARNED
        return TokenState.KNOWN if end < math.log(2) else TokenState.TO_COME


def held_by_hand(steps):
    """All steps but those within 7% of the step held before, and the last."""
    held = steps[:2]
    for step in steps[2:]:
        if held[-1] < 1.07 * held[-2]:
            held = held[:-1]
        held = [*held, step]
    return held


SCHEDULES = {
    "default": STEPS,
    "dense": [0, *range(1, 400)],
    "12 per octave": [0, *sorted({round(2 ** (k / 12)) for k in range(12 * 9)})],
    "sparse": [0, *(2**k for k in range(9)), 512, 1000, 2000, 3000, 4000, 5000, 6000, 7000, 8000],
    "no step 0": STEPS[12:],
    "some": probe_steps(40),
}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_states_are_those_of_a_loop_over_single_tokens(schedule):
    steps = [int(step) for step in SCHEDULES[schedule]]
    loss_NK = noisy_world(np.random.default_rng(1), steps)
    found = progress_of(steps, loss_NK)
    expected = ByHand(steps, loss_NK).states()
    assert [TokenState(state) for state in found.state_N] == expected
    assert len(set(expected)) >= 4, "the world has tokens in most states"


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_probes_that_are_not_held_change_nothing(schedule):
    steps = [int(step) for step in SCHEDULES[schedule]]
    loss_NK = noisy_world(np.random.default_rng(2), steps)
    held = [steps.index(int(time)) for time in held_times(steps)]
    assert held_times(steps) == held_by_hand(steps)
    one, other = progress_of(steps, loss_NK), progress_of(held_times(steps), loss_NK[:, held])
    np.testing.assert_array_equal(one.state_N, other.state_N)
    np.testing.assert_array_equal(one.fall_N, other.fall_N)


def test_a_tracker_holds_no_more_with_more_probes():
    tracker, most = ProgressTracker(), 0
    for step in range(3000):
        tracker.add(step, np.full(3, 5.0, np.float32))
        vectors = {
            id(each)
            for each in (*tracker._losses, tracker._start[1], tracker._lowest_N, tracker._block_N)
        }
        most = max(most, len(vectors - {id(None)}))
    assert 10 <= most <= 17


def test_noise_alone_moves_few_tokens():
    """White noise of 0.5 nats after step 0: at most 0.5% of tokens are in any state but to come."""
    rng = np.random.default_rng(3)
    loss_NK = 4 + 0.5 * rng.standard_normal((20_000, len(STEPS)))
    loss_NK[:, 0] = 4
    state_N = progress_of(STEPS, loss_NK).state_N
    for state in TokenState:
        if state is not TokenState.TO_COME:
            assert (state_N == state).mean() <= 0.005, state.label


def test_a_fall_of_six_times_the_noise_is_seen():
    """Of 2,000 tokens with noise of 0.3 nats that fell by 1.8 in the last octave, 90% are seen."""
    rng = np.random.default_rng(4)
    loss_NK = np.tile(falls((0, 4.0), (700, 2.2)), (2000, 1))
    loss_NK = loss_NK + 0.3 * rng.standard_normal(loss_NK.shape)
    assert (progress_of(STEPS, loss_NK).state_N == TokenState.UNDER_WAY).mean() > 0.9


def test_before_there_are_enough_probes_the_falls_are_told_and_no_state():
    tracker = ProgressTracker()
    assert tracker.progress() is None
    tracker.add(0, np.array([8.0, 8.0], np.float32))
    assert tracker.progress() is None
    tracker.add(1, np.array([7.0, 6.0], np.float32))
    found = tracker.progress()
    assert set(found.state_N.tolist()) == {TokenState.UNKNOWN}
    overall = by_group(found, np.zeros(2, np.int64), 1)[0]
    assert (overall.fall, overall.fall_since_start, overall.share) == (1.5, 1.5, {})
    late = ProgressTracker()
    for step in (100, 120, 150):  # no probe at or before 75
        late.add(step, np.ones(2, np.float32))
    assert late.progress() is None


def test_a_probe_without_a_finite_loss_is_left_out():
    loss_NK = noisy_world(np.random.default_rng(5), STEPS)
    spoilt_NK = np.insert(loss_NK, len(STEPS), np.nan, axis=1)
    found = progress_of([*STEPS, LAST + 1], spoilt_NK)
    assert found.time == LAST
    np.testing.assert_array_equal(found.state_N, progress_of(STEPS, loss_NK).state_N)


def test_the_progress_of_groups_is_that_of_their_tokens():
    rng = np.random.default_rng(6)
    loss_NK = noisy_world(rng, STEPS)
    loss_NK[3, -1] = np.nan
    group_N = rng.integers(0, 3, len(loss_NK))
    group_N[group_N == 1] = 0  # a group without tokens
    found = progress_of(STEPS, loss_NK)
    overall, *groups = by_group(found, group_N, 3)
    ago = STEPS.index(LAST // 2)
    for group, of_N in (
        (overall, group_N >= 0),
        (groups[0], group_N == 0),
        (groups[2], group_N == 2),
    ):
        inside_N = of_N & np.isfinite(loss_NK[:, -1])
        mean_K = loss_NK[inside_N].mean(axis=0, dtype=float)
        assert group.n_tokens == inside_N.sum()
        assert group.loss == pytest.approx(mean_K[-1])
        assert group.fall == pytest.approx(mean_K[ago] - mean_K[-1])
        assert group.fall_share == pytest.approx(
            (mean_K[ago] - mean_K[-1]) / (mean_K[0] - mean_K[-1])
        )
        known_N = of_N & (found.state_N != TokenState.UNKNOWN)
        for state, share in group.share.items():
            assert share == pytest.approx((found.state_N[known_N] == state).mean())
        assert sum(group.share.values()) == pytest.approx(1)
    assert groups[1].n_tokens == 0
    assert math.isnan(groups[1].loss) and groups[1].share == {}


def test_the_most_fallen_tokens_come_in_the_order_of_their_falls():
    ends = [4.0, 7.95, 1.0, math.nan, 2.5, 1.0]
    found = progress_of(STEPS, [falls((0, 8.0), (700, end)) for end in ends])
    assert most_fallen(found, 3).tolist() == [2, 5, 4]
    assert most_fallen(found, 100).tolist() == [2, 5, 4, 0]
    assert most_fallen(found, 0).tolist() == []
