"""`group_test` against planted groups, scipy and numpy. K probes, G groups, R resamples."""

import numpy as np
import pytest
from power_laws import TAU_K, correlated_noise, law, noisy
from scipy.optimize import curve_fit, nnls

from megatron_tokscale.core.errors import TokscaleError, UndefinedError
from megatron_tokscale.laws.one_third.group_test import group_test
from megatron_tokscale.results.verdict import Verdict


def softmax_groups(rng, n_groups=5, exponent=1 / 3):
    scale, floor = rng.uniform(5, 40, (n_groups, 1)), rng.uniform(0.3, 4, (n_groups, 1))
    return law(TAU_K, scale, exponent, floor)


def quanta_groups(rng, n_groups=5, width=0.4):
    x = np.log(TAU_K)
    midpoint = rng.uniform(x[0] + 0.3, x[-1] - 0.3, (n_groups, 1))
    drop, floor = rng.uniform(0.5, 5, (n_groups, 1)), rng.uniform(0.2, 4, (n_groups, 1))
    return floor + drop / (1 + np.exp((x - midpoint) / width))


@pytest.mark.parametrize("seed", range(50))
def test_groups_with_one_slope_and_with_own_times_get_the_right_verdict(seed):
    rng = np.random.default_rng(seed)
    softmax = noisy(rng, softmax_groups(rng))
    quanta = noisy(rng, quanta_groups(rng, width=rng.uniform(0.2, 0.8)))
    assert group_test(TAU_K, softmax).test.verdict is Verdict.HOLDS
    assert group_test(TAU_K, quanta).test.verdict is Verdict.FAILS


def test_noise_larger_than_the_signal_gives_no_verdict():
    rng = np.random.default_rng(0)
    flat = noisy(rng, np.full((5, 30), 3.0), 0.02)
    assert group_test(TAU_K, flat).test.verdict is Verdict.UNDECIDED


def test_groups_with_own_times_and_no_noise_are_fitted_exactly():
    loss = quanta_groups(np.random.default_rng(3))
    x = np.log(TAU_K)
    test = group_test(TAU_K, loss)
    fitted = np.array(test.drops.floor_G) + test.drops.drop_G / (
        1 + np.exp((x[:, None] - np.log(test.drops.midpoint_G)) / test.drops.width)
    )
    np.testing.assert_allclose(fitted.T, loss, rtol=2e-3)
    assert test.drops.width == pytest.approx(0.4, rel=1e-2)


def test_the_power_law_of_each_group_agrees_with_scipy():
    """Compare with curve_fit on relative residuals; the floors are inside the bounds."""
    rng = np.random.default_rng(4)
    loss = noisy(rng, softmax_groups(rng), 0.002)
    test = group_test(TAU_K, loss)
    total = 0.0
    for g, loss_K in enumerate(loss):
        (scale, alpha, floor), covariance = curve_fit(
            law, TAU_K, loss_K, p0=[10, 0.33, loss_K[-1] / 2], sigma=loss_K, bounds=(0, np.inf)
        )
        total += ((law(TAU_K, scale, alpha, floor) / loss_K - 1) ** 2).mean() / len(loss)
        assert test.exponents.exponent_G[g] == pytest.approx(alpha, rel=1e-3)
        # Profile intervals count correlated residuals: never much narrower than a covariance.
        assert test.exponents.se_G[g] > 0.8 * np.sqrt(covariance[1, 1])
    assert test.models["own slopes"].error == pytest.approx(total, rel=1e-4)


