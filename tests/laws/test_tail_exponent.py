"""Planted tails against `tail_exponent`. C bins, R resamples."""

import numpy as np
import pytest
from scipy.optimize import minimize_scalar

from megatron_tokscale.core.errors import TokscaleError, UndefinedError
from megatron_tokscale.laws import fit_power_law, tail_exponent

EDGES = np.linspace(0, 10, 2049)
X_C = (EDGES[1:] + EDGES[:-1]) / 2


def histogram(midpoint_N, weight_N=None):
    return np.histogram(midpoint_N, EDGES, weights=weight_N)[0].astype(float)


@pytest.mark.parametrize("exponent", [0.42, 3.0, -0.3])
def test_an_exact_tail_gives_its_exponent(exponent):
    drop_C = -np.diff(np.exp(-exponent * EDGES)) / exponent
    tail = tail_exponent(X_C, drop_C[None], from_x=3, to_x=8)
    assert tail.exponent.value == pytest.approx(exponent, abs=1e-4)
    assert (tail.from_x, tail.to_x) == pytest.approx((3, 8), abs=0.01)
    inside = (X_C > 3) & (X_C < 8)
    assert tail.share == pytest.approx(drop_C[inside].sum() / drop_C.sum(), rel=1e-6)


def test_the_exponent_maximises_the_likelihood():
    """Maximise the likelihood of a truncated exponential with scipy, on the weighted events."""
    rng = np.random.default_rng(0)
    midpoint_N, drop_N = rng.exponential(2, 3000), rng.uniform(0.1, 5, 3000)
    inside = (midpoint_N >= 1) & (midpoint_N <= 7)
    x_N, w_N = midpoint_N[inside] - 1, drop_N[inside]

    def loss(a):
        return -(w_N * (np.log(a / (1 - np.exp(-a * 6))) - a * x_N)).sum()

    best = minimize_scalar(loss, bounds=(0.01, 5), method="bounded", options={"xatol": 1e-8}).x
    tail = tail_exponent(X_C, histogram(midpoint_N, drop_N)[None], from_x=1, to_x=7)
    assert tail.exponent.value == pytest.approx(best, abs=2e-3)


def test_events_before_the_tail_do_not_matter():
    rng = np.random.default_rng(1)
    midpoint_N = 4 + rng.exponential(1 / 0.8, 20_000)
    early_N = rng.uniform(0, 3.9, 50_000)
    alone = tail_exponent(X_C, histogram(midpoint_N)[None], from_x=4, to_x=9)
    both = tail_exponent(
        X_C, histogram(np.concatenate([midpoint_N, early_N]))[None], from_x=4, to_x=9
    )
    assert both.exponent.value == alone.exponent.value == pytest.approx(0.8, abs=0.05)


def test_each_resample_has_its_own_exponent():
    rng = np.random.default_rng(2)
    rows = [histogram(rng.exponential(1 / a, 5000)) for a in (0.5, 1.0)]
    tail = tail_exponent(X_C, np.stack([*rows, np.zeros(2048)]), from_x=0, to_x=9)
    alone = [tail_exponent(X_C, row[None], from_x=0, to_x=9).exponent.value for row in rows]
    np.testing.assert_array_equal(tail.exponent_R[:2], alone)
    assert np.isnan(tail.exponent_R[2])


def test_a_tail_and_the_loss_it_makes_have_one_exponent():
    """L - E is the integral of rho beyond x (docs/references.md 1.4), by quadrature."""
    x = np.linspace(0, 60, 60_001)
    rho = np.exp(-0.35 * x) * (1 - np.exp(-x))
    left = np.cumsum(rho[::-1])[::-1] * (x[1] - x[0])
    late = slice(6000, 12_000, 100)
    law = fit_power_law(np.exp(x[late]), 1.7 + left[late], from_=0, n_resamples=2)
    tail = tail_exponent(x[:15_000], rho[None, :15_000], from_x=6, to_x=12)
    assert tail.exponent.value == pytest.approx(0.35, abs=2e-3)
    assert law.exponent.value == pytest.approx(tail.exponent.value, abs=2e-3)
    assert law.floor.value == pytest.approx(1.7, abs=2e-3)


@pytest.mark.parametrize(
    ("drop_C", "message"),
    [
        (np.where(X_C > 5, np.nan, 1.0), "not finite"),
        (-np.ones_like(X_C), "are negative"),
        (np.zeros_like(X_C), "no tail"),
        (np.where(X_C < 1, 1.0, 0.0), "hardly any learning times"),
    ],
)
def test_a_spectrum_without_a_tail_is_undefined(drop_C, message):
    with pytest.raises(UndefinedError, match=message):
        tail_exponent(X_C, drop_C[None], from_x=1, to_x=9)


def test_drops_of_other_bins_are_refused():
    with pytest.raises(TokscaleError, match="do not match"):
        tail_exponent(X_C, np.ones((1, 3)), from_x=1, to_x=9)


def test_a_tail_of_length_zero_is_refused():
    with pytest.raises(UndefinedError, match="start it earlier"):
        tail_exponent(X_C, np.ones((1, 2048)), from_x=9, to_x=8)
