"""On which steps a probe is taken: a fixed set of points that does not depend on train-iters."""

import math
import re
from dataclasses import dataclass

from megatron_tokscale.errors import TokscaleError

_FORMS = "log:per-octave=8, linear:500, list:0,10,100, last, or several joined by '+'"


@dataclass(frozen=True)
class Schedule:
    """A union of probe points, in steps (optimizer steps completed; 0 is before training).

    - `log:per-octave=P`: 0 and every distinct round(2^(i/P)), i = 0, 1, ...: P per doubling.
    - `linear:E`: 0 and every multiple of E.
    - `list:A,B,...`: just these.
    - `last`: the final step of the job, whatever it is.
    """

    spec: str
    per_octave: tuple[int, ...] = ()
    every: tuple[int, ...] = ()
    listed: frozenset[int] = frozenset()
    last: bool = False

    @staticmethod
    def parse(spec: str) -> "Schedule":
        """Read a schedule such as `log:per-octave=8+last`.

        Raises:
            TokscaleError: the text is not of a known form.
        """
        per_octave: list[int] = []
        every: list[int] = []
        listed: set[int] = set()
        last = False
        for term in spec.replace(" ", "").split("+"):
            if match := re.fullmatch(r"log:per-octave=([1-9]\d*)", term):
                per_octave.append(int(match[1]))
            elif match := re.fullmatch(r"linear:([1-9]\d*)", term):
                every.append(int(match[1]))
            elif match := re.fullmatch(r"list:(\d+(?:,\d+)*)", term):
                listed.update(int(step) for step in match[1].split(","))
            elif term == "last":
                last = True
            else:
                raise TokscaleError(f"probe schedule '{spec}': cannot read '{term}'; use {_FORMS}")
        return Schedule(spec, tuple(per_octave), tuple(every), frozenset(listed), last)

    def is_due(self, step: int, final_step: int | None = None) -> bool:
        """Whether a probe belongs at `step` of a job that ends at `final_step`."""
        return (
            step in self.listed
            or (self.last and step == final_step)
            or any(step % every == 0 for every in self.every)
            or any(_on_log_grid(step, per_octave) for per_octave in self.per_octave)
        )

    def steps(self, final_step: int) -> list[int]:
        """All probe steps from 0 to `final_step`, ascending."""
        return [step for step in range(final_step + 1) if self.is_due(step, final_step)]


def _on_log_grid(step: int, per_octave: int) -> bool:
    """Whether `step` is 0 or round(2^(i/per_octave)) for some whole i >= 0."""
    if step < 2:
        return True
    nearest = round(per_octave * math.log2(step))
    return any(round(2 ** (i / per_octave)) == step for i in (nearest - 1, nearest, nearest + 1))
