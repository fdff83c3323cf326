"""Calls of tokens gained and lost, beyond the noise between seeds, at a false discovery rate.

A candidate is a token that one run has learned and the other has not, with the lower late loss
there. Its z is the difference of the late losses over the standard deviation that two seeds of one
training would show. Its variance has three parts (our choice):

- both runs' own noise (`late_loss.late_variance`);
- what a run's fitted curve moves if its clock is shifted as the learning times of tokens differ
  between seeds, the mean over both runs. A token that B has learned just before the end may be one
  that another seed of A learns just after it; one that B has learned long before is not;
- the variance between seeds in the token's group beyond these two.

No distribution is assumed for z, whose tails are heavy. Its null distribution is what the noise
runs show. The share of noise-run candidates at least as far out is the token's p-value, which is
that of a conformal test (Bates et al. 2023): A has the same difference to another seed of its own
training as to B, if B is such a seed. Benjamini and Hochberg's procedure (1995) on these p-values
is the count of the candidates in B against that in the noise runs. So 20 calls are the least with
one noise run at a rate of 5%, and 10 with two.

Shapes: N tokens, H shifts of the clock, S noise runs, J candidates.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from scipy.stats import norm

from megatron_tokscale.compare.token_table import SHIFTS, TokenTable
from megatron_tokscale.core.arrays import Floats, Integers, Mask

RATE: Final = 0.05
"""False discovery rate of the calls."""
_PRIOR_TOKENS: Final = 50
"""Tokens that the variance of the wider group counts as in that of a group (our choice)."""
_MEDIAN_CHI2: Final = 0.4549364
"""Median of the chi-squared distribution with one degree of freedom."""
_MAD_TO_SD: Final = 1.4826
"""Standard deviation of a normal distribution over its median absolute deviation."""
_QUANTILES: Final = 400  # points at which a normal distribution is averaged


@dataclass(frozen=True)
class Calls:
    """Candidates of one direction, gained or lost, and the calls among them.

    Attributes:
        candidate_N: true for candidates of B against A.
        seed_SN: the same for each noise run in the place of B.
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
    spread = seed_spread(a, noise)
    between_N = between_seeds(a, noise, groups, spread)
    z_N = standardized(a, b, between_N, spread)
    seed_z_SN = np.array([standardized(a, each, between_N, spread) for each in noise])
    seed_z_SN = seed_z_SN.reshape(len(noise), len(z_N))
    gained_SN = np.array([gained(a, each) for each in noise], bool).reshape(seed_z_SN.shape)
    lost_SN = np.array([gained(each, a) for each in noise], bool).reshape(seed_z_SN.shape)
    return (
        _calls(gained(a, b), z_N, gained_SN, seed_z_SN),
        _calls(gained(b, a), -z_N, lost_SN, -seed_z_SN),
    )


def _calls(change_N: Mask, z_N: Floats, seed_change_SN: Mask, seed_z_SN: Floats) -> Calls:
    """Return the calls of one direction, given which tokens change state in it."""
    candidate_N, seed_SN = change_N & (z_N > 0), seed_change_SN & (seed_z_SN > 0)
    if not len(seed_SN):
        return Calls(candidate_N, seed_SN, z_N, np.full(len(z_N), np.nan), seed_SN)
    q_value_N = np.ones(len(z_N))
    q_value_N[candidate_N] = q_values(z_N[candidate_N], seed_z_SN[seed_SN], len(seed_SN))
    last = z_N[q_value_N <= RATE].min(initial=np.inf)
    return Calls(candidate_N, seed_SN, z_N, q_value_N, seed_SN & (seed_z_SN >= last))


def gained(first: TokenTable, second: TokenTable) -> Mask:
    """Return the mask of the tokens that the second run has learned and the first has not."""
    return np.asarray(second.learned_N & ~first.learned_N)


def standardized(a: TokenTable, b: TokenTable, between_N: Floats, spread: float) -> Floats:
    """Return late loss of A less that of B over the standard deviation of the difference, (N,)."""
    difference_N = a.late_N.astype(np.float64) - b.late_N
    return np.asarray(difference_N / np.sqrt(known_variance(a, b, spread) + between_N))


