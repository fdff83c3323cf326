"""The sums by unit against loops over tokens, and a weight of w against w copies.

Shapes: N tokens, K probe steps, U units, R resamples.
"""

from itertools import pairwise

import numpy as np
import pytest
from planted import of_class, sigmoids
from scipy.special import expit

from megatron_tokscale.core.errors import UndefinedError
from megatron_tokscale.fit import TokenClass, fit_sigmoids
from megatron_tokscale.spectrum import Bins, DocumentSums, LearningTimeSpectrum, Units, events_of
from megatron_tokscale.spectrum.density import PERIODS
from megatron_tokscale.spectrum.sums import CLASSES, loss_sums, model_sums

X_K = np.concatenate([[-np.inf], np.linspace(0, 8, 49)])
UNITS = 30


@pytest.fixture(scope="module")
def tokens():
    """Fits of every class, losses (one missing), and the units of 40 tokens each."""
    rng = np.random.default_rng(0)
    clean_NK = np.concatenate([of_class(each, 200, X_K) for each in CLASSES])
    clean_NK = rng.permutation(clean_NK)
    loss_NK = (clean_NK + 0.1 * rng.standard_normal(clean_NK.shape)).astype(np.float32)
    loss_NK[7, 3] = np.nan
    return fit_sigmoids(X_K, loss_NK), loss_NK, np.sort(np.arange(len(loss_NK)) % UNITS)


def sums_of(tokens, cuts=()):
    fits, loss_NK, unit_N = tokens
    ends = [0, *cuts, len(loss_NK)]
    parts = [slice(a, b) for a, b in pairwise(ends)]
    blocks = [(fits.rows(at), loss_NK[at], unit_N[at]) for at in parts]
    return DocumentSums.from_blocks(X_K, blocks, UNITS)


def test_every_sum_is_the_loop_over_its_tokens(tokens):
    fits, loss_NK, unit_N = tokens
    sums = sums_of(tokens)
    predicted_NK = fits.predict(np.maximum(X_K, -1e6))
    events, edges = events_of(fits), Bins.over(X_K).edges
    for u in range(UNITS):
        own = np.flatnonzero((unit_N == u) & fits.complete_N)
        assert sums.tokens_U[u] == len(own)
        np.testing.assert_allclose(sums.loss_UK[u], loss_NK[own].sum(axis=0), rtol=1e-5)
        np.testing.assert_allclose(sums.full_UK[u], predicted_NK[own].sum(axis=0), rtol=1e-5)
        of_unit = np.isin(events.token_E, own)
        midpoint, drop = events.midpoint_E[of_unit], events.drop_E[of_unit]
        np.testing.assert_allclose(sums.count_UC[u], np.histogram(midpoint, edges)[0])
        np.testing.assert_allclose(
            sums.drop_UC[u], np.histogram(midpoint, edges, weights=drop)[0], rtol=1e-6
        )
        np.testing.assert_allclose(sums.drop_width_UPV[u].sum(), drop.sum())
        assert sums.count_width_UPV[u].sum() == len(midpoint)
        for j, each in enumerate(CLASSES):
            chosen = own[fits.class_N[own] == each]
            assert sums.class_UJ[u, j] == len(chosen)
            np.testing.assert_allclose(
                sums.fall_UJ[u, j], (loss_NK[chosen, 0] - loss_NK[chosen, -1]).sum(), atol=1e-3
            )


@pytest.mark.parametrize("cuts", [(1,), (500,), (3, 4, 5, 1100), tuple(range(100, 1200, 100))])
def test_sums_do_not_depend_on_the_cuts_between_blocks(tokens, cuts):
    whole, cut = sums_of(tokens), sums_of(tokens, cuts)
    for name, value in vars(whole).items():
        np.testing.assert_allclose(getattr(cut, name), value, rtol=1e-9, atol=1e-6, err_msg=name)


def test_a_weight_of_w_is_w_copies_of_the_document(tokens):
    fits, loss_NK, unit_N = tokens
    weight_RU = Units.from_documents(np.zeros(UNITS), np.arange(UNITS), seed=0).weights(3, seed=2)
    resampled = sums_of(tokens).resampled(X_K, weight_RU)
    for r, weight_U in enumerate(weight_RU.astype(int)):
        copies = np.repeat(np.arange(len(unit_N)), weight_U[unit_N])
        one = DocumentSums.from_blocks(
            X_K, [(fits.rows(copies), loss_NK[copies], np.zeros(len(copies), int))], 1
        ).resampled(X_K, np.ones((1, 1)))
        for name in ("tokens_R", "loss_RK", "full_RK", "count_RC", "drop_RC", "width_R"):
            np.testing.assert_allclose(
                getattr(resampled, name)[r], getattr(one, name)[0], rtol=1e-5, atol=1e-9
            )


