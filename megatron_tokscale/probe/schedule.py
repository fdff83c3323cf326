"""The probe schedule: fixed points in steps or consumed tokens after which a probe is taken.

The points are absolute: they do not move when train-iters changes.
"""

import math
import re
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal
from itertools import count, takewhile
from typing import Final, Self

from megatron_tokscale.core.errors import TokscaleError

DEFAULT_SCHEDULE = "log:per-octave=8"  # our choice: neighbouring probes are 9% apart in time
_MOST_PROBES: Final = 10**7  # our choice: a list that still fits in memory; no run has as many
_FORMS = (
    "log:per-octave=8, linear:500, list:0,10,100, each also in consumed tokens as in "
    "tokens:linear:2e9, or first, last, checkpoints, or several joined by '+'"
)
_NUMBER = r"\d+(?:\.\d+)?(?:e\d{1,2})?"


@dataclass(frozen=True, kw_only=True)
class JobPoint:
    """A point of a job at which a probe may be due.

    Attributes:
        step: optimizer steps completed; 0 is before training.
        step_before: step of the previous point, -1 if there was none; None means
            `step` - 1. A job can skip steps between two points (--iterations-to-skip).
        tokens: training tokens consumed.
        tokens_before: tokens consumed at the previous point; -1 before training, so that
            the point of 0 tokens is due at step 0.
        is_last: true if the job ends with this step.
        is_checkpoint: true if a checkpoint is saved at this step.
    """

    step: int
    step_before: int | None = None
    tokens: int = 0
    tokens_before: int = -1
    is_last: bool = False
    is_checkpoint: bool = False


