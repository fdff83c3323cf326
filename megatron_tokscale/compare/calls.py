"""Calls of tokens gained and lost, beyond the noise between seeds, at a false discovery rate.

A candidate is a token that one run has learned and the other has not, with the lower late loss
there. Its z is the difference of the late losses over the standard deviation that two seeds of one
training would show: both runs' own noise, and the variance between seeds in the token's group.

No distribution is assumed for z, whose tails are heavy: seeds learn a token at different times. Its
null distribution is what the noise runs show. The share of noise-run candidates at least as far out
is the token's p-value, which is that of a conformal test (Bates et al. 2023): A has the same
difference to another seed of its own training as to B, if B is such a seed. Benjamini and
Hochberg's procedure (1995) on these p-values is the count of the candidates in B against that in
the noise runs. So 20 calls are the least with one noise run at a rate of 5%, and 10 with two.

Shapes: N tokens, G groups.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from megatron_tokscale.compare.token_table import TokenTable
from megatron_tokscale.core.arrays import Floats, Integers, Mask

RATE: Final = 0.05
"""False discovery rate of the calls."""
_PRIOR_TOKENS: Final = 50
"""Tokens that the variance of the wider group counts as in that of a group (our choice)."""
_MEDIAN_CHI2: Final = 0.4549364
"""Median of the chi-squared distribution with one degree of freedom."""


@dataclass(frozen=True)
class Calls:
    """Candidates of one direction, gained or lost, and the calls among them.

    Attributes:
        candidate_N: true for candidates of B against A.
        seed_SN: the same for each noise run in the place of B, one row per noise run (S).
        z_N: z of the difference, positive where the late loss changes in this direction.
        q_value_N: least false discovery rate at which a candidate is called; 1 for other tokens;
            NaN without noise runs.
        beyond_SN: candidates of the noise runs at least as far out as the last call.
    """

    candidate_N: Mask
    seed_SN: Mask
    z_N: Floats
    q_value_N: Floats
    beyond_SN: Mask

    @property
    def called_N(self) -> Mask:
        """Mask of the calls at `RATE`."""
        return np.asarray(self.q_value_N <= RATE)


def call_changes(
    a: TokenTable, b: TokenTable, noise: Sequence[TokenTable], groups: Sequence[Integers]
) -> tuple[Calls, Calls]:
    """Return the calls of gained tokens and of lost tokens.

    Args:
        a: the baseline.
        b: the other run.
        noise: further seeds of the baseline.
        groups: groups of the tokens, the finest first; each is a part of the next.
    """
    between_N = between_seeds(a, noise, groups)
    z_N = standardized(a, b, between_N)
    seed_z_SN = np.array([standardized(a, each, between_N) for each in noise])
    seed_z_SN = seed_z_SN.reshape(len(noise), len(z_N))
    found = []
    for sign, differ in ((1, gained), (-1, gained_by_first)):
        candidate_N = differ(a, b) & (sign * z_N > 0)
        seed_SN = np.array([differ(a, each) for each in noise], bool).reshape(seed_z_SN.shape)
        seed_SN &= sign * seed_z_SN > 0
        q_value_N = np.full(len(z_N), np.nan)
        beyond_SN = np.zeros_like(seed_SN)
        if len(noise):
            null = sign * seed_z_SN[seed_SN]
            q_value_N[:] = 1
            q_value_N[candidate_N] = q_values(sign * z_N[candidate_N], null, len(noise))
            last = (sign * z_N)[q_value_N <= RATE].min(initial=np.inf)
            beyond_SN = seed_SN & (sign * seed_z_SN >= last)
        found.append(Calls(candidate_N, seed_SN, sign * z_N, q_value_N, beyond_SN))
    return found[0], found[1]


def gained(a: TokenTable, b: TokenTable) -> Mask:
    """Return the mask of the tokens that the second run has learned and the first has not."""
    return np.asarray(b.learned_N & ~a.learned_N)


def gained_by_first(a: TokenTable, b: TokenTable) -> Mask:
    """Return the mask of the tokens that the first run has learned and the second has not."""
    return gained(b, a)


def standardized(a: TokenTable, b: TokenTable, between_N: Floats) -> Floats:
    """Return late loss of A less that of B over the standard deviation of the difference, (N,)."""
    difference_N = a.late_N.astype(np.float64) - b.late_N
    return np.asarray(difference_N / np.sqrt(own_variance(a, b) + between_N))


def own_variance(a: TokenTable, b: TokenTable) -> Floats:
    """Return the variance of the difference of late losses by both runs' own noise, (N,)."""
    return np.asarray(a.variance_N.astype(np.float64) + b.variance_N)


def between_seeds(a: TokenTable, noise: Sequence[TokenTable], groups: Sequence[Integers]) -> Floats:
    """Return the variance of the difference of late losses of two seeds beyond their own noise.

    In a group it is the robust variance of the differences (their median square over that of a
    normal deviate) less the median own variance, at least 0. A group of few tokens takes most of it
    from the next wider group: 50 tokens' worth (our choice).

    Args:
        a: the baseline.
        noise: further seeds of it; without any, the variance is 0.
        groups: groups of the tokens, the finest first; each is a part of the next.

    Returns:
        (N,) in nats^2.
    """
    if not len(noise):
        return np.zeros(len(a.late_N))
    square_SN = np.array([(a.late_N.astype(np.float64) - each.late_N) ** 2 for each in noise])
    own_SN = np.array([own_variance(a, each) for each in noise])
    everything = np.zeros(len(a.late_N), np.int64)
    variance_N = np.zeros(len(a.late_N))
    for level, group_N in enumerate((everything, *reversed(list(groups)))):
        prior = _PRIOR_TOKENS if level else 0
        order = np.argsort(group_N, kind="stable")
        starts = np.flatnonzero(np.diff(group_N[order], prepend=-1))
        for inside in np.split(order, starts[1:]):
            if not len(inside):
                continue
            robust = np.median(square_SN[:, inside]) / _MEDIAN_CHI2
            found = max(float(robust - np.median(own_SN[:, inside])), 0.0)
            share = len(inside) / (len(inside) + prior)
            variance_N[inside] = share * found + (1 - share) * variance_N[inside]
    return variance_N


def q_values(z_J: Floats, null_J: Floats, n_noise: int) -> Floats:
    """Return the least false discovery rate at which each candidate is called.

    The rate of the calls at a threshold is (1 + candidates of the noise runs beyond it) over the
    number of noise runs and over the candidates beyond it. It is the procedure of Benjamini and
    Hochberg on the conformal p-values of all tokens.

    Args:
        z_J: z of the candidates.
        null_J: z of the candidates of all noise runs together.
        n_noise: number of noise runs.
    """
    order = np.argsort(-z_J, kind="stable")
    sorted_J = z_J[order]
    null_sorted = np.sort(null_J)
    beyond_J = len(null_J) - np.searchsorted(null_sorted, sorted_J, side="left")
    # Candidates with equal z are called together: count them all.
    called_J = len(z_J) - np.searchsorted(sorted_J[::-1], sorted_J, side="left")
    rate_J = np.minimum((1 + beyond_J) / n_noise / called_J, 1.0)
    q_J = np.empty(len(z_J))
    q_J[order] = np.minimum.accumulate(rate_J[::-1])[::-1]
    return q_J
