"""The classes of planted trajectories of each kind, and of noise.

Shapes: N tokens, K probe steps.
"""

import numpy as np
import pytest
from correlated import correlated_noise
from fit_accuracy import CLASSES, confusion_of
from planted import DEMO_AUTOCORRELATION
from scipy.special import expit
from scipy.stats import norm

from megatron_tokscale.fit import TokenClass, fit_sigmoids

X_K = np.concatenate([[-np.inf], np.linspace(0, 8, 59)])
NOISE = 0.15


def noisy(curve_NK, seed=0):
    return curve_NK + NOISE * np.random.default_rng(seed).standard_normal(curve_NK.shape)


def steps(midpoint_N, width, drop_N):
    return drop_N[:, None] * expit((midpoint_N[:, None] - X_K) / width)


def planted_class(token_class, n_tokens=400):
    rng = np.random.default_rng(int(token_class))
    early, late = rng.uniform(2, 3.5, n_tokens), rng.uniform(5, 6.5, n_tokens)
    drop = rng.uniform(1.5, 5, n_tokens)
    ramp_K = np.maximum(np.maximum(X_K, 0) - 3, 0)
    return {
        TokenClass.FLAT_KNOWN: np.full((n_tokens, 60), 0.2),
        TokenClass.FLAT_UNLEARNED: np.full((n_tokens, 60), 6.0),
        TokenClass.FALLING: 1 + steps(early, 0.3, drop),
        TokenClass.RISING: 1 + steps(late, 0.3, -drop),
        TokenClass.TWO_STEP: np.concatenate(
            [
                1 + (steps(early, 0.2, drop) + steps(late, 0.2, drop))[: n_tokens // 2],
                1 + (steps(early, 0.2, drop) - steps(late, 0.2, drop))[n_tokens // 2 :],
            ]
        ),
        TokenClass.GRADUAL: 9 - rng.uniform(0.5, 1.5, n_tokens)[:, None] * ramp_K,
    }[token_class]


@pytest.mark.parametrize("token_class", [c for c in TokenClass if c != TokenClass.UNFITTED])
def test_planted_classes_are_found(token_class):
    fits = fit_sigmoids(X_K, noisy(planted_class(token_class)))
    assert (fits.class_N == token_class).mean() > 0.97
    assert (fits.evidence_N >= 0).all()


@pytest.mark.parametrize("n_probes", [24, 60])
def test_at_most_one_in_a_hundred_tokens_of_pure_noise_is_not_flat(n_probes):
    noise_NK = np.random.default_rng(1).standard_normal((10_000, n_probes))
    x_K = np.concatenate([[-np.inf], np.linspace(0, 8, n_probes - 1)])
    fits = fit_sigmoids(x_K, 5 + noise_NK)
    assert (fits.class_N != TokenClass.FLAT_UNLEARNED).mean() < 0.01


@pytest.mark.parametrize(("n_probes", "autocorrelation"), [(60, 0.3), (60, 0.6), (200, 0.8)])
def test_correlated_noise_is_seldom_classed_as_a_change(n_probes, autocorrelation):
    rng = np.random.default_rng(1)
    x_K = np.concatenate([[-np.inf], np.linspace(0, 8, n_probes - 1)])
    noise_NK = correlated_noise(rng, (10_000, n_probes), autocorrelation)
    fits = fit_sigmoids(x_K, 5 + noise_NK)
    assert fits.is_class(TokenClass.FALLING, TokenClass.RISING).mean() < 0.015
    assert fits.is_class(TokenClass.TWO_STEP).mean() < 0.01


@pytest.mark.parametrize("token_class", [c for c in TokenClass if c != TokenClass.UNFITTED])
@pytest.mark.parametrize(("autocorrelation", "least"), [(0.0, 0.9), (DEMO_AUTOCORRELATION, 0.6)])
def test_classes_at_the_noise_of_the_demo(token_class, autocorrelation, least):
    """benchmarks/results/fit_accuracy.md has the whole table."""
    row = dict(zip(CLASSES, confusion_of(token_class, 1000, autocorrelation), strict=True))
    assert max(row, key=row.get) == token_class
    assert row[token_class] > 100 * least


def test_a_smooth_fall_of_another_shape_than_a_sigmoid_is_no_flat_token():
    rng = np.random.default_rng(2)
    midpoint_N, width_N = rng.uniform(4, 6, 200), rng.uniform(0.2, 0.8, 200)
    # From 7 nats to 0, as a normal distribution function: the residuals of a sigmoid are smooth.
    curve_NK = 7 * norm.sf((X_K - midpoint_N[:, None]) / width_N[:, None])
    fits = fit_sigmoids(X_K, curve_NK + 1e-3 * rng.standard_normal(curve_NK.shape))
    assert (fits.autocorrelation_N > 0.9).mean() > 0.5
    assert fits.is_class(TokenClass.FALLING, TokenClass.TWO_STEP).all()


def test_the_runner_up_is_the_next_best_model():
    fits = fit_sigmoids(X_K, noisy(planted_class(TokenClass.TWO_STEP)))
    two = fits.rows(fits.class_N == TokenClass.TWO_STEP)
    assert not two.is_class(TokenClass.UNFITTED).any()
    assert (two.runner_up_N != two.class_N).all()
    assert np.median(two.evidence_N) > 20


def test_the_level_separates_flat_known_from_flat_unlearned():
    loss_NK = noisy(np.array([[0.5], [0.9]]) + np.zeros((2, 60)))
    assert list(fit_sigmoids(X_K, loss_NK).class_N) == [
        TokenClass.FLAT_KNOWN,
        TokenClass.FLAT_UNLEARNED,
    ]
    assert (fit_sigmoids(X_K, loss_NK, known_below=1.0).class_N == TokenClass.FLAT_KNOWN).all()


@pytest.mark.parametrize("token_class", [c for c in TokenClass if c != TokenClass.UNFITTED])
def test_prediction_follows_the_planted_curve(token_class):
    clean_NK = planted_class(token_class)
    fits = fit_sigmoids(X_K, noisy(clean_NK))
    of_class = fits.class_N == token_class
    error_NK = fits.predict(X_K)[of_class] - clean_NK[of_class]
    assert np.sqrt((error_NK**2).mean()) < 0.6 * NOISE


def test_two_steps_are_recovered_in_order():
    fits = fit_sigmoids(X_K, noisy(planted_class(TokenClass.TWO_STEP)))
    two = fits.rows(fits.class_N == TokenClass.TWO_STEP)
    assert (two.step1_midpoint_N < two.step2_midpoint_N).all()
    assert abs(np.median(two.step1_midpoint_N) - 2.75) < 0.2
    assert abs(np.median(two.step2_midpoint_N) - 5.75) < 0.2


def test_a_single_outlier_is_not_two_steps():
    loss_NK = noisy(np.full((200, 60), 5.0))
    loss_NK[:, 30] += 2.0
    fits = fit_sigmoids(X_K, loss_NK)
    assert not fits.is_class(TokenClass.TWO_STEP).any()


def test_transitions_are_the_sigmoids_of_the_class_models():
    kinds = (TokenClass.FALLING, TokenClass.RISING, TokenClass.TWO_STEP, TokenClass.FLAT_KNOWN)
    loss_NK = np.concatenate([planted_class(kind, 100) for kind in kinds])
    fits = fit_sigmoids(X_K, noisy(loss_NK))
    moves = fits.transitions
    per_token_N = np.bincount(moves.token_E, minlength=len(fits))
    expected_N = np.select(
        [fits.is_class(TokenClass.TWO_STEP), fits.is_class(TokenClass.FALLING, TokenClass.RISING)],
        [2, 1],
    )
    np.testing.assert_array_equal(per_token_N, expected_N)
    fall_N = fits.predict([-np.inf])[:, 0] - fits.predict([1e6])[:, 0]
    drop_N = np.bincount(moves.token_E, weights=moves.drop_E, minlength=len(fits))
    np.testing.assert_allclose(drop_N, fall_N, atol=1e-4)
