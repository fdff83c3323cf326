"""Mean differences of two losses over the watched documents, by halves of their tokens.

A document's tokens at even positions are one half, those at odd positions the other: two
measurements of the same document, whose agreement tells signal from noise (`reliability.py`). With
a second seed of the reference run, each half is measured by another seed, so that what a seed
shares between the halves is no signal either.

Shapes: N watched tokens, U watched documents of all datasets, W those of one dataset, 2 halves.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final, NamedTuple

import numpy as np

from megatron_tokscale.core.arrays import Floats, Integers, Mask
from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.probe import ProbeSet
from megatron_tokscale.reweight.watched import number_documents, ratio
from megatron_tokscale.store import Run
from megatron_tokscale.store.losses import read_losses

_BLOCK_TOKENS: Final = 2**20  # tokens whose losses are read at once: some 50 MB

QUARTER: Final = 4
"""A fall starts at this fraction of the reference's training, after what all text has in common is
learned; our choice: two octaves, so that the fall is large beside the noise of a checkpoint."""

_NEAREST: Final = 1.5
"""Largest factor between the quarter and its nearest probe; our choice: a fall from a half, or from
an eighth, is of other tokens."""


@dataclass(frozen=True)
class Measurement:
    """The losses of a run at one probe step."""

    run: Run
    step: int


class Pair(NamedTuple):
    """Two measurements of the same tokens, whose difference is a score.

    `second` has the same two by another seed of the run, or is None.
    """

    before: Measurement
    after: Measurement
    second: "Pair | None" = None


@dataclass(frozen=True, eq=False)
class Halves:
    """Differences of two losses over the watched documents of a dataset, in nats.

    Attributes:
        document_W: index in the dataset's .idx, ascending.
        count_W2: tokens of each half whose two losses are finite.
        sum_W2: sum of their differences.
    """

    document_W: Integers
    count_W2: Integers
    sum_W2: Floats

    def rows(self, chosen_W: Mask) -> "Halves":
        """Return the documents in a mask."""
        return Halves(self.document_W[chosen_W], self.count_W2[chosen_W], self.sum_W2[chosen_W])

    def crossed(self, second: "Halves") -> "Halves":
        """Return the first half of these measurements beside the second half of others."""
        count_W2 = np.stack([self.count_W2[:, 0], second.count_W2[:, 1]], axis=1)
        sum_W2 = np.stack([self.sum_W2[:, 0], second.sum_W2[:, 1]], axis=1)
        return Halves(self.document_W, count_W2, sum_W2)

    @cached_property
    def tokens_W(self) -> Floats:
        """Tokens of each document, as floating-point numbers."""
        return self.count_W2.sum(axis=1).astype(np.float64)

    @cached_property
    def mean_W(self) -> Floats:
        """Mean difference of each document in nats per token; NaN without a token."""
        return ratio(self.sum_W2.sum(axis=1), self.tokens_W)

    @cached_property
    def has_both_W(self) -> Mask:
        """True for documents that have a token in each half."""
        return np.asarray((self.count_W2 > 0).all(axis=1))


def fall_steps(run: Run) -> tuple[int, int]:
    """Return the probe steps between which a fall is measured: near a quarter, and the last.

    Raises:
        TokscaleError: no probe is near a quarter of the steps until the last probe.
    """
    last = int(run.step_K[-1])
    earlier = [step for step in run.step_K.tolist() if 0 < step < last]
    wanted = last / QUARTER
    nearest = min(earlier, key=lambda step: abs(np.log(step / wanted)), default=0)
    if not nearest or not wanted / _NEAREST <= nearest <= wanted * _NEAREST:
        there = f"the nearest is step {nearest}" if nearest else "there is none between"
        raise TokscaleError(
            f"{run.path} has no probe near step {wanted:g}, a quarter of the steps until its last "
            f"probe, {last}: {there}; expected one from step {wanted / _NEAREST:.0f} to "
            f"{wanted * _NEAREST:.0f}; probe a checkpoint there too, with --tokscale-replay"
        )
    return nearest, last


def read_pair(pair: Pair, datasets: Sequence[int | None]) -> list[Halves]:
    """Return the differences of a pair over the documents of each dataset, by halves.

    With a second seed the first half is by the first, the second half by the second.

    Raises:
        TokscaleError: a losses file is damaged.
    """
    found = read_halves(pair.before, pair.after, datasets)
    if pair.second is None:
        return found
    others = read_pair(pair.second, datasets)
    return [each.crossed(other) for each, other in zip(found, others, strict=True)]


def read_halves(
    before: Measurement, after: Measurement, datasets: Sequence[int | None]
) -> list[Halves]:
    """Return losses `before` less losses `after` over the documents of each dataset, by halves.

    Losses are read by blocks, each file once.

    Args:
        before: a run at a step.
        after: the same run at a later step, or another run on the same probe set.
        datasets: numbers of the datasets in the probe set; None has no watched documents.

    Raises:
        TokscaleError: a losses file is damaged.
    """
    probe_set: ProbeSet = before.run.probe_set
    key_U, unit_N = number_documents(probe_set)
    half_N = probe_set.position_N & 1
    count_V = np.zeros(2 * len(key_U), np.int64)  # V: both halves of each document
    sum_V = np.zeros(2 * len(key_U))
    paths = [one.run.paths.losses_at(one.step) for one in (before, after)]
    for start in range(0, probe_set.n_tokens, _BLOCK_TOKENS):
        stop = min(start + _BLOCK_TOKENS, probe_set.n_tokens)
        first_N, second_N = (read_losses(path, start, stop).astype(np.float64) for path in paths)
        difference_N = first_N - second_N
        is_finite_N = np.isfinite(difference_N)
        at_N = (2 * unit_N[start:stop] + half_N[start:stop])[is_finite_N]
        count_V += np.bincount(at_N, minlength=count_V.size)
        sum_V += np.bincount(at_N, difference_N[is_finite_N], count_V.size)
    every_document = Halves(key_U & (2**32 - 1), count_V.reshape(-1, 2), sum_V.reshape(-1, 2))
    return [
        every_document.rows(key_U >> 32 == (-1 if dataset is None else dataset))
        for dataset in datasets
    ]
