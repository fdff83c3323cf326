"""R² of the reconstructions in planted worlds, and of their planted twins.

Shapes: N tokens, K probes, U units.
"""

import numpy as np
import pytest
from planted_worlds import AUTOCORRELATION, WORLDS, axis, seeds, text_of

from megatron_tokscale.fit import fit_sigmoids
from megatron_tokscale.spectrum.evidence.reconstruction import compare
from megatron_tokscale.spectrum.evidence.token_groups import groups_by_frequency
from megatron_tokscale.spectrum.scored_range import certain_part, label_entropy, scored_range
from megatron_tokscale.spectrum.sums import DocumentSums
from megatron_tokscale.spectrum.twins import TwinTokens, make_twins, stepwise_losses

X_K = axis()
RATE_K = {"B3": np.where(np.exp(X_K) > 321, 0.4, 1.0)}
"""Learning rates of a world whose losses fall together in the decay; constant in all others."""


def world(name, seed=0, n_tokens=6000):
    """Fits and losses of a planted world, its text, and the range that R² is scored in."""
    rng = np.random.default_rng(seed)
    text = text_of(n_tokens, rng)
    loss_NK = seeds(WORLDS[name], text, X_K, rng, runs=1)[0]
    fits = fit_sigmoids(X_K, loss_NK)
    rate_K = RATE_K.get(name, np.ones(len(X_K)))
    scored = scored_range(X_K, loss_NK.mean(axis=0), label_entropy(text.label_N), rate_K)
    units = text.document_N.max() + 1
    block = (fits, loss_NK, text.document_N)
    sums = DocumentSums.from_blocks(X_K, [block], units, from_x=scored.from_x)
    drawn = sums.resampled(X_K, np.ones((1, units)), from_x=scored.from_x)
    certain = certain_part(scored, X_K, drawn.width_R[0])
    found = compare(X_K, drawn.curves(), drawn.loss_RK, from_x=certain.from_x, to_x=certain.to_x)
    tokens = TwinTokens(
        fits,
        loss_NK,
        groups_by_frequency(text.dataset_N, text.log_share_N).group_N,
        text.document_N,
        text.dataset_N,
    )
    return {name: each.r2 for name, each in found.by_name.items()}, tokens, certain


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "times", "both"),
    [
        ("A1", 0.98, 0.99),
        ("A2", 0.97, 0.97),
        ("A3", 0.95, 0.96),
        ("B1", 0.85, 0.7),
        ("B2", 0.76, 0.6),
        ("B3", 0.8, 0.8),
    ],
)
def test_where_the_claim_is_true_times_alone_give_the_slope(name, times, both):
    """Before: B1 -0.6, B2 -0.3, B3 -5 in the same range, with events of falling tokens alone."""
    r2, _, _ = world(name)
    assert r2["spectrum"] > times
    assert r2["kernel"] > both


@pytest.mark.slow
@pytest.mark.parametrize("name", ["C", "D"])
def test_where_no_token_has_a_step_times_alone_score_like_the_twin_without_steps(name):
    r2, tokens, certain = world(name)
    twins = make_twins(tokens, certain, np.ones((1, 30)), seed=1)
    without, with_steps = (
        each["spectrum"].value for each in (twins.without_steps, twins.with_steps)
    )
    assert r2["spectrum"] < 0.3
    assert abs(r2["spectrum"] - without) < abs(r2["spectrum"] - with_steps)


@pytest.mark.slow
def test_where_each_token_has_a_step_the_twin_with_steps_scores_like_the_run():
    r2, tokens, certain = world("A3")
    twins = make_twins(tokens, certain, np.ones((1, 30)), seed=1)
    assert twins.tokens == 6000
    for name in ("kernel", "spectrum"):
        assert abs(twins.with_steps[name].value - r2[name]) < 0.06
        assert twins.without_steps[name].value < twins.with_steps[name].value - 0.05


def test_the_twin_with_steps_has_the_curves_and_the_noise_of_its_tokens():
    rng = np.random.default_rng(0)
    text = text_of(2000, rng)
    loss_NK = seeds(WORLDS["A2"], text, X_K, rng, runs=1)[0]
    fits = fit_sigmoids(X_K, loss_NK)
    noise_NK = stepwise_losses(fits, loss_NK, seed=1) - fits.predict(np.maximum(X_K, -1e6))
    deviation_N = np.sqrt((noise_NK**2).mean(axis=1))
    expected = 0.4 * np.exp(0.4**2 / 2)  # mean of the planted noise's log-normal sizes
    np.testing.assert_allclose(deviation_N.mean(), expected, rtol=0.08)  # fits absorb some of it
    scaled_NK = noise_NK / deviation_N[:, None]
    correlation = (scaled_NK[:, 1:] * scaled_NK[:, :-1]).mean()
    assert abs(correlation - AUTOCORRELATION) < 0.12


@pytest.mark.slow
def test_twins_get_the_shifts_that_are_given():
    rng = np.random.default_rng(0)
    text = text_of(1000, rng)
    loss_NK = seeds(WORLDS["A2"], text, X_K, rng, runs=1)[0]
    fits = fit_sigmoids(X_K, loss_NK)
    tokens = TwinTokens(fits, loss_NK, np.zeros(1000, np.int64), text.document_N, text.dataset_N)
    scored = scored_range(X_K, loss_NK.mean(axis=0), None, np.ones(len(X_K)))
    shift_DK = 0.2 * rng.standard_normal((2, len(X_K)))
    plain, shifted = (
        make_twins(tokens, scored, np.ones((1, 5)), 1, shift) for shift in (None, shift_DK)
    )
    assert plain.with_steps["kernel"].value > 0.8
    assert shifted.with_steps["kernel"].value < plain.with_steps["kernel"].value - 0.03
