"""Sums by hand, planted learning times and slow loops against the quantization model."""

import numpy as np
import pytest
from scipy.optimize import curve_fit
from scipy.special import zeta
from scipy.stats import t as student_t

from megatron_tokscale.core.errors import TokscaleError, UndefinedError
from megatron_tokscale.laws.quanta.learning_times import frequency_exponent
from megatron_tokscale.laws.quanta.monogenic import (
    monogenic_mask,
    monogenic_share,
    scaled_mean_curve,
)
from megatron_tokscale.laws.quanta.quanta import alpha_from, exponents_from
from megatron_tokscale.results.verdict import Verdict

P_K = np.arange(1.0, 41) ** -1.4  # shares of 40 quanta of alpha 0.4, but for a factor


def test_exponents_follow_from_alpha_and_back():
    found = exponents_from(0.4)
    assert (found.parameters, found.data, found.steps) == pytest.approx((0.4, 0.4 / 1.4, 0.4 / 1.4))
    assert exponents_from(0.4, b=0.81).steps == pytest.approx(0.4 / 1.4 / 0.81)
    for alpha in (0.083, 0.4, 3.0):
        assert alpha_from(exponents_from(alpha).steps) == pytest.approx(alpha)
        assert alpha_from(exponents_from(alpha, b=0.81).steps, b=0.81) == pytest.approx(alpha)


@pytest.mark.parametrize("b", [1.0, 0.81])
def test_quanta_learned_in_turn_make_the_exponent_in_steps(b):
    """Quantum n needs p_n^-b steps; the loss is the sum of p_k over k > n. Take its late slope."""
    n = np.array([1e6, 1e7])
    alpha = 0.4
    steps = n ** (b * (alpha + 1))
    slope = -np.diff(np.log(zeta(alpha + 1, n + 1))) / np.diff(np.log(steps))
    assert slope[0] == pytest.approx(exponents_from(alpha, b=b).steps, rel=1e-4)


def test_exponents_that_no_quanta_give_are_refused():
    for alpha in (0.0, -1.0, np.nan, np.inf):
        with pytest.raises(TokscaleError, match="expected a positive, finite alpha"):
            exponents_from(alpha)
    with pytest.raises(UndefinedError, match="quanta of any alpha give less than 1,"):
        alpha_from(1.0)


def test_an_exact_relation_of_frequency_and_time_gives_b():
    found = frequency_exponent(P_K, 300 * P_K**-0.81)
    assert found.b.value == pytest.approx(0.81, abs=1e-4)
    assert found.b_without_onset.value == pytest.approx(0.81)
    assert found.onset == pytest.approx(0, abs=1)
    assert found.r2 == pytest.approx(1)


RATE_I = np.geomspace(0.02, 3, 40)  # exposures a step, as in a small run


def test_quanta_with_an_onset_have_b_of_one_and_a_lower_slope():
    """Plant time = 60 + 20 / rate exactly."""
    found = frequency_exponent(RATE_I, 60 + 20 / RATE_I)
    assert found.b.value == pytest.approx(1, abs=1e-3)
    assert (found.onset, found.exposures) == pytest.approx((60, 20), rel=1e-2)
    assert found.test.verdict is Verdict.HOLDS
    assert found.b_without_onset.high < 0.65  # a line through ln time refuses the true theory


def test_the_fit_agrees_with_scipys_curve_fit_on_weighted_log_times():
    rng = np.random.default_rng(4)
    time_I = (60 + 20 / RATE_I) * np.exp(0.1 * rng.standard_normal(40))
    weight_I = rng.uniform(1, 9, 40)
    (onset, exposures, b), _ = curve_fit(
        lambda p, t0, e, b: np.log(t0 + e * p**-b),
        RATE_I,
        np.log(time_I),
        p0=[50, 30, 0.8],
        sigma=weight_I**-0.5,
        bounds=(0, np.inf),
    )
    found = frequency_exponent(RATE_I, time_I, weight_I=weight_I)
    assert (found.onset, found.exposures, found.b.value) == pytest.approx(
        (onset, exposures, b), rel=1e-3
    )


def test_the_line_without_an_onset_is_numpys_weighted_one():
    rng = np.random.default_rng(4)
    time_I = (60 + 20 / RATE_I) * np.exp(0.1 * rng.standard_normal(40))
    weight_I = rng.uniform(1, 9, 40)
    (slope, _), covariance = np.polyfit(
        np.log(RATE_I), np.log(time_I), 1, w=np.sqrt(weight_I), cov=True
    )
    found = frequency_exponent(RATE_I, time_I, weight_I=weight_I).b_without_onset
    assert found.value == pytest.approx(-slope)
    reach = student_t.ppf(0.975, 38) * np.sqrt(covariance[0, 0])
    assert found.high - found.value == pytest.approx(reach)


@pytest.mark.parametrize(("b", "onset"), [(1.0, 60.0), (0.81, 0.0)])
def test_intervals_of_b_cover(b, onset):
    rng = np.random.default_rng(1)
    n_runs, fits = 60, []
    for _ in range(n_runs):
        noise_I = np.exp(0.1 * rng.standard_normal(40))
        fits.append(frequency_exponent(RATE_I, (onset + 20 * RATE_I**-b) * noise_I))
    assert sum(fit.b.low <= b <= fit.b.high for fit in fits) >= 0.87 * n_runs
    wrong = Verdict.FAILS if b == 1 else Verdict.HOLDS
    assert not any(fit.test.verdict is wrong for fit in fits)


