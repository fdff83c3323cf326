"""Locality: how wide the transitions are, beside tokens that merely follow the mean curve.

If learning is local, a token falls in a narrow window of x. The null destroys just that: every
token is given the shape of the mean loss curve, with its own level and amplitude, plus noise as
large as its own, and goes through the same fit with the same classes (design.md 6; the construction
is our choice).

Shapes: N tokens, K probe steps, C bins.
"""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_tokscale.fit import FitStatus, SigmoidFits, TokenClass, fit_sigmoids
from megatron_tokscale.spectrum.density import finite_range, weighted_quantile

TEN_NINETY = 2 * math.log(9)
"""10-90% width of a sigmoid of width one."""

_QUARTILES = {"p25": 0.25, "p50": 0.5, "p75": 0.75}
WIDTH_BINS = 40


def transition_widths(fits: SigmoidFits, loss_NK: NDArray[Any]) -> dict[str, Any]:
    """How wide the transitions of the falling tokens are, as plain JSON values.

    Only falling tokens with a trusted midpoint count. A token with fewer than two probes in its
    transition counts with its fitted width, which is then below the probes' spacing.

    Returns:
        tokens: fitted tokens; falling: the falling ones counted; class_shares: of all tokens.
        width_x, width_decades, width_of_range: quartiles of the 10-90% width, each token weighted
            by its drop: in units of x, in decades of time, and over the length of the probed range.
        fall_in_windows: the measured fall of the counted tokens inside their own 10-90% windows
            over the measured fall of all tokens between the first and the last finite probe. By its
            definition a perfect sigmoid has 0.8 of its own there: the number speaks of the tokens
            that are not one, and only beside the widths.
    """
    counted_N = _counted(fits)
    width_N = TEN_NINETY * fits.width_N[counted_N].astype(np.float64)
    low, high = finite_range(fits.x_K)
    quartiles = weighted_quantile(
        width_N, fits.drop_N[counted_N].astype(np.float64), list(_QUARTILES.values())
    )
    fitted_N = fits.complete_N
    finite_K = np.isfinite(fits.x_K)
    finite_loss_NK = loss_NK[:, finite_K].astype(np.float64)
    fall = (finite_loss_NK[fitted_N, 0] - finite_loss_NK[fitted_N, -1]).sum()
    inside = _fall_in_window(fits.rows(counted_N), finite_loss_NK[counted_N]).sum()
    return {
        "tokens": int(fitted_N.sum()),
        "falling": int(counted_N.sum()),
        "class_shares": {
            each.label: float(fits.is_class(each)[fitted_N].mean()) if fitted_N.any() else None
            for each in TokenClass
            if each is not TokenClass.UNFITTED
        },
        "width_x": _named(quartiles),
        "width_decades": _named(quartiles / math.log(10)),
        "width_of_range": _named(quartiles / (high - low)),
        "fall_in_windows": float(inside / fall) if fall else None,
    }


def width_histogram(fits: SigmoidFits, edges_C: NDArray[np.float64]) -> NDArray[np.float64]:
    """Share of the counted tokens' drop per bin of the 10-90% width (units of x)."""
    counted_N = _counted(fits)
    drop_N = fits.drop_N[counted_N].astype(np.float64)
    share_C, _ = np.histogram(
        np.clip(TEN_NINETY * fits.width_N[counted_N], edges_C[0], edges_C[-1]),
        edges_C,
        weights=drop_N,
    )
    return np.asarray(share_C / max(drop_N.sum(), 1e-300))


def width_edges(x_K: NDArray[np.float64]) -> NDArray[np.float64]:
    """Logarithmic bins of the 10-90% width: from a tenth of the probes' spacing to 4.4 ranges."""
    low, high = finite_range(x_K)
    spacing = float(np.median(np.diff(x_K[np.isfinite(x_K)])))
    return np.geomspace(spacing / 10, TEN_NINETY * (high - low), WIDTH_BINS + 1)


def mean_curve_losses(
    fits: SigmoidFits, loss_NK: NDArray[Any], seed: int = 0
) -> NDArray[np.float32]:
    """The null's losses: token i is a_i + b_i m(x) plus Gaussian noise; unfitted tokens left out.

    m is the mean loss of the tokens, a_i and b_i come from least squares on the token's own
    losses, and the noise has the residual variance SSE/(K - 4) of the token's own sigmoid.
    """
    fitted_N = fits.complete_N
    loss_NK = loss_NK[fitted_N].astype(np.float64)
    mean_K = loss_NK.mean(axis=0)
    shape_K = mean_K - mean_K.mean()
    level_N = loss_NK.mean(axis=1, keepdims=True)
    amplitude_N = loss_NK @ shape_K / max(float(shape_K @ shape_K), 1e-300)
    n_probes = loss_NK.shape[1]
    noise_N = np.sqrt(fits.sse_N[fitted_N].astype(np.float64) / (n_probes - 4))
    noise_NK = np.random.default_rng(seed).standard_normal(loss_NK.shape) * noise_N[:, None]
    null_NK = level_N + amplitude_N[:, None] * shape_K + noise_NK
    return np.asarray(null_NK, dtype=np.float32)


def mean_curve_fits(
    fits: SigmoidFits, loss_NK: NDArray[Any], seed: int = 0
) -> tuple[SigmoidFits, NDArray[np.float32]]:
    """The null's losses and what the same fitter says of them."""
    null_NK = mean_curve_losses(fits, loss_NK, seed)
    return fit_sigmoids(fits.x_K, null_NK), null_NK


def _counted(fits: SigmoidFits) -> NDArray[np.bool_]:
    trusted = np.isin(fits.status_N, (FitStatus.CONVERGED, FitStatus.TOO_FEW_POINTS))
    return np.asarray(fits.is_class(TokenClass.FALLING) & trusted & fits.complete_N)


def _fall_in_window(fits: SigmoidFits, loss_NK: NDArray[np.float64]) -> NDArray[np.float64]:
    """Measured loss at the start of each token's 10-90% window minus that at its end.

    The window is cut at the probed range; between probes the loss is interpolated in x.
    """
    x_K = fits.x_K[np.isfinite(fits.x_K)]
    half_N = TEN_NINETY / 2 * fits.width_N.astype(np.float64)

    def loss_at(x_N: NDArray[np.float64]) -> NDArray[np.float64]:
        x_N = np.clip(x_N, x_K[0], x_K[-1])
        right_N = np.clip(np.searchsorted(x_K, x_N), 1, len(x_K) - 1)
        share_N = (x_N - x_K[right_N - 1]) / (x_K[right_N] - x_K[right_N - 1])
        row_N = np.arange(len(x_N))
        before, after = loss_NK[row_N, right_N - 1], loss_NK[row_N, right_N]
        return np.asarray(before + share_N * (after - before))

    return loss_at(fits.midpoint_N - half_N) - loss_at(fits.midpoint_N + half_N)


def _named(quartiles: NDArray[np.float64]) -> dict[str, float | None]:
    values = (float(q) if np.isfinite(q) else None for q in quartiles)
    return dict(zip(_QUARTILES, values, strict=True))
