"""Misfits against a loop over pairs of units, and skills against draws with a known truth.

Shapes: U units, C numbers of a misfit, D draws.
"""

import numpy as np
import pytest

from megatron_tokscale.core.resampling import Units
from megatron_tokscale.spectrum.evidence.misfits import Misfit, skill

UNITS, NUMBERS, DRAWS = 30, 60, 400  # more numbers than units, as in the surface


def misfit_of(value_UC):
    """Return the misfit of the mean of the units."""
    weight_RU = Units.from_documents(np.zeros(len(value_UC)), np.arange(len(value_UC)), 0)
    weight_RU = weight_RU.leave_one_out()
    return Misfit.of(weight_RU @ value_UC / weight_RU.sum(axis=1, keepdims=True))


def draws(length, rng, count=DRAWS):
    """Yield samples of units with noise of 1 around a vector of this length."""
    true_C = np.full(NUMBERS, length / np.sqrt(NUMBERS))
    for _ in range(count):
        yield true_C + rng.normal(size=(UNITS, NUMBERS))


def skills(miss, null, count):
    """Yield skills of a prediction and a null model that are this far from one noisy target."""
    shift_C = np.eye(1, NUMBERS)[0]
    for noise_UC in draws(0.0, np.random.default_rng(2), count):
        yield skill(misfit_of(noise_UC + miss * shift_C), misfit_of(noise_UC + null * shift_C))


def true_skill(miss, null):
    return 1 - miss**2 / null**2 if miss <= null else null**2 / miss**2 - 1


def test_the_value_is_the_mean_product_of_two_units():
    """The U-statistic: the mean of x_u . x_w over all pairs of different units."""
    value_UC = np.random.default_rng(0).normal(1, 2, (7, 4))
    products = [value_UC[u] @ value_UC[w] for u in range(7) for w in range(7) if u != w]
    found = misfit_of(value_UC)
    assert found.value == pytest.approx(np.mean(products))
    assert found.uncorrected == pytest.approx((value_UC.mean(axis=0) ** 2).sum())


@pytest.mark.parametrize("length", [0.0, 1.0, 4.0])
def test_the_variance_is_that_of_many_draws(length):
    """Vary the length of the true v; in noise alone a bootstrap's variance is three times this."""
    found = [misfit_of(each) for each in draws(length, np.random.default_rng(1))]
    noise = np.mean([(each.product_UU**2).sum() for each in found])
    variance = np.mean([4 * each.slope_U @ each.slope_U for each in found]) - 2 * noise
    # The closed form for noise of covariance I/U: 4 |mu|^2 / U + 2 C / (U (U - 1)).
    exact = 4 * length**2 / UNITS + 2 * NUMBERS / (UNITS * (UNITS - 1))
    assert variance == pytest.approx(exact, rel=0.1)
    assert noise == pytest.approx(NUMBERS / (UNITS * (UNITS - 1)), rel=0.1)
    assert np.var([each.value for each in found]) == pytest.approx(exact, rel=0.3)


@pytest.mark.parametrize(("miss", "null"), [(0.0, 4.0), (1.0, 4.0), (3.0, 4.0), (4.0, 2.0)])
def test_the_interval_of_a_skill_covers_it(miss, null):
    true, covered, widths = true_skill(miss, null), 0, []
    for found in skills(miss, null, DRAWS):
        covered += found.low <= true <= found.high
        widths.append(found.high - found.low)
    # 0.95 with three standard errors of 400 draws; at the end of the range one side never fails.
    assert 0.917 <= covered / DRAWS <= (0.983 if miss else 1)
    assert np.median(widths) < 0.6


def test_an_interval_is_missed_as_often_above_as_below():
    """With the error of the estimate, in place of that at each skill, 3.9 and 1.8% of them are."""
    true, count = true_skill(2.0, 4.0), 2000
    found = [(each.low, each.high) for each in skills(2.0, 4.0, count)]
    above, below = (sum(low > true for low, _ in found), sum(high < true for _, high in found))
    # The difference of two counts of 2.5% has a standard deviation of 10.
    assert abs(above - below) < 30
    assert 0.03 * count < above + below < 0.07 * count


def test_where_neither_misses_the_skill_is_not_determined():
    """Fieller's interval of 0/0 is the whole range; a bootstrap's would be one of noise."""
    rng = np.random.default_rng(3)
    whole = 0
    for noise_UC in draws(0.0, rng):
        found = skill(misfit_of(noise_UC), misfit_of(rng.normal(size=noise_UC.shape)))
        whole += (found.low, found.high) == (-1, 1) or not found.has_interval
    assert whole > 0.8 * DRAWS


def test_a_single_unit_has_no_interval():
    value_UC = np.ones((1, 3))
    found = skill(misfit_of(value_UC), misfit_of(2 * value_UC))
    assert found.value == pytest.approx(0.75)
    assert not found.has_interval