@dataclass(frozen=True)
class Points:
    """A union of sets of whole numbers on a time axis.

    Attributes:
        per_octave: each P stands for 0 and every distinct round(2^(i/P)), i = 0, 1, ...
        every: each E stands for 0 and every multiple of E.
        listed: single numbers, ascending.
    """

    per_octave: tuple[int, ...] = ()
    every: tuple[int, ...] = ()
    listed: tuple[int, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.per_octave or self.every or self.listed)

    def reached(self, before: int, now: int) -> bool:
        """Return whether there is a point p with before < p <= now."""
        n_listed = bisect_right(self.listed, now)
        return (
            any(now // every * every > before for every in self.every)
            or any(_log_floor(now, per_octave) > before for per_octave in self.per_octave)
            or (n_listed > 0 and self.listed[n_listed - 1] > before)
        )

    def up_to(self, end: int) -> Iterator[int]:
        """Yield all points from 0 to `end`, in no order, some more than once."""
        yield from self.listed[: bisect_right(self.listed, end)]
        for every in self.every:
            yield from range(0, end + 1, every)
        for per_octave in self.per_octave:
            yield 0
            powers = (_log_point(i, per_octave) for i in count())
            yield from takewhile(lambda point: point <= end, powers)


@dataclass(frozen=True)
class ProbeSchedule:
    """The rule of the probe steps: a union of points in steps, in consumed tokens, and events.

    - `log:per-octave=P`: 0 and every distinct round(2^(i/P)), i = 0, 1, ...: P per doubling.
    - `linear:E`: 0 and every multiple of E.
    - `list:A,B,...`: the points A, B, ...
    - `tokens:` before one of these: the same points in consumed training tokens; due after the
      first step that reaches the point. Numbers may be written like 2e9 or 2.5e9.
    - `first`: step 0 of a fresh run.
    - `last`: the job's planned last step, its train-iters.
    - `checkpoints`: every step after which the job saves a checkpoint, and the step of the
      checkpoint that it starts from.

    A point in a step that the job skips is due after the next step that it takes.
    """

    spec: str
    in_steps: Points = Points()
    in_tokens: Points = Points()
    first: bool = False
    last: bool = False
    checkpoints: bool = False

    @classmethod
    def parse(cls, spec: str) -> Self:
        """Return the schedule of a text such as `log:per-octave=8+tokens:linear:2e9+last`.

        Raises:
            TokscaleError: the text is not of a known form, or a number is not whole.
        """
        terms = spec.replace(" ", "").split("+")
        events = {term for term in terms if term in ("first", "last", "checkpoints")}
        points = [term for term in terms if term not in events]
        return cls(
            spec,
            _read_points(spec, [term for term in points if not term.startswith("tokens:")]),
            _read_points(spec, [term for term in points if term.startswith("tokens:")]),
            *(event in events for event in ("first", "last", "checkpoints")),
        )

    def is_due(self, point: JobPoint) -> bool:
        """Return whether a probe is due at this point of a job."""
        before = point.step - 1 if point.step_before is None else point.step_before
        return (
            self.in_steps.reached(before, point.step)
            or self.in_tokens.reached(point.tokens_before, point.tokens)
            or (self.first and point.step == 0)
            or (self.last and point.is_last)
            or (self.checkpoints and point.is_checkpoint)
        )

    def steps(
        self, final_step: int, tokens_per_step: int = 0, save_interval: int | None = None
    ) -> list[int]:
        """Return all probe steps of an unbroken job from step 0 to `final_step`, ascending.

        Args:
            final_step: the job's train-iters.
            tokens_per_step: training tokens that a step consumes.
            save_interval: steps from one checkpoint to the next; as in Megatron there is also one
                at the end. None if the job saves no checkpoint.

        Raises:
            TokscaleError: the schedule counts tokens, and `tokens_per_step` is not given; or it has
                more than 10 million probes.
        """
        self._check_number(final_step, tokens_per_step, save_interval)
        due = set(self.in_steps.up_to(final_step))
        due |= self._token_steps(final_step, tokens_per_step)
        if self.first:
            due.add(0)
        if self.last:
            due.add(final_step)
        if self.checkpoints and save_interval and final_step:
            due |= {*range(save_interval, final_step, save_interval), final_step}
        return sorted(due)

    def _check_number(
        self, final_step: int, tokens_per_step: int, save_interval: int | None
    ) -> None:
        """Refuse a schedule whose steps are too many to list."""
        counts = [final_step // every for every in self.in_steps.every]
        counts += [
            min(final_step, final_step * tokens_per_step // every) for every in self.in_tokens.every
        ]
        if self.checkpoints and save_interval:
            counts.append(final_step // save_interval)
        if (most := max(counts, default=0)) > _MOST_PROBES:
            raise TokscaleError(
                f"probe schedule '{self.spec}' has {most:,} probes up to step {final_step:,}; "
                f"expected {_MOST_PROBES:,} at most; space them wider"
            )

    def _token_steps(self, final_step: int, tokens_per_step: int) -> set[int]:
        if not self.in_tokens:
            return set()
        if tokens_per_step <= 0:
            raise TokscaleError(
                f"probe schedule '{self.spec}' counts tokens; the tokens of a step must be given"
            )
        if any(every <= tokens_per_step for every in self.in_tokens.every):
            return set(range(final_step + 1))
        points = self.in_tokens.up_to(final_step * tokens_per_step)
        return {-(-point // tokens_per_step) for point in points}


def _read_points(spec: str, terms: list[str]) -> Points:
    per_octave: list[int] = []
    every: list[int] = []
    listed: set[int] = set()
    for term in terms:
        body = term.removeprefix("tokens:")
        if match := re.fullmatch(r"log:per-octave=([1-9]\d{0,3})", body):
            per_octave.append(int(match[1]))
        elif match := re.fullmatch(f"linear:({_NUMBER})", body):
            every.append(_whole(spec, term, match[1], least=1))
        elif match := re.fullmatch(f"list:({_NUMBER}(?:,{_NUMBER})*)", body):
            listed |= {_whole(spec, term, number) for number in match[1].split(",")}
        else:
            raise TokscaleError(f"probe schedule '{spec}': cannot read '{term}'; use {_FORMS}")
    return Points(tuple(per_octave), tuple(every), tuple(sorted(listed)))


def _whole(spec: str, term: str, text: str, least: int = 0) -> int:
    number = Decimal(text)
    if number != int(number) or number < least:
        raise TokscaleError(
            f"probe schedule '{spec}': cannot read '{term}': {text} is not a whole number of at "
            f"least {least}"
        )
    return int(number)


def _log_point(i: int, per_octave: int) -> int:
    return round(math.pow(2, i / per_octave))


def _log_floor(number: int, per_octave: int) -> int:
    """Return the largest point of the grid 0, round(2^(i/per_octave)) that is <= `number`."""
    if number < 1:
        return 0
    nearest = round(per_octave * math.log2(number))
    near = (_log_point(i, per_octave) for i in range(max(nearest - 1, 0), nearest + 2))
    return max(point for point in near if point <= number)
