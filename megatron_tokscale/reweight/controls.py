"""Controls: plans that change as much as a policy's without its information.

A relative weight is a weight over the base weight.

Shapes: T stages, Z strata, Y strata of another cut.
"""

from collections.abc import Sequence
from functools import partial
from typing import Final, Literal

import numpy as np

from megatron_tokscale.core.arrays import Floats, Integers
from megatron_tokscale.core.errors import TokscaleError

type Control = Literal["uniform", "permuted", "frequency", "easy-first"]

SIZE_FACTOR: Final = 4.0
"""Strata that exchange relative weights differ in base weight by at most this factor. Our choice:
strata of most blends then exchange across datasets too."""

_DRAWS: Final = 500
"""Permutations that are drawn. Our choice: of so many, one meets both criteria within a few percent
for 16 strata or more."""


def permuted(weights_TZ: Floats, base_Z: Floats, parts: Sequence[slice], seed: int) -> Floats:
    """Return the weights with the relative weights of other strata.

    Every stratum gets the relative weight of another one of about its size, in all stages the same
    one's. Of many such permutations the best of two criteria together is taken: the sum of
    |weight - base weight| is that of the policy, and the change has no covariance with the
    policy's, which a single permutation has by chance.

    Args:
        weights_TZ: the policy's weights.
        base_Z: base weights.
        parts: groups of strata that keep their totals.
        seed: seed of the permutations.

    Raises:
        TokscaleError: no part has two strata.
    """
    result_TZ = weights_TZ.copy()
    generator = np.random.default_rng(seed)
    parts = [part for part in parts if part.stop - part.start > 1]
    if not parts:
        raise TokscaleError(
            "the plan has no two strata that can exchange weights; expected two or more in a "
            "dataset; leave --control permuted out"
        )
    for part in parts:
        own_TZ, own_Z = weights_TZ[:, part], base_Z[part]
        groups = _groups_by_size(own_Z)
        sources = (_derangement(groups, len(own_Z), generator) for _ in range(_DRAWS))
        exchanged = map(partial(_exchanged, own_TZ, own_Z), sources)
        result_TZ[:, part] = min(exchanged, key=partial(_misfit, own_TZ=own_TZ, base_Z=own_Z))
    return result_TZ


def _misfit(drawn_TZ: Floats, own_TZ: Floats, base_Z: Floats) -> float:
    """Return how far permuted weights are from the policy's change, and from no covariance."""
    change, own = np.abs(drawn_TZ - base_Z).sum(), np.abs(own_TZ - base_Z).sum()
    covariance = ((drawn_TZ - base_Z) * (own_TZ - base_Z) / base_Z).sum()
    variance = ((own_TZ - base_Z) ** 2 / base_Z).sum()
    tiny = np.finfo(np.float64).tiny
    return float(abs(change / max(own, tiny) - 1) + abs(covariance) / max(variance, tiny))


def _groups_by_size(base_Z: Floats) -> list[Integers]:
    """Return groups of two strata or more of about equal base weights."""
    order = np.argsort(base_Z, kind="stable")
    groups: list[list[int]] = [[]]
    for z in order.tolist():
        if groups[-1] and base_Z[z] > SIZE_FACTOR * base_Z[groups[-1][0]]:
            groups.append([])
        groups[-1].append(z)
    # One that stands alone joins its neighbours, whatever its size.
    joined: list[list[int]] = []
    for group in groups:
        if joined and (len(group) == 1 or len(joined[-1]) == 1):
            joined[-1] += group
        else:
            joined.append(group)
    return [np.array(group) for group in joined]


def _derangement(
    groups: Sequence[Integers], n_strata: int, generator: np.random.Generator
) -> Integers:
    """Return for each stratum another one of its group: a random cycle through each group."""
    source_Z = np.arange(n_strata)
    for group in groups:
        cycle = generator.permutation(group)
        source_Z[cycle] = np.roll(cycle, 1)
    return source_Z


def _exchanged(weights_TZ: Floats, base_Z: Floats, source_Z: Integers) -> Floats:
    """Return the weights with each stratum's relative weight from another, and the same sums."""
    drawn_TZ = base_Z * (weights_TZ / base_Z)[:, source_Z]
    total_T = weights_TZ.sum(axis=1, keepdims=True)
    return np.asarray(drawn_TZ * (total_T / drawn_TZ.sum(axis=1, keepdims=True)))


def transferred(weights_TZ: Floats, bounds: Floats, other_bounds: Floats) -> Floats:
    """Return the weights of another cut of a dataset, by rank among its ranked tokens.

    Relative weight is a step function of rank, from 0 to 1. A stratum of the other cut has its mean
    over the stratum's own ranks, so that the sums stay.

    Args:
        weights_TZ: weights of the dataset's strata.
        bounds: bounds of these strata, from 0 to 1.
        other_bounds: bounds of the Y strata of the other cut.
    """
    if np.array_equal(bounds, other_bounds):
        return weights_TZ
    low_ZY = np.maximum(bounds[:-1, None], other_bounds[:-1])
    high_ZY = np.minimum(bounds[1:, None], other_bounds[1:])
    part_ZY = np.maximum(high_ZY - low_ZY, 0.0) / np.diff(bounds)[:, None]
    return np.asarray(weights_TZ @ part_ZY)
