"""The state of every token at a probe, from measured losses alone (our choice).

No fit is needed, so a job can tell the states while it trains. A token's drop is not known yet;
what stands in for it is its *fall since the start*: its loss at the first probe (step 0 where that
was probed) less its present loss. An *octave ago* is the last probe at or before half the time.

- under way: at least 20% of its fall since the start has happened since an octave ago. The fall may
  have just ended: one more octave tells.
- learned: at least 80% of its fall since the start had happened an octave ago.
- to come: it has not fallen since the start, and the model gives it a probability of at most 1/2.
  Whether it ever falls is not known.
- known: it has not fallen since the start, and its probability is above 1/2.
- forgotten: it stands above its lowest loss so far by at least 20% of its fall to that lowest loss,
  and it is not under way. The lowest loss is that of the means of `_BLOCK` probes in a row.

A fall or a rise counts if it is at least `LEAST_FALL` and at least `BEYOND` standard errors. The
noise of a token is estimated from its losses at neighbouring probes since an octave ago; a fall
between two of them does not inflate it (`ProgressTracker._noise`).

What a tracker says is a function of the times and losses of the probes in `held_times` alone: a job
that resumes from the files on disk says what it would have said without the interruption.

Shapes: N watched tokens, n tokens of a part, K probes that are held, M middle probes of three in a
row, G groups of tokens, S numbers of states.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from megatron_tokscale.core.arrays import Floats32, Integers, Integers8, Integers16, Mask
from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.store.losses import read_losses
from megatron_tokscale.store.token_state import BEGUN, KNOWN_BELOW, TokenState

BEYOND: Final = 3.0
"""Standard errors that a fall or a rise must reach; our choice."""
LEAST_FALL: Final = 0.2
"""Least fall or rise in nats; our choice: the default of --tokscale-fall-threshold."""

_SPACING: Final = 1.07
"""Least ratio of the times of two probes that are held: a tenth of an octave, so that a schedule
of up to 10 probes per octave is held whole."""
_NEAR: Final = 1.5
"""Largest ratio of the times of three probes whose losses make one level: four probes per octave
have it. Our choice."""
_LEAST_PROBES: Final = 5
"""Least number of probes after time 0 that give an estimate of the noise; our choice."""
_OF_MEDIAN: Final = 0.449
"""Variance of the median of three normal numbers of variance 1."""
_MEDIAN_OF_NORMAL: Final = 0.6745
"""Median of the absolute value of a normal number of variance 1."""
_LIKE: Final = 0.25
"""Range of losses in nats within which tokens share an estimate of their noise; our choice."""
_GROUPS: Final = 128  # such ranges; the last has all losses above
_BLOCK: Final = 8
"""Probes in a row whose mean loss may be a token's lowest: an octave of the default schedule."""
_CHUNK: Final = 2**14  # tokens whose departures fit into a CPU's cache


@dataclass(frozen=True)
class Progress:
    """The states of N tokens at a probe, and the losses that they are taken from, in nats.

    Attributes:
        start: time of the first probe; 0 where step 0 was probed.
        octave_ago: time of the last probe at or before half the time.
        time: time of the probe.
        state_N: the `TokenState` of each token; unknown where a loss that it needs is not
            finite, and of all tokens until there are enough probes to estimate the noise.
        start_N: losses at the first probe.
        before_N: losses an octave ago.
        loss_N: losses at the probe.
        level_N: losses at the probe with less noise: the medians of three neighbouring probes.
        fall_N: falls of these levels since an octave ago; 0 where the fall does not count.
    """

    start: float
    octave_ago: float
    time: float
    state_N: Integers8
    start_N: Floats32
    before_N: Floats32
    loss_N: Floats32
    level_N: Floats32
    fall_N: Floats32


@dataclass(frozen=True)
class GroupProgress:
    """The progress of a group of tokens: a dataset, or all of them.

    Attributes:
        n_tokens: tokens of the group with finite losses at the first probe, an octave ago and now.
        loss: their mean loss now, in nats per token; NaN without tokens, as the falls are.
        fall: their mean loss an octave ago less that now.
        fall_since_start: their mean loss at the first probe less that now.
        share: share of tokens in each state but "unknown", of those whose state is not unknown;
            empty where all are unknown.
    """

    n_tokens: int
    loss: float
    fall: float
    fall_since_start: float
    share: dict[TokenState, float]

    @property
    def fall_share(self) -> float:
        """Share of the fall since the start that came in the last octave; NaN without a fall."""
        return self.fall / self.fall_since_start if self.fall_since_start > 0 else math.nan