def test_the_sigmoid_of_each_group_agrees_with_scipy():
    def sigmoid(x, floor, drop, midpoint, width):
        return floor + drop / (1 + np.exp((x - midpoint) / width))

    rng = np.random.default_rng(5)
    loss = noisy(rng, quanta_groups(rng), 0.002)
    x = np.log(TAU_K)
    starts = zip(loss, np.log(group_test(TAU_K, loss).drops.midpoint_G), strict=True)
    total = 0.0
    for loss_K, midpoint in starts:
        best, _ = curve_fit(sigmoid, x, loss_K, p0=[loss_K[-1], 2, midpoint, 0.4], sigma=loss_K)
        total += ((sigmoid(x, *best) / loss_K - 1) ** 2).mean() / len(loss)
    assert group_test(TAU_K, loss).models["own times and widths"].error == pytest.approx(
        total, rel=1e-2
    )


@pytest.mark.parametrize("seed", range(3))
def test_the_linear_part_of_the_one_third_law_is_least_squares(seed):
    """Compare with numpy if both coefficients are positive, else with scipy's nnls."""
    rng = np.random.default_rng(seed)
    loss = noisy(rng, np.vstack([softmax_groups(rng), 30 * TAU_K**-0.8, 1 + 1e-4 * TAU_K]))
    errors = []
    for loss_K in loss:
        design = np.stack([np.ones(30), TAU_K ** (-1 / 3)], axis=1) / loss_K[:, None]
        free = np.linalg.lstsq(design, np.ones(30))[0]
        bounded, _ = nnls(design, np.ones(30))
        assert (free > 0).all() == (np.abs(free - bounded) < 1e-6).all()
        errors.append(((design @ bounded - 1) ** 2).mean())
    assert group_test(TAU_K, loss).models["one third"].error == pytest.approx(np.mean(errors))


def test_held_out_errors_are_those_of_fits_without_the_block():
    rng = np.random.default_rng(6)
    loss = noisy(rng, softmax_groups(rng))
    blocks = np.array_split(np.arange(30), 10)[1:-1]
    held_out = group_test(TAU_K, loss).models["one third"].held_out_error_B
    for block, error in zip(blocks, held_out, strict=True):
        kept = np.setdiff1d(np.arange(30), block)
        by_group = []
        for loss_K in loss:
            design = np.stack([np.ones(30), TAU_K ** (-1 / 3)], axis=1) / loss_K[:, None]
            best, _ = nnls(design[kept], np.ones(len(kept)))
            by_group.append(((design[block] @ best - 1) ** 2).mean())
        assert error == pytest.approx(np.mean(by_group))


def test_the_number_of_parameters_counts_every_group():
    test = group_test(TAU_K, softmax_groups(np.random.default_rng(7), 4))
    numbers = {name: score.n_parameters for name, score in test.models.items()}
    assert numbers == {
        "one third": 8,
        "one slope": 9,
        "own slopes": 12,
        "own times": 13,
        "own times and widths": 16,
    }


def test_bic_prefers_the_planted_model():
    rng = np.random.default_rng(8)
    for loss, names in [
        (softmax_groups(rng), {"one third", "one slope"}),
        (quanta_groups(rng), {"own times"}),
    ]:
        models = group_test(TAU_K, noisy(rng, loss)).models
        assert min(models, key=lambda name: models[name].bic) in names


def test_heterogeneity_is_significant_for_two_exponents_and_not_for_one():
    rng = np.random.default_rng(9)
    alike = noisy(rng, softmax_groups(rng, exponent=0.5), 0.002)
    test = group_test(TAU_K, alike).exponents
    assert test.heterogeneity_p > 0.05
    low, high = test.common_interval
    assert low < 0.5 < high
    other = noisy(rng, law(TAU_K, [[3000], [3000]], 1.5, [[1], [2]]), 0.002)
    assert group_test(TAU_K, np.vstack([alike, other])).exponents.heterogeneity_p < 1e-3


def test_intervals_of_the_groups_contain_the_planted_third():
    held, homogeneous = 0, 0
    for seed in range(20):
        rng = np.random.default_rng(seed)
        exponents = group_test(TAU_K, noisy(rng, softmax_groups(rng))).exponents
        low_G, high_G = np.transpose(exponents.interval_G2)
        held += ((low_G <= 1 / 3) & (high_G >= 1 / 3)).sum()
        homogeneous += exponents.heterogeneity_p > 0.05
    assert held >= 0.85 * 20 * 5
    assert homogeneous >= 15


