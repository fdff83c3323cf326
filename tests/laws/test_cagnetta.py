"""Planted losses by context and published values against gamma and alpha_D."""

import numpy as np
import pytest
from scipy import stats

from megatron_tokscale.core.errors import TokscaleError, UndefinedError
from megatron_tokscale.laws.language.cagnetta import compare_exponents, data_exponent
from megatron_tokscale.laws.language.context_exponent import fit_context_exponent
from megatron_tokscale.laws.language.contexts import ContextBins
from megatron_tokscale.results.estimate import Estimate
from megatron_tokscale.results.laws import DataExponent
from megatron_tokscale.results.verdict import Verdict

CONTEXT_S = np.array([1, 2, 3, 4, 5, 6, 8, 10, 13, 16, 20, 26, 32, 41, 51, 64])


def law(context, gamma=0.325, floor=1.2, scale=3.0):
    return floor + scale * np.asarray(context, float) ** -gamma


@pytest.mark.parametrize("gamma", [0.2, 0.325, 0.6])
@pytest.mark.parametrize("floor", [0.6, 2.0])
def test_a_law_without_noise_is_found_exactly(gamma, floor):
    fit = fit_context_exponent(CONTEXT_S, law(CONTEXT_S, gamma, floor), n_resamples=5)
    # The floor is on a grid of 0.005 nats.
    assert fit.floor.value == pytest.approx(floor, abs=0.003)
    assert fit.gamma.value == pytest.approx(gamma, abs=2e-3)
    assert fit.scale == pytest.approx(3.0, abs=5e-3)
    assert fit.r2 == pytest.approx(1, abs=1e-6)
    assert (fit.n_points, fit.from_context, fit.to_context) == (16, 1, pytest.approx(64))


def test_a_known_floor_is_a_straight_line_in_logs():
    rng = np.random.default_rng(0)
    loss = law(CONTEXT_S) + 0.03 * rng.standard_normal(16)
    slope, level = np.polyfit(np.log(CONTEXT_S), np.log(loss - 1.2), 1)
    fit = fit_context_exponent(CONTEXT_S, loss, floor=1.2)
    assert fit.gamma.value == pytest.approx(-slope)
    assert fit.scale == pytest.approx(np.exp(level))
    assert (fit.floor.low, fit.floor.high) == (1.2, 1.2)
    assert fit.width == 0


def test_the_best_floor_is_that_of_a_plain_loop_over_the_grid():
    rng = np.random.default_rng(1)
    loss = law(CONTEXT_S) * np.exp(0.002 * rng.standard_normal(16))
    x = np.log(CONTEXT_S)
    floors = np.arange(0, loss.min(), 0.005)
    r2 = [np.corrcoef(x, np.log(loss - floor))[0, 1] ** 2 for floor in floors]
    gammas = [-np.polyfit(x, np.log(loss - floor), 1)[0] for floor in floors]
    fit = fit_context_exponent(CONTEXT_S, loss, n_resamples=5)
    assert fit.floor.value == floors[np.argmax(r2)]
    assert fit.r2 == pytest.approx(max(r2))
    near = [gamma for gamma, value in zip(gammas, r2, strict=True) if value >= max(r2) - 0.001]
    assert fit.width == pytest.approx(max(near) - min(near))


@pytest.mark.parametrize("resampled", [True, False])
def test_intervals_cover_a_planted_law(resampled):
    rng = np.random.default_rng(2)
    n_runs, covered = 60, np.zeros(2)
    for _ in range(n_runs):
        loss = law(CONTEXT_S) + 0.004 * rng.standard_normal(16)
        loss_RS = loss + 0.004 * rng.standard_normal((100, 16)) if resampled else None
        fit = fit_context_exponent(CONTEXT_S, loss, loss_RS=loss_RS, n_resamples=100)
        intervals = np.array([(each.low, each.high) for each in (fit.gamma, fit.floor)])
        covered += (intervals[:, 0] <= [0.325, 1.2]) & (intervals[:, 1] >= [0.325, 1.2])
    assert (covered >= 0.85 * n_runs).all()


def test_only_the_window_of_short_contexts_counts():
    context = np.arange(1, 513)
    loss = np.where(context <= 64, law(context), 5.0)
    fit = fit_context_exponent(context, loss, to_context=64, n_resamples=5)
    assert fit.gamma.value == pytest.approx(0.325, abs=5e-3)
    assert fit.n_points == 64


@pytest.mark.parametrize(
    ("context", "loss", "settings", "message"),
    [
        (CONTEXT_S[:4], law(CONTEXT_S[:4]), {}, "4 context lengths up to inf are too few"),
        (CONTEXT_S, law(CONTEXT_S)[:-1], {}, "expected one loss per length"),
        (CONTEXT_S, np.where(CONTEXT_S == 3, np.nan, 2.0), {}, "finite and positive"),
        (CONTEXT_S - 1, law(CONTEXT_S), {}, "do not ascend from 1"),
        (CONTEXT_S, law(CONTEXT_S), {"floor": 3.0}, "below all losses"),
        (CONTEXT_S, law(CONTEXT_S)[::-1], {}, "gamma is -"),
        (CONTEXT_S, law(CONTEXT_S, floor=0), {}, "floor is at the end of its grid"),
        (CONTEXT_S, 3 + np.arange(16) % 2 - 0.05 * np.arange(16), {}, r"R\^2 is 0"),
        (CONTEXT_S[:8], law(CONTEXT_S[:8]), {}, "floors that fit as well give gammas"),
        (
            CONTEXT_S,
            law(CONTEXT_S),
            {"loss_RS": np.full((3, 16), np.nan)},
            "resamples have no tokens",
        ),
    ],
)
def test_losses_without_a_power_law_of_context_are_refused(context, loss, settings, message):
    with pytest.raises((TokscaleError, UndefinedError), match=message):
        fit_context_exponent(context, loss, **settings)