def seed_spread(a: TokenTable, noise: Sequence[TokenTable]) -> float:
    """Return the standard deviation of the difference of a token's learning times in two seeds.

    It is 1.4826 times the median absolute difference over the tokens that are learned in both, in
    units of x, and has the errors of the fits in it. It is 0 without noise runs.
    """
    both = [a.learned_N & each.learned_N & a.moving_N & each.moving_N for each in noise]
    apart = [
        np.abs(a.time_N - each.time_N)[both_N] for each, both_N in zip(noise, both, strict=True)
    ]
    known = np.concatenate([np.zeros(0), *apart])
    return float(_MAD_TO_SD * np.median(known)) if len(known) else 0.0


def known_variance(a: TokenTable, b: TokenTable, spread: float) -> Floats:
    """Return the variance of the difference of late losses by noise and by shifts of the clock.

    The second is the mean square of what a fitted curve moves under a normal shift of the clock.
    The spread is that of the difference of both clocks, so one run's curve moves by all of it if
    the other's stays. It is therefore the mean over the curves of both runs, not their sum.

    Returns:
        (N,) in nats^2.
    """
    squares_NH = (a.moved_NH.astype(np.float64) ** 2 + b.moved_NH.astype(np.float64) ** 2) / 2
    noise_N = a.variance_N.astype(np.float64) + b.variance_N
    return np.asarray(noise_N + squares_NH @ shift_weights(spread))


def shift_weights(spread: float) -> Floats:
    """Return weights (H,) of squares at `SHIFTS` in their mean under a normal shift of the clock.

    The square is 0 without a shift, linear between the shifts and constant beyond them.
    """
    shift_J = spread * norm.ppf((np.arange(_QUANTILES) + 0.5) / _QUANTILES)
    node = np.sort([0.0, *SHIFTS])
    rows = np.eye(len(node))[node != 0]
    return np.array([np.interp(shift_J, node, row).mean() for row in rows])


def between_seeds(
    a: TokenTable, noise: Sequence[TokenTable], groups: Sequence[Integers], spread: float
) -> Floats:
    """Return the variance of the difference of late losses of two seeds beyond `known_variance`.

    In a group it is the robust variance of the differences (their median square over that of a
    normal deviate) less the median known variance, at least 0. A group of few tokens takes most of
    it from the next wider group: 50 tokens' worth (our choice).

    Args:
        a: the baseline.
        noise: further seeds of it; without any, the variance is 0.
        groups: groups of the tokens, the finest first; each is a part of the next.
        spread: standard deviation of the shift of the clock between seeds, in x.

    Returns:
        (N,) in nats^2.
    """
    variance_N = np.zeros(len(a.late_N))
    if not len(noise):
        return variance_N
    square_SN = np.array([(a.late_N.astype(np.float64) - each.late_N) ** 2 for each in noise])
    known_SN = np.array([known_variance(a, each, spread) for each in noise])
    everything = np.zeros(len(a.late_N), np.int64)
    for level, group_N in enumerate((everything, *reversed(list(groups)))):
        prior = _PRIOR_TOKENS if level else 0
        order = np.argsort(group_N, kind="stable")
        starts = np.flatnonzero(np.diff(group_N[order]))
        for inside in np.split(order, starts + 1):
            robust = np.median(square_SN[:, inside]) / _MEDIAN_CHI2
            found = max(float(robust - np.median(known_SN[:, inside])), 0.0)
            share = len(inside) / (len(inside) + prior)
            variance_N[inside] = share * found + (1 - share) * variance_N[inside]
    return variance_N


def q_values(z_J: Floats, null: Floats, n_noise: int) -> Floats:
    """Return the least false discovery rate at which each candidate is called, (J,).

    The rate of the calls at a threshold is (1 + candidates of the noise runs beyond it) over the
    number of noise runs and over the candidates beyond it. It is the procedure of Benjamini and
    Hochberg on the conformal p-values of all tokens.

    Args:
        z_J: z of the candidates.
        null: z of the candidates of all noise runs together.
        n_noise: number of noise runs.
    """
    order = np.argsort(-z_J, kind="stable")
    sorted_J = z_J[order]
    beyond_J = len(null) - np.searchsorted(np.sort(null), sorted_J, side="left")
    # Candidates with equal z are called together: count them all.
    called_J = len(z_J) - np.searchsorted(sorted_J[::-1], sorted_J, side="left")
    rate_J = np.minimum((1 + beyond_J) / n_noise / called_J, 1.0)
    q_value_J = np.empty(len(z_J))
    q_value_J[order] = np.minimum.accumulate(rate_J[::-1])[::-1]
    return q_value_J
