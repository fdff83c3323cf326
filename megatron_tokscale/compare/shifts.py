"""The factor by which B learns sooner than A: by learning times of tokens, and by late losses.

Both are differences of x, the natural logarithm of time. An interval over documents holds for the
runs at hand. The interval of the recipe adds the spread between seeds: B is compared with the mean
of A and its noise runs, whose variance has one degree of freedom per noise run. With one noise run
such an interval is wide, as Student's t distribution says (our choice: no assumption replaces
further seeds).

Shapes: N tokens, E tokens with a learning time in two runs, K probe steps, G groups, U units,
R resamples (the first is the data as they are), S noise runs.
"""

from collections.abc import Sequence
from typing import Final

import numpy as np
from scipy.stats import t as student

from megatron_tokscale.compare.late_loss import WINDOW, window_weights
from megatron_tokscale.compare.token_table import TokenTable
from megatron_tokscale.core.arrays import Floats, Integers, Integers32, Mask
from megatron_tokscale.core.resampling import Units
from megatron_tokscale.laws.estimates import Z_95
from megatron_tokscale.results.comparison import NO_SECOND_SEED, Sooner
from megatron_tokscale.results.estimate import Estimate, Undefined
from megatron_tokscale.spectrum.evidence.falls import OCTAVE
from megatron_tokscale.spectrum.groups import Groups

MARGIN: Final = OCTAVE / 2
"""Range of x before the common end in which learning times do not count (our choice): a token is
learned behind the end in one of the runs there, and the drop and midpoint of others are uncertain.
Tokens are chosen by the mean of their two times, which does not depend on their difference."""
LEAST_TOKENS: Final = 20
"""Fewest tokens of a median (our choice)."""
WIDEST: Final = 100.0
"""Largest ratio of the ends of a factor's interval (our choice); a wider interval, or one that is
not known, leaves the factor undetermined."""
_LOG_FACTOR_CHUNK: Final = 2**22  # weights of tokens that are sorted out at a time: 32 MB


def comparable(a: TokenTable, b: TokenTable, from_x: float, end: float) -> Mask:
    """Return the mask of the tokens whose learning times in both runs count."""
    mean_N = (a.time_N + b.time_N) / 2
    return np.asarray((mean_N >= from_x) & (mean_N <= end - MARGIN))


def median_sooner(
    a: TokenTable,
    b: TokenTable,
    counted_N: Mask,
    groups: Groups,
    units: Units,
    weight_RU: Floats,
) -> tuple[Floats, Integers]:
    """Return by how much B learns sooner than A in x: the weighted median over tokens, (R, G).

    A token counts by its mean drop in both runs, so that the median is over nats.

    Args:
        a: the baseline.
        b: the other run.
        counted_N: mask of the tokens that count.
        groups: the groups.
        units: resampling units.
        weight_RU: their weights.

    Returns:
        (R, G), NaN for a group of fewer than `LEAST_TOKENS`; and the number of tokens, (G,).
    """
    token_E = np.flatnonzero(counted_N)
    earlier_E = (a.time_N[token_E] - b.time_N[token_E]).astype(np.float64)
    drop_E = (a.drop_N[token_E] + b.drop_N[token_E]).astype(np.float64) / 2
    group_E, unit_E = groups.group_N[token_E], units.unit_N[token_E]
    count_G = np.bincount(group_E, minlength=len(groups.names))
    median_RG = np.full((len(weight_RU), len(groups.names)), np.nan)
    for g in np.flatnonzero(count_G >= LEAST_TOKENS):
        inside = np.flatnonzero(group_E == g)
        inside = inside[np.argsort(earlier_E[inside], kind="stable")]
        median_RG[:, g] = _weighted_medians(
            earlier_E[inside], drop_E[inside], unit_E[inside], weight_RU
        )
    return median_RG, count_G


