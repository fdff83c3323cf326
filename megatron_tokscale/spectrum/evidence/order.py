"""The learning order: is a token's rank in one run its rank in another, beyond what is plain?

Shapes: N tokens, P variables, U units, R resamples (the first is the data as they are).
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from scipy.stats import rankdata

from megatron_tokscale.core.arrays import Floats, Integers32
from megatron_tokscale.results.estimate import Estimate

_LEAST_TOKENS = 50
_RIDGE = 1e-9


def learning_order(
    source_time_N: Floats,
    target_time_N: Floats,
    plain: Mapping[str, Floats],
    unit_N: Integers32,
    weight_RU: Floats,
) -> dict[str, Any]:
    """Spearman's correlation of the times in run B with those in run A and with plain predictors.

    Over the tokens that have a learning time in both runs. Ranks are those among all of these; only
    the tokens' weights are resampled.

    Args:
        source_time_N: learning times in run A, NaN for none (`learning_times`).
        target_time_N: in run B.
        plain: what is known without learning times, by name.
        unit_N: resampling unit of each token.
        weight_RU: weights of the units (`Units.weights`).

    Returns:
        tokens; spearman by predictor; the share of the variance of B's ranks that cubics in the
        plain predictors' ranks explain together, that these and A's ranks explain, and the
        difference, which is never negative; `partial`, the correlation of B's ranks with A's beyond
        those cubics, and whether its whole interval is above zero (`passes`). Null below 50 tokens.
    """
    both_N = np.isfinite(source_time_N) & np.isfinite(target_time_N)
    names = ["learning time in the other run", *plain]
    if both_N.sum() < _LEAST_TOKENS:
        return {"tokens": int(both_N.sum()), "spearman": None, "passes": None}
    columns = [target_time_N, source_time_N, *plain.values()]
    rank_NP = np.stack([rankdata(column[both_N]) for column in columns], axis=1)
    rank_NP = rank_NP / len(rank_NP) - 0.5
    controls_NP = rank_NP[:, 2:]
    value_NP = np.concatenate([rank_NP, controls_NP**2, controls_NP**3], axis=1)
    covariance_RPP = _covariances(value_NP, unit_N[both_N], weight_RU)
    deviation_RP = np.sqrt(np.diagonal(covariance_RPP, axis1=1, axis2=2))
    with np.errstate(divide="ignore", invalid="ignore"):
        spearman_RP = covariance_RPP[:, 0] / (deviation_RP[:, :1] * deviation_RP)
    plain_R = _explained(covariance_RPP, slice(2, None))
    all_R = _explained(covariance_RPP, slice(1, None))
    partial = Estimate.from_resamples(_partial(covariance_RPP), -1, 1)
    return {
        "tokens": int(both_N.sum()),
        "spearman": {
            name: Estimate.from_resamples(spearman_RP[:, p], -1, 1).entry("value")
            for p, name in enumerate(names, start=1)
        },
        **Estimate.from_resamples(plain_R, 0, 1).entry("explained_by_plain"),
        **Estimate.from_resamples(all_R, 0, 1).entry("explained_with_time"),
        **Estimate.from_resamples(all_R - plain_R, 0, 1).entry("gain"),
        **partial.entry("partial"),
        "passes": bool(partial.low > 0) if np.isfinite(partial.low) else None,
    }


def _covariances(value_NP: Floats, unit_N: Integers32, weight_RU: Floats) -> Floats:
    """Weighted covariances of each resample."""
    order = np.argsort(unit_N, kind="stable")
    ends = np.searchsorted(unit_N[order], np.arange(1, weight_RU.shape[1]))
    parts = np.split(value_NP[order], ends)
    count_R = weight_RU @ np.array([len(part) for part in parts], dtype=np.float64)
    mean_RP = weight_RU @ np.stack([part.sum(axis=0) for part in parts]) / count_R[:, None]
    moment_UPP = np.stack([part.T @ part for part in parts])
    moment_RPP = np.tensordot(weight_RU, moment_UPP, axes=1) / count_R[:, None, None]
    return np.asarray(moment_RPP - mean_RP[:, :, None] * mean_RP[:, None, :])


def _explained(covariance_RPP: Floats, chosen: slice) -> Floats:
    """R^2 of the first variable's linear regression on the chosen ones."""
    inner_RPP = covariance_RPP[:, chosen, chosen]
    inner_RPP = inner_RPP + _RIDGE * np.eye(inner_RPP.shape[1])
    with_first_RP = covariance_RPP[:, chosen, 0]
    solution_RP = np.linalg.solve(inner_RPP, with_first_RP[..., None])[..., 0]
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray((solution_RP * with_first_RP).sum(axis=1) / covariance_RPP[:, 0, 0])


def _partial(covariance_RPP: Floats) -> Floats:
    """Correlation of the first two variables' residuals from regressions on all others."""
    inner_RPP = covariance_RPP[:, 2:, 2:]
    inner_RPP = inner_RPP + _RIDGE * np.eye(inner_RPP.shape[1])
    with_both_RP2 = covariance_RPP[:, 2:, :2]
    told_R22 = with_both_RP2.swapaxes(1, 2) @ np.linalg.solve(inner_RPP, with_both_RP2)
    left_R22 = covariance_RPP[:, :2, :2] - told_R22
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(
            left_R22[:, 0, 1] / np.sqrt(np.maximum(left_R22[:, 0, 0] * left_R22[:, 1, 1], 0))
        )
