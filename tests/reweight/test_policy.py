import numpy as np
import pytest

from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.reweight import BySpectrum, Manual, Spectra, Uniform
from megatron_tokscale.reweight.guards import (
    Guards,
    apply_floor,
    limit_change,
    limit_repetition,
    refuse_repetition,
)
from megatron_tokscale.reweight.policy import policy_stages

BATCH = 8
X = np.linspace(0, np.log(1000), 2001)


def bumps(*centres: float, drop: float = 1.0, width: float = 0.3) -> Spectra:
    """One Gaussian bump per dataset at ln(centre) in steps, of area `drop`; 1000 steps of 8."""
    z = (X - np.log(np.array(centres))[:, None]) / width
    density = drop * np.exp(-(z**2) / 2) / (width * np.sqrt(2 * np.pi))
    steps = np.array([1, 10, 100, 1000])
    names = tuple(f"d{i}" for i in range(len(centres)))
    return Spectra(names, X, density, np.log(steps), np.log(steps * BATCH))


def test_learnability_is_the_drop_between_two_sample_counts():
    spectra = bumps(100, drop=2.5)
    assert spectra.learnability_D(BATCH, 1000 * BATCH)[0] == pytest.approx(2.5, rel=1e-4)
    half = spectra.learnability_D(BATCH, 100 * BATCH)[0]
    assert half == pytest.approx(1.25, rel=1e-4)
    one_sigma = spectra.learnability_D(100 * BATCH, 100 * BATCH * np.exp(0.3))[0]
    assert one_sigma == pytest.approx(2.5 * 0.341345, rel=1e-3)


def test_time_in_samples_follows_a_batch_size_that_grows():
    """Between probes ln step is linear in ln samples; the ends are the probes'."""
    spectra = Spectra(("d",), X, np.ones((1, len(X))), np.log([10, 100]), np.log([40, 1000]))
    assert spectra.x_at(40) == pytest.approx(np.log(10))
    assert spectra.x_at(200) == pytest.approx(np.log(np.sqrt(1000)))
    assert spectra.x_at(20) == pytest.approx(np.log(5))
    assert spectra.x_at(5000) == pytest.approx(np.log(100))


def test_weights_follow_what_is_learned_soon():
    """d0 is learned around step 30, d1 around step 300."""
    policy = BySpectrum(bumps(30, 300), n_stages=40, first=8 * BATCH)
    start_T, weights_TD = policy_stages(policy, np.array([0.5, 0.5]), 1000 * BATCH)
    step_T = start_T / BATCH
    assert weights_TD[0].tolist() == [0.5, 0.5]
    assert (weights_TD[(step_T > 8) & (step_T < 25), 0] > 0.9).all()
    assert (weights_TD[(step_T > 80) & (step_T < 400), 1] > 0.9).all()
    np.testing.assert_allclose(weights_TD.sum(axis=1), 1)


def test_one_stage_against_the_formula():
    base = np.array([0.2, 0.3, 0.5])
    spectra = bumps(20, 40, 80)
    policy = BySpectrum(spectra, window=3, strength=0.5, n_stages=2, first=20 * BATCH)
    _, weights_TD = policy_stages(policy, base, 1000 * BATCH)
    dense = np.linspace(np.log(20), np.log(60), 100_001)
    drops = [np.trapezoid(np.interp(dense, X, row), dense) for row in spectra.density_DG]
    expected = base * np.sqrt(drops)
    np.testing.assert_allclose(weights_TD[1], expected / expected.sum(), rtol=1e-4)


def test_strength_zero_keeps_the_base_weights():
    base = np.array([0.2, 0.8])
    _, weights_TD = policy_stages(BySpectrum(bumps(30, 300), strength=0), base, 8000)
    np.testing.assert_allclose(weights_TD, np.tile(base, (len(weights_TD), 1)))


def test_where_nothing_is_left_to_learn_the_base_weights_hold():
    spectra = bumps(30, 300)
    empty = Spectra(spectra.names, X, 0 * spectra.density_DG, spectra.x_K, spectra.log_samples_K)
    _, weights_TD = policy_stages(BySpectrum(empty), np.array([0.2, 0.8]), 8000)
    assert (weights_TD == [0.2, 0.8]).all()


def test_beyond_the_reference_run_the_last_weights_hold():
    """A window of 4 is half seen until the run's end over 2; then nothing changes."""
    policy = BySpectrum(bumps(30, 300), n_stages=60)
    start_T, weights_TD = policy_stages(policy, np.array([0.5, 0.5]), 10_000 * BATCH)
    late = start_T > 500 * BATCH
    assert late.sum() > 10
    assert (weights_TD[late] == weights_TD[late][0]).all()


