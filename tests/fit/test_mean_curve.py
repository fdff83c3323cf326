"""The curve through means: sharp steps stay in it, noise of single probes does not.

Shapes: T probes.
"""

import numpy as np
import pytest
from numpy.testing import assert_allclose
from scipy.special import expit

from megatron_tokscale.fit.mean_curve import MeanCurve

X_T = np.linspace(0, 6, 60)
STEPS = {
    "a large step": 2.0 * (X_T < 3),
    "a step on a slope": 0.5 * (X_T < 2) - 0.3 * X_T,
    "two steps": 1.0 * (X_T < 2) + 1.0 * (X_T < 4) - 0.3 * X_T,
    "a step before the last probe": 1.0 * (X_T < 5.95) - 0.3 * X_T,
    "a rise that stays": 0.8 * (X_T > 4) - 0.3 * X_T,
    "a fall over three probes": 2 * np.clip((3.15 - X_T) / 0.3, 0, 1),
    "a kink": -np.maximum(X_T - 3, 0),
    "a sigmoid of two spacings": 2 * expit((3 - X_T) / 0.2),
    "a smooth fall": 2 * expit((3 - X_T) / 0.6),
}


@pytest.mark.parametrize("name", STEPS)
def test_sharp_changes_that_stay_are_not_departures(name):
    for seed in range(5):
        noise_T = 0.02 * np.random.default_rng(seed).standard_normal(60)
        found = MeanCurve.from_means(X_T, STEPS[name] + noise_T)
        assert np.abs(found.departure_T - noise_T).max() < 0.06, name
        assert np.abs(found.departure_T).max() < 0.09


@pytest.mark.parametrize("name", ["a large step", "two steps", "a step before the last probe"])
def test_without_noise_a_step_leaves_no_departure(name):
    assert np.abs(MeanCurve.from_means(X_T, STEPS[name]).departure_T).max() < 1e-3


def test_departures_are_the_noise_and_its_variance_is_found():
    variances, shares = [], []
    for seed in range(20):
        noise_T = 0.2 * np.random.default_rng(seed).standard_normal(60)
        found = MeanCurve.from_means(X_T, STEPS["a smooth fall"] + noise_T)
        variances.append(found.noise_variance)
        shares.append(((found.departure_T - noise_T) ** 2).sum() / (noise_T**2).sum())
    assert_allclose(np.mean(variances), 0.04, rtol=0.2)
    assert np.mean(shares) < 0.25


def test_a_step_is_found_where_it_is():
    noise_T = 0.02 * np.random.default_rng(0).standard_normal(60)
    found = MeanCurve.from_means(X_T, STEPS["a large step"] + noise_T)
    assert found.jumps == (int((X_T >= 3).argmax()),)
    assert (found.kinks, found.outliers) == ((), ())


def test_one_probe_that_is_far_off_is_an_outlier_and_departs_wholly():
    spike_T = 1.5 * (np.arange(60) == 30)
    noise_T = 0.02 * np.random.default_rng(1).standard_normal(60)
    found = MeanCurve.from_means(X_T, -0.3 * X_T + spike_T + noise_T)
    assert found.outliers == (30,)
    assert_allclose(found.departure_T[30], 1.5, atol=0.06)
    assert np.abs(np.delete(found.departure_T, 30)).max() < 0.09


def test_chance_adds_few_jumps_to_a_smooth_curve():
    added = 0
    for seed in range(40):
        noise_T = 0.1 * np.random.default_rng(seed).standard_normal(60)
        found = MeanCurve.from_means(X_T, -0.3 * X_T + noise_T)
        added += bool(found.jumps or found.kinks or found.outliers)
    assert added <= 6  # 5% of 40 are two; seven have a chance of 0.3%
