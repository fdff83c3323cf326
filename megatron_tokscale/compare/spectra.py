"""The test of two learning-time spectra: paired over documents, and against the seeds of A.

The cumulative sum of a drop-weighted spectrum is the nats per token learned by x. The distance of
two spectra is the root mean square of the difference of their sums over the compared range: the
statistic of Cramer and von Mises, and the energy distance of Szekely and Rizzo (2013) but for a
factor.

- Over documents: if the runs learn alike, A and B may be swapped in any document. The p-value is
  the share of random swaps with at least the measured distance (a sign-flip test).
- Over seeds: B is compared with the mean of A and its noise runs, as one more seed of A would be.
  The ratio of squared distances then has Fisher's distribution with 1 and S degrees of freedom if
  seeds differ in one direction, such as a shift of the clock, and a shorter tail if they differ in
  more (our choice: the first, which is the careful one).

Shapes: N tokens, C bins of x, U units, R resamples (the first is the data as they are), S noise
runs, P swaps.
"""

from collections.abc import Sequence
from typing import Final

import numpy as np
from scipy.stats import f as fisher

from megatron_tokscale.compare.token_table import TokenTable
from megatron_tokscale.core.arrays import Floats
from megatron_tokscale.core.errors import UndefinedError
from megatron_tokscale.core.resampling import Units
from megatron_tokscale.results.comparison import NO_SECOND_SEED, Difference, SpectraTest
from megatron_tokscale.results.estimate import Estimate
from megatron_tokscale.results.verdict import LEVEL
from megatron_tokscale.spectrum.evidence.falls import OCTAVE, intervals
from megatron_tokscale.spectrum.sums import table_of

BIN: Final = OCTAVE / 4
"""Length of a bin of x (our choice): half the spacing of the default schedule's probes."""
SWAPS: Final = 999
"""Draws of the test over documents (our choice): p-values to a thousandth."""


def compare_spectra(
    a: TokenTable,
    b: TokenTable,
    noise: Sequence[TokenTable],
    span: tuple[float, float],
    units: Units,
    weight_RU: Floats,
    seed: int,
) -> SpectraTest:
    """Return the spectra of the runs and the test of their difference.

    Args:
        a: the baseline.
        b: the other run.
        noise: further seeds of the baseline.
        span: the compared range of x.
        units: resampling units.
        weight_RU: their weights.
        seed: seed of the swaps.

    Raises:
        UndefinedError: the range is empty, or no token of A and B is learned in it.
    """
    from_x, to_x = span
    if not from_x < to_x:
        raise UndefinedError("the compared range is empty: the unigram phase lasts to its end")
    edges = intervals(from_x, to_x, BIN)
    tables = [_drops(each, edges, units) for each in (a, b, *noise)]
    a_UC, b_UC, *noise_SUC = tables
    if not (a_UC.any() or b_UC.any()):
        raise UndefinedError("no token is learned in the compared range")
    tokens_U = np.bincount(units.unit_N, minlength=len(units)).astype(np.float64)
    sums = [each.cumsum(axis=1) for each in tables]
    distance_R = _distance(sums[1] - sums[0], tokens_U, weight_RU)
    one = np.ones((1, len(units)))
    p_documents = _swapped(sums[1] - sums[0], tokens_U, seed)
    p_seeds = _among_seeds(sums, tokens_U) if noise else NO_SECOND_SEED
    differ = noise and p_documents <= LEVEL and isinstance(p_seeds, float) and p_seeds <= LEVEL
    per_x = tokens_U.sum() * (edges[1] - edges[0])
    return SpectraTest(
        edges=tuple(edges.tolist()),
        a=tuple((a_UC.sum(axis=0) / per_x).tolist()),
        b=tuple((b_UC.sum(axis=0) / per_x).tolist()),
        noise=tuple(tuple((each.sum(axis=0) / per_x).tolist()) for each in noise_SUC),
        distance=Estimate.from_resamples(distance_R, least=0),
        seeds=tuple(float(_distance(each - sums[0], tokens_U, one)[0]) for each in sums[2:]),
        p_documents=p_documents,
        p_seeds=p_seeds,
        outcome=Difference.DIFFER if differ else Difference.UNDECIDED,
        level=LEVEL,
    )


def _drops(run: TokenTable, edges: Floats, units: Units) -> Floats:
    """Return the drops of the tokens learned in the range by unit and bin, (U, C)."""
    inside_N = (run.time_N >= edges[0]) & (run.time_N <= edges[-1])
    bin_E = np.searchsorted(edges[1:-1], run.time_N[inside_N], side="right")
    shape_UC = (len(units), len(edges) - 1)
    return table_of(shape_UC, units.unit_N[inside_N], bin_E, run.drop_N[inside_N])


def _distance(difference_UC: Floats, tokens_U: Floats, weight_RU: Floats) -> Floats:
    """Return the distance for cumulative differences under each row of weights, (R,)."""
    mean_RC = weight_RU @ difference_UC / (weight_RU @ tokens_U)[:, None]
    return np.asarray(np.sqrt((mean_RC**2).mean(axis=1)))


def _swapped(difference_UC: Floats, tokens_U: Floats, seed: int) -> float:
    """Return the p-value of the distance where the runs are swapped in random units."""
    sign_PU = np.random.default_rng([seed, 3]).choice([-1.0, 1.0], (SWAPS, len(tokens_U)))
    one = np.ones((1, len(tokens_U)))
    squares_P = ((sign_PU @ difference_UC) ** 2).sum(axis=1)
    measured = ((one @ difference_UC) ** 2).sum()
    # Rounding must not put the swap of no unit below the measured distance.
    return float((1 + np.sum(squares_P >= measured * (1 - 1e-12))) / (1 + SWAPS))


def _among_seeds(sums: Sequence[Floats], tokens_U: Floats) -> float:
    """Return the p-value of B among A and its noise runs, given cumulative sums of all runs."""
    total = [each.sum(axis=0) / tokens_U.sum() for each in sums]
    seeds = np.stack([total[0], *total[2:]])
    mean, n_noise = seeds.mean(axis=0), len(seeds) - 1
    within = ((seeds - mean) ** 2).mean(axis=1).sum() / n_noise
    across = ((total[1] - mean) ** 2).mean() / (1 + 1 / len(seeds))
    return float(fisher.sf(across / within, 1, n_noise)) if within > 0 else 0.0
