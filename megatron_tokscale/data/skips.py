"""Samples left out of a plan from a sample on, and the draws that take their places.

From draw `first` of a stratum on, a draw of a sample that is left out is replaced by the next draw
of the stratum that the training would not have reached: the draws from `end` on, its planned end,
one after the other, without those of samples that are left out themselves. All other draws stay. A
training that goes on beyond its planned end continues behind the last replacement. So the rule maps
the draws of a stratum one to one onto the draws that are left: no sample is lost, and none is
repeated within the order of the plan.

Several skips of a stratum follow each other: a later one replaces draws of the order that the
earlier ones have made.

Shapes: N draws, H hits (draws that are replaced, and draws behind the end that are passed over).
"""

from typing import Final, Protocol

import numpy as np

from megatron_tokscale.core.arrays import Integers
from megatron_tokscale.data.permutation import epoch_permutation
from megatron_tokscale.data.plan_parts import Skip

_NONE: Final = -1
"""In the place of a draw that no draw is mapped to."""


class Draws(Protocol):
    """A one-to-one map from the draws of a stratum to draws without skips."""

    def draw(self, j: int) -> int:
        """Return the draw that draw j is mapped to."""

    def draws(self, j_N: Integers) -> Integers:
        """Return the draws that some draws are mapped to: `draw` of each, vectorised."""

    def origins(self, draw_N: Integers) -> Integers:
        """Return the draws that are mapped to some draws, the inverse of `draws`; else -1."""

    def reach(self, stop: int) -> int:
        """Return a draw behind all those that the draws before `stop` are mapped to."""


class AllDraws:
    """The draws of a stratum without skips."""

    def draw(self, j: int) -> int:
        """Return j."""
        return j

    def draws(self, j_N: Integers) -> Integers:
        """Return the draws themselves."""
        return j_N

    def origins(self, draw_N: Integers) -> Integers:
        """Return the draws themselves."""
        return draw_N

    def reach(self, stop: int) -> int:
        """Return `stop`."""
        return stop


class SkippedDraws:
    """The draws of a stratum under a skip.

    Args:
        skip: the skip.
        number_S: its samples by their numbers in the stratum, from 0; fewer than the stratum has.
        size: samples of the stratum.
        key: key of the stratum's epoch permutations.
        before: the draws under the skips before this one.

    Attributes:
        n_replaced: draws before the end that are replaced.
    """

    def __init__(
        self, skip: Skip, number_S: Integers, size: int, key: int, before: Draws | None = None
    ) -> None:
        self.skip, self._first, self._end = skip, skip.first, skip.end
        self._number_S, self._size, self._key = number_S, size, key
        self.before = before or AllDraws()
        self._hit_H, self._known = np.empty(0, np.int64), 0
        self.n_replaced = int(np.searchsorted(self._hits(skip.end), skip.end))

    def draw(self, j: int) -> int:
        """Return the draw that draw j is mapped to."""
        if j >= self._end:
            j = int(self._free(np.array([j - self._end + self.n_replaced]))[0])
        elif j >= self._first:
            place = int(np.searchsorted(self._hit_H, j))
            if place < self.n_replaced and self._hit_H[place] == j:
                j = int(self._free(np.array([place]))[0])
        return self.before.draw(j)

    def draws(self, j_N: Integers) -> Integers:
        """Return the draws that some draws are mapped to."""
        n, mapped_N = self.n_replaced, j_N.astype(np.int64)
        is_replaced_N = np.isin(mapped_N, self._hit_H[:n])
        is_behind_N = mapped_N >= self._end
        place_N = np.searchsorted(self._hit_H[:n], mapped_N[is_replaced_N])
        mapped_N[is_replaced_N] = self._free(place_N)
        mapped_N[is_behind_N] = self._free(mapped_N[is_behind_N] - self._end + n)
        return self.before.draws(mapped_N)

    def origins(self, draw_N: Integers) -> Integers:
        """Return the draws that are mapped to some draws; -1 where no draw is."""
        draw_N = self.before.origins(draw_N).copy()
        hit_H = self._hits(int(draw_N.max(initial=0)) + 1)
        is_behind_N = draw_N >= self._end
        n, behind_N = self.n_replaced, draw_N[is_behind_N]
        place_N = behind_N - self._end - (np.searchsorted(hit_H, behind_N) - n)
        draw_N[np.isin(draw_N, hit_H)] = _NONE
        origin_N = self._end + place_N - n
        origin_N[place_N < n] = hit_H[:n][place_N[place_N < n]]
        draw_N[is_behind_N] = np.where(draw_N[is_behind_N] == _NONE, _NONE, origin_N)
        return draw_N

    def reach(self, stop: int) -> int:
        """Return a draw behind all those that the draws before `stop` are mapped to."""
        last = max(stop - self._end, 0) + self.n_replaced - 1
        if last >= 0:
            stop = max(stop, int(self._free(np.array([last]))[0]) + 1)
        return self.before.reach(stop)

    def _free(self, place_N: Integers) -> Integers:
        """Return the draws at some places among those from the end on that are no hits."""
        stop = self._end + int(place_N.max(initial=0)) + 1
        while True:
            behind_H = self._hits(stop)[self.n_replaced :]
            free_H = behind_H - self._end - np.arange(len(behind_H))
            free_N = self._end + place_N + np.searchsorted(free_H, place_N, side="right")
            last = int(free_N.max(initial=0))
            if last < stop:
                return np.asarray(free_N)
            stop = last + 1

    def _hits(self, stop: int) -> Integers:
        """Return the hits, ascending: all those before `stop`, and maybe some behind it."""
        if stop > self._known:
            self._known = max(stop, 2 * self._known)
            n_epochs = -(-self.before.reach(self._known) // self._size)
            permutations = [epoch_permutation(self._size, self._key, e) for e in range(n_epochs)]
            found = [
                epoch * self._size + permutation.positions(self._number_S)
                for epoch, permutation in enumerate(permutations)
            ]
            hit_H = self.before.origins(np.concatenate([np.empty(0, np.int64), *found]))
            hit_H = hit_H[(hit_H >= self._first) & (hit_H < self._known)]
            self._hit_H = np.sort(hit_H)
        return self._hit_H
