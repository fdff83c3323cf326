"""Learning events and outcomes, of planted tokens of every class.

Shapes: N tokens, K probes.
"""

import numpy as np
import pytest
from planted import of_class
from planted_worlds import WORLDS, axis, seeds, text_of
from scipy.special import expit
from scipy.stats import spearmanr

from megatron_tokscale.fit import TokenClass, fit_sigmoids
from megatron_tokscale.spectrum.events import Outcome, events_of, learning_times, outcomes
from megatron_tokscale.spectrum.sums import CLASSES

X_K = np.concatenate([[-np.inf], np.linspace(0, 8, 49)])
X = np.maximum(X_K, -1e6)


def fitted(*clean, noise=0.05, seed=0):
    loss_NK = np.stack(clean)
    loss_NK = loss_NK + noise * np.random.default_rng(seed).standard_normal(loss_NK.shape)
    return fit_sigmoids(X_K, loss_NK.astype(np.float32))


@pytest.fixture(scope="module")
def every_class():
    clean_NK = np.concatenate([of_class(each, 60, X_K) for each in CLASSES])
    clean_NK = clean_NK + 0.05 * np.random.default_rng(0).standard_normal(clean_NK.shape)
    return fit_sigmoids(X_K, clean_NK.astype(np.float32))


def test_every_token_whose_loss_falls_has_one_event(every_class):
    fits, events = every_class, events_of(every_class)
    assert len(np.unique(events.token_E)) == len(events.token_E)
    assert (events.drop_E > 0).all()
    single = fits.is_class(TokenClass.FALLING) | (
        fits.is_class(TokenClass.GRADUAL) & (fits.drop_N > 0)
    )
    two = fits.is_class(TokenClass.TWO_STEP)
    falls_N = single | two & (np.maximum(fits.step1_drop_N, fits.step2_drop_N) > 0)
    np.testing.assert_array_equal(events.token_E, np.flatnonzero(falls_N))
    of_single = single[events.token_E]
    np.testing.assert_array_equal(events.midpoint_E[of_single], fits.midpoint_N[single])


def test_the_event_of_a_two_step_token_is_its_larger_fall_from_the_start_of_the_range_on():
    early, late = expit((2 - X) / 0.2), expit((6 - X) / 0.2)
    fits = fitted(1 + 4 * early + 2 * late, 1 + 2 * early + 4 * late, 5 + 4 * early - 2 * late)
    assert fits.is_class(TokenClass.TWO_STEP).all()
    np.testing.assert_allclose(events_of(fits).midpoint_E, [2, 6, 2], atol=0.1)
    np.testing.assert_allclose(events_of(fits, from_x=4).midpoint_E, [6, 6, 2], atol=0.1)
    np.testing.assert_allclose(events_of(fits, from_x=4).drop_E, [2, 4, 4], atol=0.2)


def test_tokens_have_fallen_by_the_end_or_are_censored_or_were_known_or_are_forgotten():
    fits = fitted(
        1 + 4 * expit((4 - X) / 0.3),
        1 + 4 * expit((7 - X) / 0.3),
        np.full(50, 6.0),
        np.full(50, 0.2),
        5 - 4 * expit((4 - X) / 0.3),
    )
    expected = [
        Outcome.LEARNED,
        Outcome.LEARNED,
        Outcome.CENSORED,
        Outcome.KNOWN,
        Outcome.FORGOTTEN,
    ]
    np.testing.assert_array_equal(outcomes(fits, events_of(fits)), expected)
    expected[1] = Outcome.CENSORED
    np.testing.assert_array_equal(outcomes(fits, events_of(fits, to_x=6)), expected)
    assert np.isfinite(learning_times(fits)).tolist() == [True, True, False, False, False]
    assert np.isfinite(learning_times(fits, to_x=6)).sum() == 1


def test_a_midpoint_behind_the_last_probe_is_censored_without_an_end():
    fits = fitted(1 + 6 * expit((8.1 - X) / 0.4))
    assert events_of(fits).censored_E.tolist() == [True]


def test_a_token_that_misses_a_loss_has_no_event():
    loss_NK = np.stack([1 + 4 * expit((4 - X) / 0.3)] * 2).astype(np.float32)
    loss_NK[1, 7] = np.nan
    fits = fit_sigmoids(X_K, loss_NK)
    assert events_of(fits).token_E.tolist() == [0]
    assert outcomes(fits, events_of(fits)).tolist() == [Outcome.LEARNED, Outcome.UNFITTED]


def test_the_rule_of_two_steps_orders_tokens_better_behind_a_unigram_phase():
    """Planted world B1: each token has one step of its own behind a common unigram phase."""
    rng = np.random.default_rng(5)
    text, x_K = text_of(4000, rng), axis()
    state = rng.bit_generator.state
    loss_NK = seeds(WORLDS["B1"], text, x_K, rng, runs=1)[0]
    again = np.random.default_rng()
    again.bit_generator.state = state
    onset_N = np.log(45) - 0.25 * (text.log_share_N - text.log_share_N.mean())
    true_N = onset_N + again.exponential(1 / 0.6, len(text))
    fits = fit_sigmoids(x_K, loss_NK)
    from_x = np.log(45)
    found = {}
    for name, time_N in (
        ("event", learning_times(fits, from_x=from_x)),
        ("larger step", learning_times(fits)),
        ("one sigmoid", fits.midpoint_N.astype(float)),
    ):
        known_N = np.isfinite(learning_times(fits)) & (true_N > from_x) & (true_N < x_K[-1])
        found[name] = spearmanr(time_N[known_N], true_N[known_N])[0]
    assert found["event"] > 0.6
    assert found["event"] > max(found["larger step"], found["one sigmoid"]) + 0.05
