"""The forward prediction on planted runs, and its rivals against numpy and scipy.

Shapes: N tokens, K probe steps, U units.
"""

import numpy as np
import planted_pairs
import pytest
from scipy.optimize import curve_fit
from scipy.special import expit

from megatron_tokscale.core.errors import UndefinedError
from megatron_tokscale.fit import fit_sigmoids
from megatron_tokscale.results.verdict import ClaimTest
from megatron_tokscale.spectrum import Units
from megatron_tokscale.spectrum.evidence.forward import predict_forward
from megatron_tokscale.spectrum.groups import groupings
from megatron_tokscale.store import WatchedTokens

DOUBLING = np.log(2)


def forward_of(x_K, loss_NK, units, groups=None, n_resamples=20):
    return predict_forward(
        x_K, loss_NK, units, groups or {}, units.weights(n_resamples, seed=0), seed=0
    )


@pytest.fixture(scope="module")
def seen():
    """A run of wide transitions: (x_K, losses, units, groupings)."""
    rng = np.random.default_rng(0)
    x_K, text = planted_pairs.axis(60), planted_pairs.text_of(30, rng)
    tokens = text.probe_set
    units = Units.from_documents(tokens.dataset_N, tokens.document_N, seed=0)
    return (
        x_K,
        planted_pairs.seen_beginning(text, x_K, rng),
        units,
        groupings(WatchedTokens(tokens)),
    )


def test_only_the_first_half_of_the_time_is_fitted(seen):
    x_K, loss_NK, units, _ = seen
    found = forward_of(*seen[:3])
    first = x_K <= x_K[-1] - DOUBLING + 1e-9
    assert found.from_x == x_K[first][-1]
    assert found.to_x == x_K[-1]
    assert found.probes == (~first).sum()
    predicted_K = fit_sigmoids(x_K[first], loss_NK[:, first]).predict(x_K[~first]).mean(axis=0)
    measured_K = loss_NK[:, ~first].mean(axis=0)
    np.testing.assert_allclose(
        found.tokens.error.uncorrected, np.abs(predicted_K - measured_K).mean(), atol=1e-4
    )
    later_NK = loss_NK.copy()
    later_NK[:, ~first] += 1.0
    again = forward_of(x_K, later_NK, units)
    assert again.tokens.fall == found.tokens.fall


def test_the_rivals_are_a_line_and_a_power_law(seen):
    x_K, loss_NK, _, _ = seen
    found = forward_of(*seen[:3])
    mean_K = loss_NK.mean(axis=0, dtype=float)
    last = found.from_x
    held = x_K > last
    recent = (x_K <= last) & (x_K >= last - DOUBLING - 1e-9)
    line_K = np.polyval(np.polyfit(x_K[recent], mean_K[recent], 1), x_K[held])
    np.testing.assert_allclose(
        found.uniform.error.uncorrected, np.abs(line_K - mean_K[held]).mean(), rtol=1e-5
    )
    late = (x_K <= last) & (x_K >= last - np.log(10) - 1e-9)

    def law(x, floor, scale, exponent):
        return np.log(floor + scale * np.exp(-exponent * (x - last)))

    best, _ = curve_fit(
        law,
        x_K[late],
        np.log(mean_K[late]),
        [1.0, 1.0, 0.5],
        bounds=([0, 0, 0], [9, 99, 9]),
        loss="huber",
        f_scale=1e-3,
        method="trf",
    )
    error = np.abs(np.exp(law(x_K[held], *best)) - mean_K[held]).mean()
    np.testing.assert_allclose(found.power_law.error.uncorrected, error, rtol=0.1)


def test_the_power_law_predicts_a_run_whose_loss_is_a_power_law():
    """Plant narrow steps whose mean is a power law, none of them at the end of the first half."""
    rng = np.random.default_rng(1)
    x_K = planted_pairs.axis(60)
    midpoint_N = 1 + rng.exponential(2.0, 4000)
    near = np.abs(midpoint_N - (x_K[-1] - DOUBLING)) < 0.15
    midpoint_N = midpoint_N[~near]
    shape_NK = expit((midpoint_N[:, None] - x_K) / 0.02)
    loss_NK = (1 + 4 * shape_NK + 0.02 * rng.standard_normal(shape_NK.shape)).astype(np.float32)
    units = Units.from_documents(np.zeros(len(loss_NK)), np.arange(len(loss_NK)) // 20, seed=0)
    found = forward_of(x_K, loss_NK, units)
    assert found.gain_over_best_rival.low <= 0
    assert found.tokens.error.value > 2 * found.power_law.error.value


def test_groups_that_fall_after_the_first_half_are_predicted(seen):
    found = forward_of(*seen, n_resamples=50)
    assert found.gain_over_best_rival.low > 0
    for name in ("frequency decile", "document"):
        each = found.groups[name]
        assert min(each.events.low, each.gain_over_permuted.low) > 0
        assert each.p_value <= 0.05


def test_a_forward_prediction_has_no_verdict(seen):
    found = forward_of(*seen)
    for each in (found, *found.groups.values()):
        assert not any(isinstance(value, ClaimTest) for value in vars(each).values())


@pytest.mark.parametrize("n_probes", [6, 9])
def test_too_few_probes_are_refused(n_probes):
    x_K = np.array([-np.inf, *np.linspace(0, 8, n_probes - 1)])
    loss_NK = np.ones((16, n_probes), np.float32)
    units = Units.from_documents(np.zeros(16), np.arange(16) // 4, seed=0)
    with pytest.raises(UndefinedError, match=r"too few to predict it.*probe more often"):
        forward_of(x_K, loss_NK, units)