def test_bins_by_length_of_context_and_their_means():
    bins = ContextBins.from_contexts([0, 1, 1, 2, 7, 8, 16, 17, 400], edges=range(1, 18))
    assert bins.context_S == pytest.approx([1, 2, 7, 8, 16])
    assert bins.bin_N.tolist() == [-1, 0, 0, 1, 2, 3, 4, -1, -1]
    assert bins.mean([9, 1, 3, 5, 6, 7, 8, 9, 9]).tolist() == [2, 5, 6, 7, 8]
    wide = ContextBins.from_contexts([0, 1, 2, 4, 9, 100], edges=[1, 3, 10, 30])
    assert wide.context_S == pytest.approx([2**0.5, 6])
    assert wide.mean([0, 1, 2, 3, 4, 0]).tolist() == [1.5, 3.5]
    assert ContextBins.from_contexts(np.arange(100)).context_S[[0, 1, -1]] == pytest.approx(
        [1, 2, 56], abs=0.6
    )
    with pytest.raises(UndefinedError, match="no token is predicted from 5 to 9 tokens"):
        ContextBins.from_contexts([1, 2, 30], edges=[5, 9])


def test_resamples_spread_as_means_of_clusters_do():
    """40 clusters of 25 equal tokens: the variance of the mean is that of 40 draws, not 1000."""
    rng = np.random.default_rng(3)
    cluster_N = np.repeat(np.arange(40), 25)
    loss_N = rng.standard_normal(40)[cluster_N] + 3
    bins = ContextBins.from_contexts(np.tile([1, 2, 3, 4, 5], 200))
    clusters_RS = bins.resample(loss_N, cluster_N=cluster_N, n_resamples=600, seed=0)
    tokens_RS = bins.resample(loss_N, n_resamples=600, seed=0)
    assert clusters_RS.mean(axis=0) == pytest.approx(bins.mean(loss_N), abs=0.03)
    assert clusters_RS.std(axis=0) == pytest.approx(loss_N.std() / 40**0.5, rel=0.15)
    assert tokens_RS.std(axis=0) == pytest.approx(loss_N.std() / 200**0.5, rel=0.15)


def test_means_of_few_documents_have_intervals_as_long_as_students():
    """Eight documents of one token: percentiles of a Poisson bootstrap are a quarter shorter."""
    bins, ratios = ContextBins.from_contexts(np.full(8, 3)), []
    for seed in range(20):
        loss_N = np.random.default_rng(seed).standard_normal(8) + 3
        mean_R = bins.resample(loss_N, n_resamples=2000, seed=seed)[:, 0]
        low, high = stats.t.interval(0.95, 7, scale=loss_N.std(ddof=1) / 8**0.5)
        ratios.append(np.diff(np.quantile(mean_R, [0.025, 0.975]))[0] / (high - low))
    assert np.mean(ratios) == pytest.approx(1, abs=0.06)


def test_a_single_document_has_no_resamples():
    bins = ContextBins.from_contexts([1, 2, 3])
    rows_RS = bins.resample([1.0, 2, 3], cluster_N=np.zeros(3, int), n_resamples=3, seed=0)
    assert np.isnan(rows_RS).all()


@pytest.mark.parametrize(
    ("gamma", "gamma_se", "beta", "beta_se", "published", "published_se"),
    [(0.325, 0.003, 0.88, 0.06, 0.185, 0.013), (0.265, 0.016, 0.94, 0.16, 0.141, 0.025)],
)
def test_the_published_predictions_follow_from_gamma_and_beta(
    gamma, gamma_se, beta, beta_se, published, published_se
):
    """TinyStories and WikiText-103, docs/references.md 2.4; their inputs are rounded too."""
    found = data_exponent(gamma, gamma_se, beta, beta_se)
    assert found.exponent.value == pytest.approx(published, abs=5e-4)
    assert found.se == pytest.approx(published_se, abs=6e-4)


def test_the_error_is_that_of_a_monte_carlo():
    rng = np.random.default_rng(4)
    draws = rng.normal(0.3, 0.01, 200_000) / (2 * rng.normal(0.9, 0.03, 200_000))
    found = data_exponent(0.3, 0.01, 0.9, 0.03)
    assert found.se == pytest.approx(draws.std(), rel=0.02)
    interval = (found.exponent.low, found.exponent.high)
    assert interval == pytest.approx(np.quantile(draws, [0.025, 0.975]), abs=2e-3)


def test_agreement_is_a_difference_in_standard_errors():
    predicted = DataExponent(Estimate(0.185), 0.012)
    found = compare_exponents(predicted, 0.160, 0.005, "measured")
    assert found.difference.value == pytest.approx(0.025)
    assert found.difference.high - 0.025 == pytest.approx(1.96 * 0.013)
    assert found.test.verdict is Verdict.UNDECIDED  # from -0.0005 to 0.0505: just beyond 0.05
    near = compare_exponents(predicted, 0.170, 0.005, "measured")
    assert near.test.verdict is Verdict.HOLDS
    assert compare_exponents(predicted, 0.100, 0.005, "measured").test.verdict is Verdict.FAILS
    with pytest.raises(UndefinedError, match="cannot be compared"):
        compare_exponents(DataExponent(Estimate(0.2), 0.0), 0.2, 0.0, "measured")


@pytest.mark.parametrize("values", [(0, 0.1, 1, 0.1), (0.3, 0.1, -1, 0.1), (0.3, np.nan, 1, 0.1)])
def test_exponents_that_are_not_positive_predict_no_data_exponent(values):
    with pytest.raises(UndefinedError, match="predict no data exponent"):
        data_exponent(*values)
