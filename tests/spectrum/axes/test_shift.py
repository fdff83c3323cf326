"""The shift model against closed forms and brute force. C cells, P points."""

import numpy as np
import pytest
from scipy.interpolate import CubicSpline
from scipy.optimize import least_squares

from megatron_tokscale.core.errors import UndefinedError
from megatron_tokscale.spectrum.axes.curves import Points
from megatron_tokscale.spectrum.axes.deltas import run_deltas, seed_noise
from megatron_tokscale.spectrum.axes.parts import Parts
from megatron_tokscale.spectrum.axes.shift import fit_shift, natural_spline

U = np.array([-2.0, -1.0, -1.0, 0.0])
X = np.linspace(0, 6, 40)
TOP, UNKNOWN = np.array([7.0]), np.array([np.nan])


def curve(s):
    """A known mean curve, in nats."""
    return 2 + 5 / (1 + np.exp((s - 2.5) / 1.2))


def points(u=U, x=X):
    return Points.of_runs([x] * len(u), np.asarray(u) + 20)


def with_top(kappa, floor, u=U):
    return np.concatenate([7 - (1 + floor * v) * (7 - curve(X + kappa * v)) for v in u])[None]


def without_top(kappa, floor, u=U):
    return np.concatenate([curve(X + kappa * v) - floor * v for v in u])[None]


def test_the_spline_is_scipys_and_goes_on_as_a_line():
    knots = np.array([0.0, 1.0, 1.5, 4.0])
    value = np.array([3.0, 1.0, 2.0, -1.0])
    s = np.linspace(0, 4, 50)
    expected = CubicSpline(knots, value, bc_type="natural")
    np.testing.assert_allclose(natural_spline(knots, s) @ value, expected(s), atol=1e-12)
    beyond = natural_spline(knots, np.array([-2.0, 5.0])) @ value
    assert beyond == pytest.approx([3 - 2 * expected(0, 1), -1 + expected(4.0, 1)])


@pytest.mark.parametrize("kappa", [-0.4, 0.0, 0.35, 1.0])
@pytest.mark.parametrize("floor", [0.0, 0.1])
def test_an_exact_shift_is_found(kappa, floor):
    with_known = fit_shift(points(), with_top(kappa, floor), TOP)
    without = fit_shift(points(), without_top(kappa, floor), UNKNOWN)
    for model in (with_known, without):
        assert model.kappa == pytest.approx(kappa, abs=0.01)
        assert model.floor_C[0] == pytest.approx(floor, abs=0.01)
        assert np.sqrt(model.squares / len(points().x_P)) < 0.01


def test_no_constants_fit_better_than_those_found_for_a_kappa():
    rng = np.random.default_rng(0)
    where, noisy = points(), with_top(0.5, 0.1) + 0.05 * rng.standard_normal((1, 160))
    model = fit_shift(where, noisy, TOP, kappa=0.5)
    basis = natural_spline(model.knot_M, where.x_P + 0.5 * where.u_P)

    def residuals(p):
        return noisy[0] - 7 + (1 + p[-1] * where.u_P) * (7 - basis @ p[:-1])

    best = least_squares(residuals, np.append(model.value_CM[0] + 0.1, 0.0))
    assert model.squares == pytest.approx(2 * best.cost, rel=1e-5)


def test_the_slopes_are_those_of_the_loss_over_size():
    model = fit_shift(points(), with_top(0.5, 0.1), TOP)
    x, u, step = np.array([2.0, 3.0, 5.0]), np.array([-1.7, -1.0, -0.2]), 1e-5
    earlier, never = model.slopes(x, u)
    rise = (model.predict(x, u + step) - model.predict(x, u - step)) / (2 * step)
    np.testing.assert_allclose(earlier + never, -rise, atol=1e-5)
    # Closed form: kappa (1 + floor u) (-G'), and floor (T - G).
    s = x + 0.5 * u
    fall = (curve(s - step) - curve(s + step)) / (2 * step)
    np.testing.assert_allclose(earlier[0], 0.5 * (1 + 0.1 * u) * fall, atol=0.02)
    np.testing.assert_allclose(never[0], 0.1 * (7 - curve(s)), atol=0.02)


def test_the_parts_of_the_gain_add_up_to_the_difference_of_the_losses():
    model = fit_shift(points(), with_top(0.5, 0.1), TOP)
    parts = Parts.of(model, 5.0, -2.0)
    ends = model.predict(np.array([5.0, 5.0]), np.array([-2.0, 0.0]))[0]
    assert parts.gain_C[0] == pytest.approx(ends[0] - ends[1], abs=1e-6)
    plain = Parts.of(fit_shift(points(), without_top(0.5, 0), UNKNOWN, with_floor=False), 5, -2)
    assert plain.share_C[0] == 1


def test_groups_share_kappa_and_keep_their_own_floors():
    loss_CP = np.concatenate([without_top(0.5, 0.0), without_top(0.5, 0.3)])
    model = fit_shift(points(), loss_CP, np.array([np.nan, np.nan]))
    assert model.kappa == pytest.approx(0.5, abs=0.01)
    assert model.floor_C == pytest.approx([0.0, 0.3], abs=0.01)


def test_a_search_near_a_wrong_kappa_goes_on_to_the_right_one():
    model = fit_shift(points(), with_top(1.0, 0.0), TOP, near=0.1)
    assert model.kappa == pytest.approx(1.0, abs=0.01)


def test_each_run_has_its_own_shift_and_seeds_show_its_noise():
    late = np.array([1.0, 0.55, 0.45, 0.0])  # kappa 0.5, and a tenth apart at one size
    loss_P = np.concatenate([curve(X - d) for d in late])
    model = fit_shift(points(), loss_P[None], UNKNOWN)
    delta = run_deltas(model, points(), loss_P)
    assert delta == pytest.approx(late, abs=0.02)
    assert seed_noise(delta, U) == pytest.approx(0.1 / np.sqrt(2), abs=0.01)
    assert np.isnan(seed_noise(np.arange(3.0), np.array([-2.0, -1.0, 0.0])))


@pytest.mark.parametrize(
    ("u", "x", "message"),
    [
        ([-1.0, 0.0], X, "2 runs have probes along T"),
        ([0.0, 0.0, 0.0], X, "all runs have one size"),
        ([-1.0, 0.0, 0.0], X[:3], "a run has 3 probes along T"),
    ],
)
def test_points_without_a_shift_are_refused(u, x, message):
    where = points(u, x)
    with pytest.raises(UndefinedError, match=message) as error:
        fit_shift(where, np.zeros((1, len(where.x_P))), UNKNOWN)
    assert "\n" not in str(error.value)