def test_uniform_is_the_base_weights():
    start_T, weights_TD = policy_stages(Uniform(), np.array([0.3, 0.7]), 100)
    assert start_T.tolist() == [0]
    assert weights_TD.tolist() == [[0.3, 0.7]]


def test_weights_by_hand_in_steps():
    manual = Manual({1000: [1, 3], 0: [1, 1]})
    start_T, weights_TD = policy_stages(manual, np.array([0.5, 0.5]), 5000)
    assert start_T.tolist() == [0, 1000]
    assert weights_TD.tolist() == [[0.5, 0.5], [0.25, 0.75]]


def test_a_straight_line_is_cut_into_stages_of_its_mean():
    manual = Manual({0: [1, 0], 1000: [0, 1]}, "linear", n_stages=4)
    start_T, weights_TD = policy_stages(manual, np.array([0.5, 0.5]), 5000)
    assert start_T.tolist() == [0, 250, 500, 750, 1000]
    np.testing.assert_allclose(weights_TD[:, 1], [0.125, 0.375, 0.625, 0.875, 1])


def test_the_floor_holds_and_sums_stay_one():
    base = np.array([0.1, 0.9])
    weights = apply_floor(np.array([[0.0, 1.0], [1.0, 0.0]]), base, 0.25)
    assert (weights >= 0.25 * base - 1e-15).all()
    np.testing.assert_allclose(weights.sum(axis=1), 1)


def test_no_weight_changes_by_more_than_the_limit():
    rng = np.random.default_rng(0)
    wild_TD = rng.dirichlet(np.full(5, 0.5), size=40)
    calm_TD = limit_change(wild_TD, 1.5)
    ratio = calm_TD[1:] / calm_TD[:-1]
    assert ratio.max() <= 1.5 + 1e-9
    assert ratio.min() >= 1 / 1.5 - 1e-9
    np.testing.assert_allclose(calm_TD.sum(axis=1), 1)
    np.testing.assert_allclose(calm_TD[0], wild_TD[0])
    slow_TD = np.linspace([0.5, 0.5], [0.6, 0.4], 10)
    np.testing.assert_allclose(limit_change(slow_TD, 1.5), slow_TD)


def test_a_plan_is_damped_until_no_dataset_repeats_too_often():
    base = np.array([0.5, 0.5])
    weights = np.array([[0.5, 0.5], [0.9, 0.1]])
    length = np.array([100, 100])
    damped = limit_repetition(weights, base, length, np.array([120.0, 1000.0]))
    np.testing.assert_allclose((length @ damped)[0], 120)
    untouched = limit_repetition(weights, base, length, np.array([140.0, 1000.0]))
    np.testing.assert_allclose(untouched, weights)


def test_draws_beyond_the_limit_on_epochs_are_refused():
    with pytest.raises(TokscaleError, match="stratum 'b' would be repeated for 5 epochs"):
        refuse_repetition(["a", "b"], np.array([10.0, 50.0]), np.array([10.0, 10.0]), 4)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Guards(floor=0), "floor"),
        (lambda: Guards(floor=1.5), "floor"),
        (lambda: Guards(max_change=1), "expected a factor above 1"),
        (lambda: Guards(max_change=float("nan")), "expected a factor above 1"),
        (lambda: Guards(max_epochs=0), "expected a positive number"),
        (lambda: BySpectrum(bumps(30), window=1), "window"),
        (lambda: BySpectrum(bumps(30), strength=-1), "strength"),
        (lambda: BySpectrum(bumps(30), n_stages=1), "stages"),
        (lambda: policy_stages(BySpectrum(bumps(30), first=9000), np.ones(1), 8000), "first stage"),
        (lambda: policy_stages(Manual({}), np.ones(1), 10), "at sample 0"),
        (lambda: policy_stages(Manual({5: [1]}), np.ones(1), 10), "at sample 0"),
        (lambda: policy_stages(Manual({0: [1, 1]}), np.ones(1), 10), "2 weights at sample 0 for 1"),
        (lambda: policy_stages(Manual({0: [0, 0]}), np.ones(2), 10), "not all 0"),
        (lambda: policy_stages(Manual({0: [-1, 2]}), np.ones(2), 10), "not all 0"),
        (lambda: bumps(30).select(["other"]), "watched no tokens of other"),
    ],
)
def test_a_policy_out_of_range_is_refused_in_one_sentence(make, sentence):
    with pytest.raises(TokscaleError, match=sentence) as caught:
        make()
    assert "\n" not in str(caught.value)