def test_common_width_is_the_drop_weighted_median(tokens):
    fits = tokens[0]
    events = events_of(fits)
    order = np.argsort(events.width_E)
    below = np.cumsum(events.drop_E[order])
    median = events.width_E[order][np.searchsorted(below, below[-1] / 2)]
    width = sums_of(tokens).resampled(X_K, np.ones((1, UNITS))).width_R[0]
    np.testing.assert_allclose(width, median, rtol=0.02)


def test_reconstructed_curves_convolve_events_with_the_mean_kernel_of_their_period(tokens):
    fits, loss_NK, unit_N = tokens
    from_x = 2.0
    sums = DocumentSums.from_blocks(X_K, [(fits, loss_NK, unit_N)], UNITS, from_x=from_x)
    curves = sums.resampled(X_K, np.ones((1, UNITS)), from_x=from_x).curves()
    events, n_tokens = events_of(fits, from_x=from_x), fits.complete_N.sum()
    starts = np.linspace(from_x, X_K[-1], PERIODS)[:-1]
    period_E = np.searchsorted(starts, events.midpoint_E, side="right")
    scored_E = period_E > 0
    alike_E = np.where(scored_E, events.drop_E[scored_E].mean(), events.drop_E[~scored_E].mean())
    expected = {"kernel": np.zeros(len(X_K)), "spectrum": np.zeros(len(X_K))}
    for period in np.unique(period_E):
        part = events.rows(period_E == period)
        for k, x in enumerate(X_K):
            s_EE = expit((part.midpoint_E[:, None] - x) / part.width_E)
            by_drop = s_EE @ part.drop_E / part.drop_E.sum()
            expected["kernel"][k] += part.drop_E @ by_drop / n_tokens
            expected["spectrum"][k] += alike_E[period_E == period] @ s_EE.mean(axis=1) / n_tokens
    for name, loss_K in expected.items():
        np.testing.assert_allclose(curves[name][0], loss_K, atol=6e-3)


def test_the_spectrum_of_the_sums_is_that_of_the_fits(tokens):
    whole = sums_of(tokens).resampled(X_K, np.ones((1, UNITS)))
    binned = LearningTimeSpectrum.from_bins(
        X_K, whole.count_RC[0], whole.drop_RC[0], int(whole.tokens_R[0])
    )
    direct = LearningTimeSpectrum.from_fits(tokens[0])
    np.testing.assert_allclose(binned.density_G, direct.density_G, rtol=1e-9)
    np.testing.assert_allclose(binned.drop_weighted_G, direct.drop_weighted_G, rtol=1e-9)
    assert (binned.n_events, binned.n_tokens) == (direct.n_events, direct.n_tokens)


def test_a_resample_that_draws_no_token_is_undefined_and_others_are_not(tokens):
    weight_RU = np.stack([np.ones(UNITS), np.zeros(UNITS)])
    resampled = sums_of(tokens).resampled(X_K, weight_RU)
    assert np.isfinite(resampled.loss_RK[0]).all()
    assert np.isnan(resampled.loss_RK[1]).all()
    assert np.isnan(resampled.width_R[1])


def test_no_complete_token_is_refused():
    data = sigmoids(20, 30)
    data.loss_NK[:, 5] = np.nan
    fits = fit_sigmoids(data.x_K, data.loss_NK)
    with pytest.raises(UndefinedError, match="no token has a fit and finite losses"):
        DocumentSums.from_blocks(data.x_K, [(fits, data.loss_NK, np.zeros(20, int))], 1)


def test_losses_and_models_are_added_up_by_cell():
    data = sigmoids(300, 30)
    fits = fit_sigmoids(data.x_K, data.loss_NK)
    cell_N = np.random.default_rng(1).integers(0, 4, 300)
    losses, models = loss_sums(data.loss_NK, cell_N, 5), model_sums(fits, cell_N, 5, data.x_K)
    assert (losses[4] == 0).all()
    for cell in range(4):
        own = cell_N == cell
        np.testing.assert_allclose(losses[cell], data.loss_NK[own].sum(axis=0), rtol=1e-5)
        predicted_K = fits.predict(data.x_K)[own].sum(axis=0)
        np.testing.assert_allclose(models[cell], predicted_K, rtol=1e-5)
    assert fits.is_class(TokenClass.FALLING).any()