class ProgressTracker:
    """Takes the losses of probes in the order of their times, and tells the states of tokens.

    It holds the losses of the first probe, of the probes since an octave ago (at most one per tenth
    of an octave), and each token's lowest mean: at most 17 vectors, whatever the number of probes.
    """

    def __init__(self) -> None:
        self._times: list[float] = []
        self._losses: list[Floats32] = []
        self._start: tuple[float, Floats32] | None = None
        self._block_N: Floats32 | None = None  # sum of the losses of the present block
        self._n_blocked = 0  # probes in all blocks
        self._lowest_N: Floats32 | None = None  # lowest mean of a block

    @property
    def time(self) -> float | None:
        """Time of the last probe; None before the first."""
        return self._times[-1] if self._times else None

    def add(self, time: float, loss_N: Floats32) -> None:
        """Take the losses (nats) of a probe at a later time than those before; no copy is made.

        A probe without any finite loss, as after a divergence, is left out.
        """
        if not np.isfinite(loss_N).any():
            return
        if len(self._times) > 1 and not _is_held(self._times[-1], self._times[-2]):
            del self._times[-1], self._losses[-1]
        elif len(self._times) > 1:
            self._add_to_block(self._losses[-1])
        self._start = self._start or (time, loss_N)
        self._times.append(time)
        self._losses.append(loss_N)
        before = self._octave_ago()
        if before is not None:
            unneeded = max(min(before - 1, len(self._times) - _LEAST_PROBES - 1), 0)
            del self._times[:unneeded], self._losses[:unneeded]

    def progress(self) -> Progress | None:
        """Return the states at the last probe; None if no probe is at or before half its time."""
        before, now = self._octave_ago(), len(self._times) - 1
        if self._start is None or before is None:
            return None
        start, start_N = self._start
        before_level_N, variance_before = self._level(before)
        level_N, variance = self._level(now)
        lowest_N = level_N if self._lowest_N is None else np.fmin(self._lowest_N, level_N)
        at_start = 0.0 if start == 0 else 1.0  # before training there is no noise of training
        of_lowest = 1 / _BLOCK
        noise_N = self._noise(level_N)

        def counting(fall_N: Floats32, variance: float, more: float = 0.0) -> Floats32:
            """Return the falls that count; 0 for the others."""
            least_N = np.float32(BEYOND * math.sqrt(variance) + more) * noise_N
            is_counted_N = fall_N >= np.maximum(least_N, np.float32(LEAST_FALL))
            return np.where(is_counted_N, fall_N, np.float32(0))

        with np.errstate(invalid="ignore"):  # of losses that are not finite
            fall_N = counting(before_level_N - level_N, variance + variance_before)
            state_N = _states(
                fall_N=fall_N,
                since_start_N=counting(start_N - level_N, variance + at_start),
                to_lowest_N=counting(start_N - lowest_N, of_lowest + at_start),
                rise_N=counting(level_N - lowest_N, variance + of_lowest, self._depth_of_lowest()),
                level_N=level_N,
            )
            is_known_N = np.isfinite(noise_N + start_N + before_level_N + level_N)
            state_N[~is_known_N] = TokenState.UNKNOWN
        return Progress(
            start=start,
            octave_ago=self._times[before],
            time=self._times[now],
            state_N=state_N,
            start_N=start_N,
            before_N=self._losses[before],
            loss_N=self._losses[now],
            level_N=level_N,
            fall_N=fall_N,
        )

    def _octave_ago(self) -> int | None:
        """Return the index of the last probe at or before half the last time; None without one."""
        earlier, half = self._times[:-1], max(self._times, default=0.0) / 2
        return max((k for k, time in enumerate(earlier) if time <= half), default=None)

    def _add_to_block(self, loss_N: Floats32) -> None:
        """Add the losses of a probe that stays held to the present block; close a full one."""
        self._block_N = loss_N if self._block_N is None else self._block_N + loss_N
        self._n_blocked += 1
        if self._n_blocked % _BLOCK == 0:
            mean_N = self._block_N / np.float32(_BLOCK)
            self._lowest_N = mean_N if self._lowest_N is None else np.fmin(self._lowest_N, mean_N)
            self._block_N = None

    def _depth_of_lowest(self) -> float:
        """Return how far the lowest mean of a token that does not move lies below its loss.

        It is in standard deviations of one loss: the lowest of n normal numbers lies at most about
        sqrt(2 ln n) of their standard deviations below their mean.
        """
        return math.sqrt(2 * math.log(max(self._n_blocked // _BLOCK, 1)) / _BLOCK)

    def _level(self, k: int) -> tuple[Floats32, float]:
        """Return the losses at probe `k` with less noise, and how much of the variance is left.

        They are the medians of three neighbouring probes that are near each other, else the losses
        themselves. The last probe has both neighbours before it.
        """
        first = max(min(k - 1, len(self._times) - 3), 0)
        times = self._times[first : first + 3]
        if len(times) < 3 or not 0 < times[2] <= _NEAR * times[0]:
            return self._losses[k], 1.0
        a_N, b_N, c_N = self._losses[first : first + 3]
        return np.maximum(np.minimum(a_N, b_N), np.minimum(np.maximum(a_N, b_N), c_N)), _OF_MEDIAN

    def _noise(self, level_N: Floats32) -> Floats32:
        """Return the standard deviation of the noise of each token's losses, in nats.

        It is NaN of all tokens while there are too few probes. A loss departs from the straight
        line, in ln(time), between the probes before and after it by a known multiple of the noise,
        if the loss without noise is straight there. The median departure of a token is hardly
        moved by a fall between two probes. As it comes from few probes, its square is averaged with
        the mean square of tokens with like losses.
        """
        own_N = np.full(len(level_N), np.nan, np.float32)
        middles = [k for k in range(1, len(self._times) - 1) if self._times[k - 1] > 0]
        if len(middles) < _LEAST_PROBES - 2:
            return own_N
        for start in range(0, len(own_N), _CHUNK):
            part = slice(start, start + _CHUNK)
            own_N[part] = self._median_departures(middles, part)
        variance_N = own_N**2
        return np.sqrt((variance_N + _mean_of_like(variance_N, level_N)) / 2)

    def _median_departures(self, middles: Sequence[int], part: slice) -> Floats32:
        """Return the median departures of tokens from straight lines, as standard deviations.

        Args:
            middles: indices of the M probes that have a probe before and after them.
            part: the tokens.
        """
        departures = []
        for k in middles:
            x0, x1, x2 = np.log(self._times[k - 1 : k + 2])
            weight = (x2 - x1) / (x2 - x0)
            scale = math.sqrt(1 + weight**2 + (1 - weight) ** 2)
            before_n, loss_n, after_n = (each_N[part] for each_N in self._losses[k - 1 : k + 2])
            line_n = np.float32(weight) * before_n + np.float32(1 - weight) * after_n
            departures.append(np.abs(loss_n - line_n) * np.float32(1 / scale))
        return _median(departures) * np.float32(1 / _MEDIAN_OF_NORMAL)


def held_times(times: Iterable[float]) -> list[float]:
    """Return the times of the probes, of all that were taken, on which a tracker's answer depends.

    Args:
        times: ascending times of probes; the last is always in the result.
    """
    held: list[float] = []
    for time in times:
        if len(held) > 1 and not _is_held(held[-1], held[-2]):
            held.pop()
        held.append(time)
    return held


def _is_held(time: float, before: float) -> bool:
    """Return whether a tracker holds a probe that is not the last, given the one held before."""
    return time >= _SPACING * before


def catch_up(tracker: ProgressTracker, files: Mapping[float, Path]) -> dict[float, str]:
    """Let a tracker read the losses files of probes that it has not seen.

    A new tracker reads those of `held_times` alone.

    Args:
        tracker: takes the losses.
        files: losses files by the ascending times of their probes; those up to the tracker's last
            probe are left out.

    Returns:
        Reasons why files could not be read, by time; the tracker continues without them.
    """
    last, unread = tracker.time, dict[float, str]()
    for time in held_times(files) if last is None else [time for time in files if time > last]:
        try:
            tracker.add(time, read_losses(files[time]))
        except TokscaleError as error:
            unread[time] = str(error)
    return unread


def by_group(
    progress: Progress, group_N: Integers | Integers16, n_groups: int
) -> list[GroupProgress]:
    """Return the progress of all tokens, then that of each group.

    Args:
        progress: the states of N tokens.
        group_N: number of the group of each token, such as its dataset.
        n_groups: number of groups.
    """
    losses = (progress.start_N, progress.before_N, progress.loss_N)
    finite_N = np.isfinite(losses[0]) & np.isfinite(losses[1]) & np.isfinite(losses[2])
    counts = [np.bincount(group_N[finite_N], minlength=n_groups)]
    totals = [
        np.bincount(group_N, np.where(finite_N, loss_N, 0), minlength=n_groups) for loss_N in losses
    ]
    n_states = max(TokenState) + 1
    known_N = progress.state_N >= 0
    cell_N = group_N[known_N].astype(np.int64) * n_states + progress.state_N[known_N]
    state_GS = np.bincount(cell_N, minlength=n_groups * n_states).reshape(n_groups, n_states)
    columns = [
        np.concatenate([each_G.sum(axis=0, keepdims=True), each_G])
        for each_G in (*counts, *totals, state_GS)
    ]
    return [_group(*row) for row in zip(*columns, strict=True)]


def _group(
    n_tokens: int, start: float, before: float, loss: float, state_S: Integers
) -> GroupProgress:
    """Return the progress of a group from its number of tokens and its sums."""
    count = n_tokens or math.nan
    known = int(state_S.sum())
    share: dict[TokenState, float] = {
        state: float(state_S[state] / known)
        for state in TokenState
        if known and state is not TokenState.UNKNOWN
    }
    return GroupProgress(
        int(n_tokens),
        float(loss / count),
        float((before - loss) / count),
        float((start - loss) / count),
        share,
    )


def most_fallen(progress: Progress, count: int) -> Integers:
    """Return the tokens whose levels fell most since an octave ago, the largest fall first.

    Falls that do not count are left out, so there may be fewer than `count`.
    """
    count = min(count, len(progress.fall_N))
    largest = np.argpartition(-progress.fall_N, count - 1)[:count] if count else np.zeros(0, int)
    order = largest[np.lexsort((largest, -progress.fall_N[largest]))]
    return np.asarray(order[progress.fall_N[order] > 0], np.int64)


def _states(
    *,
    fall_N: Floats32,
    since_start_N: Floats32,
    to_lowest_N: Floats32,
    rise_N: Floats32,
    level_N: Floats32,
) -> Integers8:
    """Return the states of tokens from falls and rises that are 0 where they do not count.

    Args:
        fall_N: fall since an octave ago.
        since_start_N: fall since the first probe.
        to_lowest_N: fall from the first probe to the lowest level.
        rise_N: rise since the lowest level.
        level_N: present loss.
    """
    conditions: list[tuple[Mask, TokenState]] = [  # the first that holds gives the state
        ((fall_N > 0) & (fall_N >= BEGUN * since_start_N), TokenState.UNDER_WAY),
        (
            (rise_N > 0) & (to_lowest_N > 0) & (rise_N >= BEGUN * to_lowest_N),
            TokenState.FORGOTTEN,
        ),
        (since_start_N > 0, TokenState.LEARNED),
        (level_N < KNOWN_BELOW, TokenState.KNOWN),
    ]
    state_N = np.full(len(level_N), TokenState.TO_COME, np.int8)
    for mask_N, state in reversed(conditions):
        state_N[mask_N] = state
    return state_N


def _mean_of_like(variance_N: Floats32, level_N: Floats32) -> Floats32:
    """Return the mean variance of the tokens whose losses lie in the same `_LIKE` nats."""
    known_N = np.isfinite(variance_N)
    group_N = np.clip(np.nan_to_num(level_N) * np.float32(1 / _LIKE), 0, _GROUPS - 1)
    group_N = group_N.astype(np.int64)
    total_G = np.bincount(group_N, np.where(known_N, variance_N, 0), _GROUPS)
    count_G = np.bincount(group_N, known_N, _GROUPS)
    mean_G = (total_G / np.maximum(count_G, 1)).astype(np.float32)
    return np.asarray(mean_G[group_N])


def _median(rows: list[Floats32]) -> Floats32:
    """Return the median over the rows, by a sorting network: np.median takes ten times as long."""
    for turn in range(len(rows)):
        for i in range(turn % 2, len(rows) - 1, 2):
            rows[i], rows[i + 1] = np.minimum(*rows[i : i + 2]), np.maximum(*rows[i : i + 2])
    return (rows[(len(rows) - 1) // 2] + rows[len(rows) // 2]) / np.float32(2)
