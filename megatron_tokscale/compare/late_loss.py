"""The late loss of a token: its mean loss over the last half octave before the common end.

It is a weighted sum of the losses at the probes, with the same meaning for any probes: the mean of
the line that joins them. Its noise follows from the residuals of the token's fit, whose successive
values are correlated (`fit.noise`).

Shapes: N tokens, K probe steps, L lags.
"""

from typing import Final

import numpy as np
from numpy.typing import ArrayLike

from megatron_tokscale.core.arrays import Floats, Floats32
from megatron_tokscale.fit import SigmoidFits, TokenClass
from megatron_tokscale.spectrum.evidence.falls import OCTAVE

WINDOW: Final = OCTAVE / 2
"""Length of the window in x (our choice): four probes of eight per octave; a token's loss that
still falls does so by little within it."""
_PARAMETERS: Final = {
    TokenClass.FLAT_KNOWN: 1,
    TokenClass.FLAT_UNLEARNED: 1,
    TokenClass.FALLING: 4,
    TokenClass.RISING: 4,
    TokenClass.TWO_STEP: 7,
    TokenClass.GRADUAL: 3,
}
"""Parameters of the curve of each class."""
_LEAST_FREEDOM: Final = 0.5
"""Least share of the probes that counts as degrees of freedom of the noise (our choice)."""
_LEAST_SD: Final = 1e-6
"""Least standard deviation in nats: the resolution of float32."""


def window_weights(x_K: Floats, end: ArrayLike, length: float = WINDOW) -> Floats:
    """Return the weights of the losses in their mean from `end - length` to `end`.

    The losses are joined by straight lines in x. A window that begins before the first finite x
    begins there; behind the last probe the last loss stays.

    Args:
        x_K: x of the probes, ascending; -inf at step 0, which has no weight.
        end: x of the end, or of several ends.
        length: length of the window in x.

    Returns:
        The weights, (..., K), with the shape of `end` in front.
    """
    finite = np.flatnonzero(np.isfinite(x_K))
    inner_K = x_K[finite]
    ends = np.asarray(end, dtype=np.float64)
    starts = np.minimum(np.maximum(ends - length, inner_K[0]), ends)
    spans = (ends - starts)[..., None]
    area = _areas(inner_K, ends) - _areas(inner_K, starts)
    weight_K = np.zeros((*ends.shape, len(x_K)))
    first_K = np.arange(len(inner_K)) == 0  # of an empty window: no probe is before its end
    weight_K[..., finite] = np.where(spans > 0, area / np.where(spans > 0, spans, 1), first_K)
    return weight_K


def _areas(x_K: Floats, to: Floats) -> Floats:
    """Return the areas under the joined losses from the first probe to `to`, per nat, (..., K)."""
    step_K, each_KK = np.diff(x_K), np.eye(len(x_K))
    if not len(step_K):
        return np.asarray(np.maximum(to - x_K[0], 0))[..., None]
    # Each step between two probes adds half of its length to both.
    halves_KK = step_K[:, None] / 2 * (each_KK[:-1] + each_KK[1:])
    whole_KK = np.concatenate([np.zeros((1, len(x_K))), np.cumsum(halves_KK, axis=0)])
    left = np.clip(np.searchsorted(x_K, to, side="right") - 1, 0, len(step_K) - 1)
    share = np.clip((to - x_K[left]) / step_K[left], 0, 1)[..., None]
    step = step_K[left][..., None]
    of_left, of_right = step * (share - share**2 / 2), step * share**2 / 2
    behind = np.maximum(to - x_K[-1], 0)[..., None]
    area = whole_KK[left] + of_left * each_KK[left] + of_right * each_KK[left + 1]
    return np.asarray(area + behind * each_KK[-1])


def used_probes(weight_K: Floats) -> int:
    """Return the number of probes up to the last one with a weight.

    Later losses must not be read: a run may have diverged behind the common end, and 0 times NaN
    is NaN.
    """
    return int(np.flatnonzero(weight_K)[-1]) + 1


def late_variance(fits: SigmoidFits, loss_NK: Floats32, weight_K: Floats) -> Floats:
    """Return the variance of the late loss of each token by its own noise, in nats^2, (N,).

    The noise at the probes is an autoregression of order one around the curve of the token's class.
    Its degrees of freedom are the probes less the parameters, each of which absorbs
    (1 + phi)/(1 - phi) probes' worth of correlated noise (Bartlett 1946).

    Args:
        fits: fits of the tokens.
        loss_NK: losses at all probes, those of the fits first.
        weight_K: weights of the late loss.
    """
    n_fitted = len(fits.x_K)
    x_K = np.where(np.isfinite(fits.x_K), fits.x_K, -1e6)
    residual_NK = loss_NK[:, :n_fitted] - fits.predict(x_K)
    squares_N = np.einsum("nk,nk->n", residual_NK, residual_NK)
    phi_N = np.clip(np.nan_to_num(fits.autocorrelation_N.astype(np.float64)), 0.0, 0.95)
    parameters_N = np.ones(len(fits))
    for token_class, parameters in _PARAMETERS.items():
        parameters_N[fits.is_class(token_class)] = parameters
    freedom_N = n_fitted - parameters_N * (1 + phi_N) / (1 - phi_N)
    freedom_N = np.maximum(freedom_N, _LEAST_FREEDOM * n_fitted)
    product_L = np.correlate(weight_K, weight_K, "full")[len(weight_K) - 1 :]
    product_L[1:] *= 2
    last = int(np.flatnonzero(product_L)[-1]) + 1
    factor_N = np.polynomial.polynomial.polyval(phi_N, product_L[:last])
    return np.asarray(np.maximum(squares_N / freedom_N * factor_N, _LEAST_SD**2))
