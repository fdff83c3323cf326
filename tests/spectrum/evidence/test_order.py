"""The learning order against scipy's Spearman and numpy's least squares."""

import numpy as np
import pytest
from scipy.stats import rankdata, spearmanr

from megatron_tokscale.core.errors import UndefinedError
from megatron_tokscale.results.verdict import Verdict
from megatron_tokscale.spectrum import Units
from megatron_tokscale.spectrum.evidence.order import learning_order

N_TOKENS = 600


@pytest.fixture
def planted():
    """Times of both runs (some missing), predictors of them, and documents of ten tokens."""
    rng = np.random.default_rng(0)
    baseline = {name: rng.standard_normal(N_TOKENS) for name in ("unigram", "position")}
    baseline["unigram"] = baseline["unigram"].round(1)
    source = baseline["unigram"] + 0.8 * rng.standard_normal(N_TOKENS)
    target = source + 0.5 * baseline["position"] + rng.standard_normal(N_TOKENS)
    source[::17], target[5::23] = np.nan, np.nan
    return (
        source,
        target,
        baseline,
        Units.from_documents(np.zeros(N_TOKENS), np.arange(N_TOKENS) // 10, seed=0),
    )


def order_of(source, target, baseline, units, n_resamples=100):
    return learning_order(
        source, target, baseline, units.unit_N, units.weights(n_resamples, seed=0)
    )


def explained(rank, predictors):
    design = np.stack([np.ones(len(rank)), *predictors], axis=1)
    residual = rank - design @ np.linalg.lstsq(design, rank, rcond=None)[0]
    return residual, 1 - residual.var() / rank.var()


def test_correlations_agree_with_scipy(planted):
    source, target, baseline, _ = planted
    both = np.isfinite(source) & np.isfinite(target)
    found = order_of(*planted)
    assert found.tokens == both.sum()
    for name, predictor in ({"learning time in the other run": source} | baseline).items():
        expected = spearmanr(predictor[both], target[both])[0]
        np.testing.assert_allclose(found.spearman[name].uncorrected, expected, atol=1e-9)


def test_explained_variance_is_that_of_least_squares_on_ranks(planted):
    source, target, baseline, _ = planted
    both = np.isfinite(source) & np.isfinite(target)
    rank = rankdata(target[both])
    scaled = [rankdata(each[both]) / both.sum() - 0.5 for each in baseline.values()]
    ranks = [each**power for each in scaled for power in (1, 2, 3)]
    found = order_of(*planted)
    own, by_baseline = explained(rank, ranks)
    _, by_all = explained(rank, [*ranks, rankdata(source[both])])
    np.testing.assert_allclose(found.explained_by_baseline.uncorrected, by_baseline, atol=1e-4)
    np.testing.assert_allclose(found.explained_with_time.uncorrected, by_all, atol=1e-4)
    np.testing.assert_allclose(found.gain.uncorrected, by_all - by_baseline, atol=1e-4)
    other, _ = explained(rankdata(source[both]), ranks)
    np.testing.assert_allclose(
        found.test.estimate.uncorrected, np.corrcoef(own, other)[0, 1], atol=1e-4
    )


def test_the_claim_holds_for_an_order_that_agrees_and_not_for_a_random_one(planted):
    source, target, baseline, units = planted
    assert order_of(*planted).test.verdict is Verdict.HOLDS
    rng = np.random.default_rng(1)
    found = [order_of(rng.permutation(source), target, baseline, units) for _ in range(40)]
    assert sum(each.test.verdict is Verdict.HOLDS for each in found) <= 2


def test_the_claim_does_not_hold_for_an_order_by_the_baseline_predictors_alone(planted):
    """Both runs learn by frequency and position alone, so their orders agree in nothing else."""
    _, _, baseline, units = planted
    rng = np.random.default_rng(2)
    holds = 0
    for _ in range(40):
        a, b = (
            baseline["unigram"] + 0.5 * baseline["position"] + 0.7 * rng.standard_normal(N_TOKENS)
            for _ in range(2)
        )
        found = order_of(a, b, baseline, units)
        assert found.spearman["learning time in the other run"].value > 0.4
        holds += found.test.verdict is Verdict.HOLDS
    assert holds <= 2


def test_a_small_correlation_beyond_the_predictors_does_not_hold():
    """It differs from zero, and is below the least size that the claim asks for."""
    rng = np.random.default_rng(4)
    shared, n = rng.standard_normal(60_000), 60_000
    a, b = (0.22 * shared + rng.standard_normal(n) for _ in range(2))
    units = Units.from_documents(np.zeros(n), np.arange(n) // 100, seed=0)
    found = order_of(a, b, {"unigram": rng.standard_normal(n)}, units)
    assert 0.03 < found.test.estimate.low < found.test.estimate.high < 0.1
    assert found.test.verdict is Verdict.FAILS


def test_weights_are_copies_of_documents(planted):
    source, target, baseline, units = planted
    weight_U = units.weights(1, seed=3)[1].astype(int)
    copies = np.repeat(np.arange(N_TOKENS), weight_U[units.unit_N])
    copies = copies[np.isfinite(source[copies]) & np.isfinite(target[copies])]
    expected = spearmanr(source[copies], target[copies])[0]
    weight_RU = np.stack([weight_U, np.ones(len(units))]).astype(float)
    found = learning_order(source, target, baseline, units.unit_N, weight_RU)
    np.testing.assert_allclose(
        found.spearman["learning time in the other run"].uncorrected,
        expected,
        atol=1e-9,
    )


def test_below_fifty_tokens_the_order_is_undefined(planted):
    source, target, baseline, units = planted
    source[40:] = np.nan
    both = int((np.isfinite(source) & np.isfinite(target)).sum())
    assert both < 50
    with pytest.raises(UndefinedError, match=f"only {both} tokens have a learning time in both"):
        order_of(source, target, baseline, units)
