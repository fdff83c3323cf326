"""The state of every token at a probe, from measured losses alone (our choice).

No fit is needed, so a job can tell the states while it trains. A token's drop is not known yet;
what stands in for it is its *fall since the start*: its loss at the first probe (step 0 where that
was probed) less its present loss. An *octave ago* is the last probe at or before half the time.

- learned: at least 80% of its fall since the start had happened an octave ago.
- under way: at least 20% of its fall since the start has happened since then. The fall may still
  go on, so a token whose fall has just ended is under way for one more octave.
- to come: it has not fallen since the start, and the model gives it a probability of at most 1/2.
  Whether it ever falls is not known.
- known: it has not fallen since the start, and its probability is above 1/2.
- forgotten: it stands above its lowest loss so far by at least 20% of its fall to that lowest loss,
  and it is not under way.

A fall or a rise counts if it is at least `LEAST_FALL` and beyond the noise: at least `BEYOND`
standard errors. The noise of a token is estimated from its losses at neighbouring probes since an
octave ago, which a fall between two of them does not inflate (`_noise`).

`ProgressTracker` takes the probes in order and holds a few of them, one or two per tenth of an
octave, so its memory does not grow with the number of probes. What it says is a function of the
probes' times and losses alone: a job that resumes from the files says what the job before said.

Shapes: N watched tokens, K probes that are held, M middle probes of three in a row, D datasets,
S states, G groups of tokens with like losses.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

import numpy as np

from megatron_tokscale.core.arrays import Floats, Floats32, Integers, Integers8

BEGUN: Final = 0.2
"""Share of its fall since the start that makes a token under way, if it is of the last octave."""
BEYOND: Final = 3.0
"""Standard errors that a fall or a rise must exceed; our choice."""
LEAST_FALL: Final = 0.2
"""Least fall or rise, in nats; our choice: the default of --tokscale-fall-threshold."""
KNOWN_BELOW: Final = math.log(2)
"""Loss in nats below which a token that has not fallen is known, as in `fit.classes`."""
SPACING: Final = 2**0.1
"""Least ratio of the times of two probes that are held; a schedule of 8 per octave keeps all."""


class MeasuredState(IntEnum):
    """State of a token by its losses so far; numbers as in `fit.states.TokenState`."""

    UNKNOWN = -1
    KNOWN = 0
    TO_COME = 2
    UNDER_WAY = 3
    LEARNED = 4
    FORGOTTEN = 5

    @property
    def label(self) -> str:
        """The name in JSON and in pages, e.g. "under-way"."""
        return self.name.lower().replace("_", "-")


@dataclass(frozen=True)
class Progress:
    """The states of N tokens at a probe, and what they are taken from.

    Attributes:
        start: time of the first probe, 0 where step 0 was probed.
        octave_ago: time of the last probe at or before half the time.
        time: time of the probe.
        state_N: the `MeasuredState` of each token; unknown where a loss that it needs is not
            finite, and of all tokens until enough probes have been taken to estimate the noise.
        start_N: loss at the first probe, in nats.
        before_N: loss an octave ago.
        loss_N: loss at the probe.
        noise_N: standard deviation of the noise of one loss, in nats; NaN where it is unknown.
    """

    start: float
    octave_ago: float
    time: float
    state_N: Integers8
    start_N: Floats32
    before_N: Floats32
    loss_N: Floats32
    noise_N: Floats32


@dataclass(frozen=True)
class GroupProgress:
    """The progress of a group of tokens: a dataset, or all of them. Losses are nats per token.

    Attributes:
        n_tokens: tokens of the group with finite losses at the three probes.
        loss: their mean loss at the probe.
        fall: their mean loss an octave ago less that at the probe.
        fall_since_start: their mean loss at the first probe less that at the probe.
        share: share of tokens in each state that occurs, among tokens whose state is known; empty
            where no state is.
    """

    n_tokens: int
    loss: float
    fall: float
    fall_since_start: float
    share: dict[MeasuredState, float]

    @property
    def fall_share(self) -> float:
        """Share of the fall since the start that came in the last octave; NaN without a fall."""
        is_fall = self.fall_since_start > 0
        return self.fall / self.fall_since_start if is_fall else math.nan


class ProgressTracker:
    """Takes the losses of probes in the order of their times, and tells the states of tokens."""

    def __init__(self) -> None:
        raise NotImplementedError

    @property
    def time(self) -> float | None:
        """Time of the last probe; None before the first."""
        raise NotImplementedError

    def add(self, time: float, loss_N: Floats32) -> None:
        """Take the losses (nats) of a probe, at a later time than those before."""
        raise NotImplementedError

    def progress(self) -> Progress | None:
        """Return the states at the last probe; None if no probe is at or before half its time."""
        raise NotImplementedError


def held_times(times: Iterable[float]) -> list[float]:
    """Return the times of probes that a tracker needs of all that were taken, ascending."""
    raise NotImplementedError


def by_group(progress: Progress, group_N: Integers, n_groups: int) -> list[GroupProgress]:
    """Return the progress of all tokens, then of the groups 0 to `n_groups` - 1.

    Args:
        progress: the states of N tokens.
        group_N: group of each token, such as its dataset.
        n_groups: number of groups.
    """
    raise NotImplementedError


def most_fallen(progress: Progress, count: int) -> Integers:
    """Return the tokens that fell most since an octave ago, beyond their noise, most first."""
    raise NotImplementedError


def _noise(times: Sequence[float], loss_KN: Sequence[Floats32]) -> Floats | None:
    raise NotImplementedError
