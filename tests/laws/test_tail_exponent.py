"""Planted tails against `tail_exponent`. G grid points."""

import numpy as np
import pytest

from megatron_tokscale.errors import TokscaleError
from megatron_tokscale.laws import fit_power_law, tail_exponent

X_G = np.linspace(0, 10, 256)


def smoothed_tail(rng, exponent, n_tokens, bandwidth):
    """Learning times drawn from exp(-a x), one nat each, smoothed as the spectrum room does."""
    midpoint = rng.exponential(1 / exponent, n_tokens)
    z = (X_G[:, None] - midpoint) / bandwidth
    return np.exp(-(z**2) / 2).sum(axis=1) / (n_tokens * bandwidth * np.sqrt(2 * np.pi))


def test_an_exact_tail_gives_its_exponent():
    tail = tail_exponent(X_G, 0.7 * np.exp(-0.42 * X_G), from_x=3, to_x=8)
    assert tail.exponent == pytest.approx(0.42)
    assert tail.se == pytest.approx(0, abs=1e-9)
    assert tail.r2 == pytest.approx(1)
    assert 3 <= tail.from_x < tail.to_x <= 8


def test_only_the_tail_counts():
    rho = np.where(X_G < 4, 1.0, np.exp(-0.6 * X_G))
    assert tail_exponent(X_G, rho, from_x=4).exponent == pytest.approx(0.6)


def test_without_a_kernel_the_error_is_whites_of_weighted_least_squares():
    """Against the textbook sandwich (X'WX)^-1 X'W diag(r^2) W X (X'WX)^-1."""
    rng = np.random.default_rng(0)
    rho = np.exp(-0.5 * X_G + 0.2 * rng.standard_normal(len(X_G)))
    design = np.stack([np.ones_like(X_G), X_G], axis=1)
    bread = np.linalg.inv(design.T @ (rho[:, None] * design))
    line = bread @ design.T @ (rho * np.log(rho))
    scores = design * (rho * (np.log(rho) - design @ line))[:, None]
    n = rho.sum() ** 2 / (rho**2).sum()
    covariance = bread @ scores.T @ scores @ bread * n / (n - 2)
    tail = tail_exponent(X_G, rho, from_x=0)
    assert tail.exponent == pytest.approx(-line[1])
    assert tail.se == pytest.approx(np.sqrt(covariance[1, 1]))


def test_intervals_cover_the_exponent_of_a_smoothed_sample():
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(200):
        rho = smoothed_tail(rng, 0.4, 2000, 0.1)
        low, high = tail_exponent(X_G, rho, from_x=0.5, to_x=8, bandwidth=0.1).interval
        covered += low <= 0.4 <= high
    assert covered >= 0.88 * 200


def test_a_tail_and_the_loss_it_makes_have_one_exponent():
    """L - E is the integral of rho beyond x: papers.md 1.4, by quadrature on a long grid."""
    x = np.linspace(0, 60, 60_001)
    rho = np.exp(-0.35 * x) * (1 - np.exp(-x))
    left = np.cumsum(rho[::-1])[::-1] * (x[1] - x[0])
    late = slice(6000, 12_000, 100)
    law = fit_power_law(np.exp(x[late]), 1.7 + left[late], from_=0, n_resamples=2)
    tail = tail_exponent(x[late], rho[late], from_x=6)
    assert tail.exponent == pytest.approx(0.35, abs=2e-3)
    assert law.exponent == pytest.approx(tail.exponent, abs=2e-3)
    assert law.floor == pytest.approx(1.7, abs=2e-3)


@pytest.mark.parametrize(
    ("rho", "message"),
    [
        (np.where(X_G > 5, np.nan, 1.0), "finite density"),
        (-np.ones_like(X_G), "not negative"),
        (np.zeros_like(X_G), "0.0 independent points"),
        (np.ones(3), "per grid point"),
    ],
)
def test_what_is_no_spectrum_with_a_tail_is_refused(rho, message):
    with pytest.raises(TokscaleError, match=message):
        tail_exponent(X_G, rho, from_x=1)


def test_a_tail_shorter_than_the_kernel_is_refused():
    with pytest.raises(TokscaleError, match="start it earlier"):
        tail_exponent(X_G, np.exp(-X_G), from_x=8, bandwidth=0.5)