def test_a_few_groups_with_scatter_are_undecided():
    rng = np.random.default_rng(2)
    rate_I = np.geomspace(0.1, 1, 6)
    found = frequency_exponent(rate_I, (60 + 20 / rate_I) * np.exp(0.3 * rng.standard_normal(6)))
    assert found.test.verdict is Verdict.UNDECIDED


def test_groups_that_were_not_learned_take_rarer_ones_with_them():
    time_I = 60 + 20 / RATE_I
    time_I[10] = np.inf
    found = frequency_exponent(RATE_I, time_I)
    assert (found.n_groups, found.n_censored) == (29, 11)
    assert found.b.value == pytest.approx(1, abs=1e-2)
    late = frequency_exponent(RATE_I, 60 + 20 / RATE_I, end=300)
    assert late.n_groups == (60 + 20 / RATE_I <= 300).sum()


@pytest.mark.parametrize(
    ("frequency", "time", "message"),
    [
        ([1, 2, 3, 4], [4, 3, 2, 1], "4 groups were learned within the run"),
        (np.ones(9), np.ones(8), "one of each per group"),
        ([1, 2, 3, 4, 0, 5], np.ones(6), "not positive"),
        ([1, 2, 3, 4, 5], [1, 2, 3, 4, np.inf], "0 groups were learned within the run"),
        (np.ones(9), np.arange(1, 10), "all groups have the same frequency"),
    ],
)
def test_groups_without_a_slope_are_refused(frequency, time, message):
    with pytest.raises((TokscaleError, UndefinedError), match=message):
        frequency_exponent(frequency, time)


def is_monogenic(loss_K, max_before):
    """Apply the rule in a loop over every j, u and l (`low`) at which a band can begin to fit."""
    corners = [*loss_K, *(loss_K - 0.7)]
    for j in range(1, max_before + 1):
        for u in [2.7, 11.0, *corners]:
            for low in [0.0, u - 2.0, *corners]:
                if not (2.7 <= u <= 11 and 0 <= low <= u - 2.0):
                    continue
                before = all(u <= loss <= u + 0.7 for loss in loss_K[:j])
                if before and all(low <= loss <= low + 0.7 for loss in loss_K[j:]):
                    return True
    return False


@pytest.mark.parametrize("max_before", [2, 5])
def test_the_mask_agrees_with_a_loop_over_all_bands(max_before):
    """Plant falls between noisy plateaus whose heights and noise are near the rule's limits."""
    rng = np.random.default_rng(2)
    n_tokens, n_probes = 1000, 6
    high = rng.uniform(2, 12, n_tokens)
    low = np.maximum(high - rng.uniform(1.5, 5, n_tokens), 0)
    after = np.arange(n_probes) >= rng.integers(0, 7, n_tokens)[:, None]
    noise = rng.uniform(0, 0.8, (n_tokens, 1)) * rng.random((n_tokens, n_probes))
    loss_NK = np.where(after, low[:, None], high[:, None]) + noise
    loss_NK[:10, 3] = np.nan
    expected = [is_monogenic(loss_K, max_before) for loss_K in loss_NK]
    mask = monogenic_mask(loss_NK, max_before=max_before)
    assert mask.tolist() == expected
    assert 0.1 < mask.mean() < 0.9
    assert not mask[:10].any()


def test_the_mask_does_not_depend_on_the_blocks(monkeypatch):
    rng = np.random.default_rng(3)
    loss_NK = np.cumsum(rng.uniform(-4, 0.5, (500, 4)), axis=1) + 12
    whole = monogenic_mask(loss_NK)
    monkeypatch.setattr("megatron_tokscale.laws.quanta.monogenic._BLOCK", 7)
    assert (monogenic_mask(loss_NK) == whole).all()
    assert monogenic_mask(np.empty((0, 4))).shape == (0,)


def test_steps_are_monogenic_and_scaled_mean_curves_are_not():
    """Plant tokens that step one after the other: their mean falls smoothly, as the paper says."""
    at = np.linspace(0.5, 11.5, 24)
    loss_NK = np.where(np.arange(13) > at[:, None], 0.5, 5.0)
    null_NK = scaled_mean_curve(loss_NK.mean(axis=0), loss_NK)
    assert null_NK[:, [0, -1]] == pytest.approx(loss_NK[:, [0, -1]])
    blocks = [(loss_NK[:10], null_NK[:10]), (loss_NK[10:], null_NK[10:])]
    found = monogenic_share(blocks)
    assert (found.share, found.null_share, found.n_tokens) == (1.0, 0.0, 24)


def test_losses_that_show_no_steps_are_refused():
    with pytest.raises(UndefinedError, match="2 probes or more"):
        monogenic_mask(np.ones((5, 1)))
    with pytest.raises(TokscaleError, match="one null curve per token"):
        monogenic_share([(np.ones((5, 3)), np.ones((4, 3)))])
    with pytest.raises(UndefinedError, match="no tokens"):
        monogenic_share([])
    with pytest.raises(UndefinedError, match="do not fall"):
        scaled_mean_curve([2.0, 1.0, 2.0], np.ones((4, 3)))
