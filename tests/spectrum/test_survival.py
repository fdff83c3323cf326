"""Kaplan-Meier against scipy, and expected drops on planted truth.

Shapes: N tokens, C bins, G groups, U units, R resamples.
"""

import numpy as np
import pytest
from planted_worlds import WORLDS, axis, seeds, text_of
from scipy.stats import CensoredData, ecdf

from megatron_tokscale.core.resampling import Units
from megatron_tokscale.fit import fit_sigmoids
from megatron_tokscale.laws.power_law.tail import tail_exponent
from megatron_tokscale.spectrum.density import Bins
from megatron_tokscale.spectrum.events import Outcome, events_of
from megatron_tokscale.spectrum.groups import Groups
from megatron_tokscale.spectrum.survival import OutcomeSums, median_time, product_limit


def test_the_product_limit_is_that_of_scipy():
    rng = np.random.default_rng(0)
    time_N = rng.permutation(200).astype(float)  # no ties
    censored_N = rng.random(200) < 0.4
    order = np.argsort(time_N)
    event_1C = (~censored_N[order]).astype(float)[None]
    found_C = product_limit(event_1C, 1 - event_1C)[0]
    data = CensoredData(uncensored=time_N[~censored_N], right=time_N[censored_N])
    expected = ecdf(data).sf
    np.testing.assert_allclose(found_C, expected.evaluate(time_N[order]), atol=1e-12)


def test_with_ties_and_one_end_the_product_limit_is_that_of_scipy():
    rng = np.random.default_rng(1)
    time_N = rng.integers(0, 30, 500).astype(float)
    censored_N = time_N >= 20
    data = CensoredData(uncensored=time_N[~censored_N], right=np.full(censored_N.sum(), 19.0))
    event_1C = np.bincount(time_N[~censored_N].astype(int), minlength=20)[None].astype(float)
    censored_1C = np.zeros((1, 20))
    censored_1C[0, -1] = censored_N.sum()
    found_C = product_limit(event_1C, censored_1C)[0]
    np.testing.assert_allclose(found_C, ecdf(data).sf.evaluate(np.arange(20)), atol=1e-12)


def test_nothing_at_risk_survives_whole():
    assert (product_limit(np.zeros((2, 5)), np.zeros((2, 5))) == 1).all()


def test_the_median_lies_where_half_survives_and_is_not_known_if_more_survives():
    surviving_RC = np.array([[1.0, 0.75, 0.25, 0.1], [1.0, 0.9, 0.8, 0.7]])
    median_R = median_time(np.array([1.0, 2.0, 3.0, 4.0]), surviving_RC)
    assert median_R[0] == pytest.approx(2.5)
    assert np.isnan(median_R[1])


def planted(world, seed=3, n_tokens=8000):
    """A world's text, x_K, fits, and true times and drops of its tokens (A2 and A3)."""
    rng = np.random.default_rng(seed)
    text, x_K = text_of(n_tokens, rng), axis()
    again = np.random.default_rng()
    again.bit_generator.state = rng.bit_generator.state
    loss_NK = seeds(WORLDS[world], text, x_K, rng, runs=1)[0]
    drop_N = np.exp(again.normal(np.log(4), 0.5, n_tokens))
    time_N = np.log(20) + again.exponential(2, n_tokens)
    return text, x_K, fit_sigmoids(x_K, loss_NK), time_N, drop_N


@pytest.fixture(scope="module", params=["A2", "A3"])
def censored_world(request):
    return request.param, *planted(request.param)


def test_drops_are_found_in_every_octave_up_to_two_widths_before_the_end(censored_world):
    """Of the true drops, falling and two-step tokens alone have 0.92 early and 0.6 at the end."""
    world, _, x_K, fits, time_N, drop_N = censored_world
    width = {"A2": 0.3, "A3": 0.6}[world]
    octaves = int((x_K[-1] - 2 * width - 3.0) / np.log(2))
    edges = x_K[-1] - 2 * width - np.log(2) * np.arange(octaves, -1, -1)
    events = events_of(fits)
    found = np.histogram(events.midpoint_E, edges, weights=events.drop_E)[0]
    ratio = found / np.histogram(time_N, edges, weights=drop_N)[0]
    assert octaves >= 2
    assert ((ratio > 0.89) & (ratio < 1.08)).all()


def test_the_exponent_of_the_tail_is_not_biased(censored_world):
    """Without gradual tokens it is 0.11 to 0.27 too high."""
    world, _, x_K, fits, time_N, drop_N = censored_world
    ends = {"from_x": np.log(25), "to_x": x_K[-1] - {"A2": 0.6, "A3": 0.8}[world]}
    bins, events = Bins.over(x_K), events_of(fits)

    def exponent(midpoint_N, drop_N):
        drop_1C = np.histogram(midpoint_N, bins.edges, weights=drop_N)[0][None]
        return tail_exponent(bins.x_C, drop_1C, **ends).exponent.value

    found, truth = exponent(events.midpoint_E, events.drop_E), exponent(time_N, drop_N)
    assert abs(found - truth) < 0.06


def test_censored_tokens_are_expected_to_drop_as_they_truly_will(censored_world):
    world, text, x_K, fits, time_N, drop_N = censored_world
    units = Units.from_documents(text.dataset_N, text.document_N, seed=0)
    sums = OutcomeSums(Groups(text.dataset_N.astype(np.int64), ("a", "b")), units)
    for at in (slice(0, 3000), slice(3000, len(text))):
        part = fits.rows(at)
        sums.add(at, part, events_of(part))
    found = sums.resampled(units.weights(20, 0))
    later_N = time_N > x_K[-1]
    assert found.tokens_RO[0].sum() == len(text)
    share = found.share(Outcome.CENSORED)[0]
    assert abs(share - later_N.mean()) < {"A2": 0.06, "A3": 0.08}[world]
    total = found.learned_R[0] + found.expected_R[0]
    np.testing.assert_allclose(total, drop_N.mean(), rtol=0.05)


def test_a_censored_token_counts_with_the_mean_drop_of_its_group():
    x_K = np.concatenate([[-np.inf], np.linspace(0, 8, 49)])
    x = np.maximum(x_K, -1e6)
    drops = [2.0, 4.0, 8.0, 0.0, 0.0, 0.0]
    loss_NK = np.stack([5 + drop / (1 + np.exp((x - 4) / 0.3).clip(max=1e30)) for drop in drops])
    loss_NK += 0.01 * np.random.default_rng(0).standard_normal(loss_NK.shape)
    fits = fit_sigmoids(x_K, loss_NK.astype(np.float32))
    units = Units.from_documents(np.zeros(6), np.arange(6), seed=0)
    groups = Groups(np.array([0, 0, 1, 0, 1, 2]), ("a", "b", "without a learned token"))
    sums = OutcomeSums(groups, units)
    sums.add(slice(0, 6), fits, events_of(fits))
    found = sums.resampled(np.ones((1, 6)))
    np.testing.assert_allclose(found.learned_R, 14 / 6, rtol=0.02)
    np.testing.assert_allclose(found.expected_R, (3 + 8 + 14 / 3) / 6, rtol=0.02)
