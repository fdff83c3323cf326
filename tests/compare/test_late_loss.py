"""The late loss: the mean of the joined losses over the window, and the variance of its noise.

Shapes: N tokens, K probe steps.
"""

import numpy as np
import pytest
from correlated import correlated_noise
from runs import log_time, probe_steps
from scipy.integrate import quad
from scipy.linalg import toeplitz

from megatron_tokscale.compare.late_loss import WINDOW, late_variance, window_weights
from megatron_tokscale.fit import fit_sigmoids

X_K = log_time(probe_steps(50, last=2000))


def test_weights_give_the_integral_of_the_joined_losses():
    rng = np.random.default_rng(0)
    loss_K = rng.standard_normal(len(X_K))
    for end in (X_K[-1], X_K[-1] - 0.3, X_K[-4] + 0.01):
        inside = X_K[(end - WINDOW < X_K) & (end > X_K)]
        area, _ = quad(
            lambda x: np.interp(x, X_K[1:], loss_K[1:]), end - WINDOW, end, points=inside
        )
        assert window_weights(X_K, end) @ loss_K == pytest.approx(area / WINDOW, rel=1e-6)


def test_late_loss_of_a_straight_curve_is_that_at_the_middle_whatever_the_probes():
    for x_K in (X_K, X_K[::3], X_K[-6:]):
        straight_K = 3 - 0.5 * np.where(np.isfinite(x_K), x_K, 0.0)
        late = window_weights(x_K, float(x_K[-1])) @ straight_K
        assert late == pytest.approx(3 - 0.5 * (x_K[-1] - WINDOW / 2))


def test_one_probe_has_all_the_weight_where_the_window_is_empty():
    assert window_weights(np.array([-np.inf, 0.0, 2.0]), 0.0).tolist() == [0, 1, 0]


def test_variance_is_that_of_the_planted_noise():
    rng = np.random.default_rng(1)
    n_tokens, size, phi = 4000, 0.3, 0.5
    noise_NK = size * correlated_noise(rng, (n_tokens, len(X_K)), phi)
    drop_NK = 3 / (1 + np.exp((np.where(np.isfinite(X_K), X_K, -50) - 4) / 0.2))
    loss_NK = (2 + drop_NK + noise_NK).astype(np.float32)
    weight_K = window_weights(X_K, float(X_K[-1]))
    exact = size**2 * weight_K @ toeplitz(phi ** np.arange(len(X_K))) @ weight_K
    late_N = loss_NK @ weight_K
    assert late_N.var() == pytest.approx(exact, rel=0.1)  # the formula itself, by brute force
    found_N = late_variance(fit_sigmoids(X_K, loss_NK), loss_NK, weight_K)
    assert np.median(found_N) == pytest.approx(exact, rel=0.1)