def test_noise_that_groups_share_is_measured():
    rng = np.random.default_rng(10)
    loss = softmax_groups(rng, 8)
    own = group_test(TAU_K, noisy(rng, loss)).noise
    shared = 0.005 * correlated_noise(rng, (1, 30), 0.5)
    common = group_test(TAU_K, loss * np.exp(shared)).noise
    assert own.group_correlation < 0.15
    assert common.group_correlation > 0.8
    assert common.n_effective < own.n_effective / 3


def test_resamples_give_an_interval_around_the_difference():
    rng = np.random.default_rng(11)
    loss = noisy(rng, quanta_groups(rng))
    resamples = noisy(rng, np.tile(loss, (20, 1, 1)), 0.002, 0)
    test = group_test(TAU_K, loss, loss_RGK=resamples)
    assert test.resample_interval is not None
    low, high = test.resample_interval
    assert low < test.difference.value < high
    by_hand = [group_test(TAU_K, resample).difference.value for resample in resamples[:2]]
    assert low <= min(by_hand)
    assert max(by_hand) <= high
    assert group_test(TAU_K, loss).resample_interval is None


def test_resamples_that_disagree_give_no_verdict():
    rng = np.random.default_rng(12)
    loss, other = noisy(rng, quanta_groups(rng)), noisy(rng, softmax_groups(rng))
    test = group_test(TAU_K, loss, loss_RGK=np.stack([loss, other] * 5))
    assert test.difference.low > 0
    assert test.test.verdict is Verdict.UNDECIDED


def test_a_group_of_negligible_weight_does_not_count():
    rng = np.random.default_rng(13)
    loss = np.vstack([noisy(rng, softmax_groups(rng, 4)), noisy(rng, quanta_groups(rng, 1))])
    test = group_test(TAU_K, loss, weight_G=[1, 1, 1, 1, 1e-9])
    assert test.test.verdict is Verdict.HOLDS
    assert test.difference.value == pytest.approx(
        group_test(TAU_K, loss[:4]).difference.value, rel=0.05
    )


def test_tau_of_zero_and_the_first_hundredth_are_left_out():
    tau = np.concatenate([[0], np.geomspace(1, 6000, 60)])
    loss = np.where(tau < 60, 11.0, law(np.maximum(tau, 1)))
    test = group_test(tau, np.stack([loss, 2 * loss]))
    assert test.from_lr_sum >= 60
    assert test.n_points == (tau >= 60).sum()


GROUPS = softmax_groups(np.random.default_rng(0), 3)


@pytest.mark.parametrize(
    ("tau", "given", "message"),
    [
        (TAU_K, {"loss_GK": GROUPS[0]}, "two groups or more"),
        (TAU_K, {"loss_GK": GROUPS[:1]}, "two groups or more"),
        (TAU_K, {"loss_GK": GROUPS[:, 1:]}, "one sum per probe"),
        (TAU_K, {"loss_GK": -GROUPS}, "not finite and positive"),
        (TAU_K[::-1], {"loss_GK": GROUPS}, "ascend"),
        (TAU_K, {"loss_GK": GROUPS, "weight_G": [1, 1, 0]}, "positive weight per group"),
        (TAU_K, {"loss_GK": GROUPS, "loss_RGK": GROUPS}, "resamples of shape"),
        (TAU_K[:19], {"loss_GK": GROUPS[:, :19]}, "19 probes from tau .* are too few; expected 20"),
        (TAU_K, {"loss_GK": GROUPS, "n_blocks": 3}, "at least four blocks"),
    ],
)
def test_groups_that_cannot_be_tested_are_refused(tau, given, message):
    with pytest.raises((TokscaleError, UndefinedError), match=message):
        group_test(tau, **given)