def _weighted_medians(
    value_E: Floats, drop_E: Floats, unit_E: Integers32, weight_RU: Floats
) -> Floats:
    """Return the median of ascending values under each row of weights times the drops, (R,)."""
    median_R = np.full(len(weight_RU), np.nan)
    rows = max(_LOG_FACTOR_CHUNK // len(value_E), 1)
    for start in range(0, len(weight_RU), rows):
        below_RE = np.cumsum(weight_RU[start : start + rows, unit_E] * drop_E, axis=1)
        for r, below_E in enumerate(below_RE, start):
            if below_E[-1] > 0:  # not so where no unit of the group is drawn, or weights are NaN
                median_R[r] = value_E[np.searchsorted(below_E, below_E[-1] / 2)]
    return median_R


def sooner_at_loss(
    first_RGK: Floats, first_x_K: Floats, second_RGJ: Floats, second_x_J: Floats, end: float
) -> Floats:
    """Return by how much the second run is sooner at a late loss in x, (R, G).

    The run with the lower late loss reached the late loss of the other run before the end; the
    time from there to the end is the result, negative if the first run is the lower one. Losses
    are means over the window before a time, as late losses are.

    Args:
        first_RGK: mean losses of the groups at the first run's probes; NaN for an empty group.
        first_x_K: the clock at these probes.
        second_RGJ: mean losses of the second run at its probes (J).
        second_x_J: the clock at these.
        end: x of the common end.

    Returns:
        NaN where the lower run was never above the late loss of the other one.
    """
    curve = [
        _trailing(loss_RGK, x_K, end)
        for loss_RGK, x_K in ((first_RGK, first_x_K), (second_RGJ, second_x_J))
    ]
    (first_x, first), (second_x, second) = curve
    late_first, late_second = first[..., -1], second[..., -1]
    by_second = end - _last_crossing(second_x, second, late_first)
    by_first = end - _last_crossing(first_x, first, late_second)
    return np.asarray(np.where(late_second <= late_first, by_second, -by_first))


def _trailing(loss_RGK: Floats, x_K: Floats, end: float) -> tuple[Floats, Floats]:
    """Return the probes before the end and the end, and the mean losses over the window before."""
    finite_K = np.isfinite(x_K)
    inner_K = x_K[finite_K]
    at_J = np.append(inner_K[(inner_K >= inner_K[0] + WINDOW) & (inner_K < end - 1e-9)], end)
    return at_J, loss_RGK[..., finite_K] @ window_weights(inner_K, at_J).T


def _last_crossing(x_J: Floats, curve_RGJ: Floats, level_RG: Floats) -> Floats:
    """Return x after which a curve stays at or below a level, (R, G), between points."""
    above_RGJ = curve_RGJ > level_RG[..., None]
    ever_RG = above_RGJ.any(axis=-1)
    last_RG = len(x_J) - 1 - above_RGJ[..., ::-1].argmax(axis=-1)
    left_RG = np.minimum(last_RG, len(x_J) - 2)
    before_RG, after_RG = (
        np.take_along_axis(curve_RGJ, index[..., None], axis=-1)[..., 0]
        for index in (left_RG, left_RG + 1)
    )
    with np.errstate(invalid="ignore", divide="ignore"):
        share_RG = np.clip((before_RG - level_RG) / (before_RG - after_RG), 0, 1)
    x_RG = x_J[left_RG] + share_RG * (x_J[left_RG + 1] - x_J[left_RG])
    return np.where(ever_RG, x_RG, np.nan)


def as_factors(
    tokens_G: Integers,
    sooner_RG: Floats,
    seed_SRG: Sequence[Floats],
    why: str,
    common_RG: Floats | None = None,
) -> list[Sooner]:
    """Return the factors of groups from differences of x; the first group has all tokens.

    Args:
        tokens_G: tokens that each group's factor is measured on.
        sooner_RG: by how much B is sooner than A.
        seed_SRG: by how much each noise run is sooner than A.
        why: reason for a factor that is undefined.
        common_RG: `sooner_RG` with the common noise of checkpoints in its resamples too, for the
            interval of these two runs; by default there is none. Seeds differ by it as well, so the
            interval over seeds has it already.
    """
    common_RG = sooner_RG if common_RG is None else common_RG
    spread_G = _between_seeds(seed_SRG, len(tokens_G))
    if len(seed_SRG):
        spread_G = np.fmax(spread_G, spread_G[0])
    found = []
    for g, tokens in enumerate(tokens_G.tolist()):
        seeds = [each[:, g] for each in seed_SRG]
        value_R = sooner_RG[:, g]
        if not np.isfinite(value_R[0]):
            undefined = Undefined(why)
            found.append(Sooner(tokens, undefined, (), undefined))
            continue
        factors = tuple(float(np.exp(each[0])) for each in seeds)
        recipe = _recipe(value_R, seeds, float(spread_G[g])) if seeds else NO_SECOND_SEED
        factor = _factor(Estimate.from_resamples(common_RG[:, g]))
        found.append(Sooner(tokens, factor, factors, recipe))
    return found


def _between_seeds(seed_SRG: Sequence[Floats], n_groups: int) -> Floats:
    """Return the variance between A (at 0) and its noise runs, (G,); NaN without noise runs."""
    if not len(seed_SRG):
        return np.full(n_groups, np.nan)
    value_SG = np.stack([np.zeros(n_groups), *(each[0] for each in seed_SRG)])
    return np.asarray(value_SG.var(axis=0, ddof=1))


def _recipe(value_R: Floats, seeds: Sequence[Floats], between: float) -> Estimate | Undefined:
    """Return the factor of B against the mean of A and its noise runs, over documents and seeds.

    The variance is that over documents, and that of one seed about the mean of all seeds of A,
    which has one degree of freedom per noise run. The half widths of both, by the normal and by
    Student's distribution, are added in squares (Howe 1974, docs/references.md 11.3). An interval
    with Satterthwaite's degrees of freedom is too short where A and its noise run agree by chance.
    The seeds' variance has the documents' in it as well: the interval is too wide rather than too
    narrow.
    """
    against_R = value_R - sum(seeds) / (len(seeds) + 1)
    drawn_R = against_R[1:][np.isfinite(against_R[1:])]
    if not np.isfinite(against_R[0]) or not np.isfinite(between) or len(drawn_R) < 2:
        return Undefined("a noise run has too few tokens")
    over_documents = float(drawn_R.var(ddof=1))
    over_seeds = between * (1 + 1 / (len(seeds) + 1))
    squares = Z_95**2 * over_documents + float(student.ppf(0.975, len(seeds))) ** 2 * over_seeds
    half = float(np.sqrt(squares))
    value = float(against_R[0])
    return _factor(Estimate(value, value - half, value + half, value))


def _factor(sooner: Estimate) -> Estimate | Undefined:
    """Return the factor of a difference of x, or why its interval does not determine it."""
    if not sooner.has_interval:
        return Undefined("its interval is not known")
    if sooner.high - sooner.low > np.log(WIDEST):
        return Undefined(f"its interval is wider than a factor of {WIDEST:g}")
    ends = (sooner.value, sooner.low, sooner.high, sooner.uncorrected)
    return Estimate(*np.exp(ends).tolist())
