"""The learning order: does a token's rank in one run predict its rank in another?

The prediction must be better than that of the baseline predictors (frequency, bigram, position and
mean loss) alone. The size of the partial correlation counts, not that it differs from zero: in
worlds without steps, in which rare tokens are learned later, it is 0.04 and may differ from zero.

Shapes: N tokens, T distinct values of a variable, P variables, U units, R resamples (the first is
the data as they are).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_tokscale.core.arrays import Floats, Integers, Integers32
from megatron_tokscale.core.errors import UndefinedError
from megatron_tokscale.results.estimate import Estimate
from megatron_tokscale.results.primary import ORDER
from megatron_tokscale.results.transfer import LearningOrder
from megatron_tokscale.results.verdict import ClaimTest

OTHER_RUN = "learning time in the other run"
"""The name of the predictor that is tested."""
_LEAST_TOKENS = 50  # cubics in three or four predictors nearly fit the ranks of fewer (our choice)
_RIDGE = 1e-9  # for ranks in a unit range: keeps the regression solvable for equal predictors


def learning_order(
    source_time_N: Floats,
    target_time_N: Floats,
    baseline: Mapping[str, Floats],
    unit_N: Integers32,
    weight_RU: Floats,
) -> LearningOrder:
    """Test whether learning times in run A predict the order of those in run B.

    Only tokens with a learning time in both runs are used. A resample ranks them anew, each token
    counted as often as it was drawn.

    Args:
        source_time_N: learning times in run A; NaN for a token without one (`learning_times`).
        target_time_N: learning times in run B.
        baseline: baseline predictors by name.
        unit_N: resampling unit of each token.
        weight_RU: weights of the units (`Units.weights`).

    Returns:
        Correlations and explained variances. The explained variances come from linear regressions
        of B's ranks on cubics in the ranks of the baseline predictors, without and with A's ranks;
        the test is on the correlation of A's and B's ranks beyond those cubics.

    Raises:
        UndefinedError: fewer than 50 tokens have a learning time in both runs.
    """
    both_N = np.isfinite(source_time_N) & np.isfinite(target_time_N)
    n_tokens = int(both_N.sum())
    if n_tokens < _LEAST_TOKENS:
        raise UndefinedError(
            f"only {n_tokens} tokens have a learning time in both runs; expected {_LEAST_TOKENS} "
            "or more; watch more tokens"
        )
    # Columns: ranks in B, in A, and by each baseline predictor; then the predictors' squares and
    # cubes.
    columns = [target_time_N, source_time_N, *baseline.values()]
    ranks = [_WeightedRanks.of(column[both_N]) for column in columns]
    covariance_RPP = np.stack(
        [_covariance(ranks, weight_U[unit_N[both_N]]) for weight_U in weight_RU]
    )
    deviation_RP = np.sqrt(np.diagonal(covariance_RPP, axis1=1, axis2=2))
    with np.errstate(divide="ignore", invalid="ignore"):
        spearman_RP = covariance_RPP[:, 0] / (deviation_RP[:, :1] * deviation_RP)
    baseline_R = _explained(covariance_RPP, slice(2, None))
    all_R = _explained(covariance_RPP, slice(1, None))
    partial = Estimate.from_resamples(_partial(covariance_RPP), -1, 1)
    return LearningOrder(
        tokens=n_tokens,
        spearman={
            name: Estimate.from_resamples(spearman_RP[:, p], -1, 1)
            for p, name in enumerate([OTHER_RUN, *baseline], start=1)
        },
        explained_by_baseline=Estimate.from_resamples(baseline_R, 0, 1),
        explained_with_time=Estimate.from_resamples(all_R, 0, 1),
        gain=Estimate.from_resamples(all_R - baseline_R, 0, 1),
        test=ClaimTest.of(ORDER, partial),
    )


@dataclass(frozen=True)
class _WeightedRanks:
    """Order of the values of a column, for its ranks under any weights.

    Attributes:
        tie_N: number of the value of each token, by ascending value.
    """

    tie_N: Integers

    @classmethod
    def of(cls, value_N: Floats) -> "_WeightedRanks":
        """Return the order of a column."""
        return cls(np.unique(value_N, return_inverse=True)[1])

    def under(self, weight_N: Floats) -> Floats:
        """Return the mean ranks of the tokens, each counted by its weight, from -0.5 to 0.5."""
        tied_T = np.bincount(self.tie_N, weight_N)
        rank_T = np.cumsum(tied_T) - tied_T / 2
        return np.asarray(rank_T[self.tie_N] / max(weight_N.sum(), 1e-300) - 0.5)


def _covariance(ranks: Sequence[_WeightedRanks], weight_N: Floats) -> Floats:
    """Return the weighted covariances of ranks, and of the predictors' squares and cubes."""
    if not np.isfinite(weight_N).all() or not weight_N.any():
        size = 3 * len(ranks) - 4
        return np.full((size, size), np.nan)
    rank_NP = np.stack([each.under(weight_N) for each in ranks], axis=1)
    controls_NP = rank_NP[:, 2:]
    value_NP = np.concatenate([rank_NP, controls_NP**2, controls_NP**3], axis=1)
    share_N = weight_N / weight_N.sum()
    value_NP -= share_N @ value_NP
    return np.asarray((value_NP * share_N[:, None]).T @ value_NP)


def _explained(covariance_RPP: Floats, chosen: slice) -> Floats:
    """Return R^2 of the first variable's linear regression on the chosen ones."""
    inner_RPP = covariance_RPP[:, chosen, chosen]
    inner_RPP = inner_RPP + _RIDGE * np.eye(inner_RPP.shape[1])
    with_first_RP = covariance_RPP[:, chosen, 0]
    solution_RP = np.linalg.solve(inner_RPP, with_first_RP[..., None])[..., 0]
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray((solution_RP * with_first_RP).sum(axis=1) / covariance_RPP[:, 0, 0])


def _partial(covariance_RPP: Floats) -> Floats:
    """Return the partial correlation of the first two variables, given the others."""
    inner_RPP = covariance_RPP[:, 2:, 2:]
    inner_RPP = inner_RPP + _RIDGE * np.eye(inner_RPP.shape[1])
    with_both_RP2 = covariance_RPP[:, 2:, :2]
    explained_R22 = with_both_RP2.swapaxes(1, 2) @ np.linalg.solve(inner_RPP, with_both_RP2)
    left_R22 = covariance_RPP[:, :2, :2] - explained_R22
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(
            left_R22[:, 0, 1] / np.sqrt(np.maximum(left_R22[:, 0, 0] * left_R22[:, 1, 1], 0))
        )
