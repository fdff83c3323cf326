"""States of tokens, against the fitted curves on a fine grid.

Shapes: N tokens, K probe steps, G grid points.
"""

import numpy as np
import pytest
from planted import of_class
from scipy.special import expit

from megatron_tokscale.fit import TokenClass, TokenState, fit_sigmoids, states_at

X_K = np.concatenate([[-np.inf], np.linspace(0, 8, 49)])
X = np.maximum(X_K, -1e6)
MOVING = (TokenClass.FALLING, TokenClass.RISING, TokenClass.TWO_STEP)


def fitted(*clean, noise=0.02):
    loss_NK = np.stack(clean) + noise * np.random.default_rng(0).standard_normal(len(X_K))
    return fit_sigmoids(X_K, loss_NK.astype(np.float32))


@pytest.fixture(scope="module")
def moving():
    clean_NK = np.concatenate([of_class(each, 80, X_K) for each in MOVING])
    clean_NK = clean_NK + 0.05 * np.random.default_rng(0).standard_normal(clean_NK.shape)
    return fit_sigmoids(X_K, clean_NK.astype(np.float32))


def by_brute_force(fits, x):
    """Return the states of moving tokens by their predicted losses on a grid that ends at `x`."""
    far_G = np.linspace(-30, 60, 6001)
    so_far_NG, whole_NG = (fits.predict(g) for g in (np.append(far_G[far_G < x], x), far_G))
    states = []
    for so_far_G, whole_G in zip(so_far_NG, whole_NG, strict=True):
        start, now = whole_G[0], so_far_G[-1]
        drop, span = start - whole_G.min(), np.ptp(whole_G)
        if now - so_far_G.min() >= 0.2 * span:
            states.append(TokenState.FORGOTTEN)
        elif drop < 1e-3:
            states.append(TokenState.KNOWN)
        elif start - now >= 0.8 * drop:
            states.append(TokenState.LEARNED)
        elif start - now >= 0.2 * drop:
            states.append(TokenState.UNDER_WAY)
        else:
            states.append(TokenState.TO_COME)
    return np.array(states)


@pytest.mark.parametrize("x", [0.5, 2.0, 3.7, 5.0, 6.0])
def test_states_are_those_of_the_fitted_curves(moving, x):
    curves = moving.rows(moving.is_class(*MOVING))
    assert len(curves) > 220
    expected = by_brute_force(curves, x)
    assert len(np.unique(expected)) >= 3
    assert (states_at(curves, x) == expected).mean() > 0.99  # the rest lie on a grid point


def test_a_token_is_under_way_between_20_and_80_percent_of_its_drop():
    fits = fitted(1 + 4 * expit((4 - X) / 0.5))
    midpoint, width = float(fits.midpoint_N[0]), float(fits.width_N[0])
    for share, before, after in (
        (0.2, TokenState.TO_COME, TokenState.UNDER_WAY),
        (0.8, TokenState.UNDER_WAY, TokenState.LEARNED),
    ):
        x = midpoint + width * np.log(share / (1 - share))
        assert states_at(fits, x - 1e-4).tolist() == [before]
        assert states_at(fits, x + 1e-4).tolist() == [after]


def test_a_gradual_token_has_the_state_of_its_one_sigmoid():
    fits = fitted(9 - 0.9 * np.maximum(np.maximum(X_K, 0) - 2, 0))
    assert fits.is_class(TokenClass.GRADUAL).all()
    midpoint = float(fits.midpoint_N[0])
    assert states_at(fits, midpoint).tolist() == [TokenState.UNDER_WAY]
    assert states_at(fits, midpoint - 2 * float(fits.width_N[0])).tolist() == [TokenState.TO_COME]


def test_flat_tokens_are_known_or_have_never_moved_at_any_time():
    fits = fitted(np.full(50, 0.2), np.full(50, 6.0))
    for x in (-np.inf, 0.0, 4.0, None):
        assert states_at(fits, x).tolist() == [TokenState.KNOWN, TokenState.UNMOVED]


def test_a_token_that_only_rises_is_known_until_it_is_forgotten():
    fits = fitted(5 - 4 * expit((4 - X) / 0.3))
    assert states_at(fits, 2.0).tolist() == [TokenState.KNOWN]
    assert states_at(fits).tolist() == [TokenState.FORGOTTEN]


def test_a_fall_given_back_is_forgotten_and_a_small_rise_is_not():
    early, late = expit((2 - X) / 0.15), expit((6 - X) / 0.15)
    fits = fitted(
        5 - 4 * (1 - early) + 3 * (1 - late),
        5 - 4 * (1 - early) + 0.5 * (1 - late),
        4 + 2 * (1 - early) - 5 * (1 - late),
        7 - 2 * (1 - early) - 4 * (1 - late),
    )
    assert fits.is_class(TokenClass.TWO_STEP).all()
    known = [TokenState.LEARNED, TokenState.LEARNED, TokenState.FORGOTTEN, TokenState.UNDER_WAY]
    assert states_at(fits, 0.5).tolist() == 4 * [TokenState.TO_COME]
    assert states_at(fits, 4.0).tolist() == known
    assert states_at(fits).tolist() == [TokenState.FORGOTTEN] + 3 * [TokenState.LEARNED]


def test_nothing_has_fallen_before_training():
    fits = fitted(1 + 4 * expit((4 - X) / 0.5), 1 + 4 * expit((0.2 - X) / 0.5))
    assert states_at(fits, -np.inf).tolist() == 2 * [TokenState.TO_COME]


def test_a_token_that_misses_a_loss_is_unfitted():
    loss_NK = np.stack([1 + 4 * expit((4 - X) / 0.5)] * 2).astype(np.float32)
    loss_NK[1, 7] = np.nan
    expected = [TokenState.LEARNED, TokenState.UNKNOWN]
    assert states_at(fit_sigmoids(X_K, loss_NK)).tolist() == expected
