"""Planted breaks, straight laws, the table of Mircea et al. (docs/references.md 8.1). K probes."""

import json
from pathlib import Path

import numpy as np
import pytest
from correlated import correlated_noise
from scipy.optimize import curve_fit

from megatron_tokscale.core.errors import TokscaleError, UndefinedError
from megatron_tokscale.laws.deceleration import (
    decimal_rows,
    fit_deceleration,
    late_loss,
    log_window_mean,
)
from megatron_tokscale.results.verdict import Verdict

STEP_K = np.geomspace(100, 20_000, 50)
ZSL = Path(__file__).parents[2] / ".." / "shared" / "data" / "zsl" / "bnsl_fit.json"
PUBLISHED_BREAKS = {
    "14M": 5877,
    "37M": 5907,
    "78M": 5929,
    "144M": 6074,
    "285M": 5264,
    "472M": 4644,
    "OLMo-1B": 3718,
    "OLMo-7B": 4628,
}


def log_bnsl(step, log_b, c0, c1, log_d1, f1):
    """Return the log loss of the law in docs/references.md 8.1."""
    x = np.log(step)
    return log_b - c0 * x - c1 * f1 * np.log(1 + np.exp((x - log_d1) / f1))


def planted(step=STEP_K, break_loss=3.6, break_step=1500.0, early=0.2, late=0.02, width=0.3):
    log_d1 = np.log(break_step)
    log_b = np.log(break_loss) + early * log_d1
    return np.exp(log_bnsl(step, log_b, early, late - early, log_d1, width))


def test_a_break_without_noise_is_found_exactly():
    fit = fit_deceleration(STEP_K, planted(), from_=100, n_resamples=2)
    assert fit.break_loss.value == pytest.approx(3.6)
    assert fit.break_step.value == pytest.approx(1500)
    assert (fit.early_rate, fit.late_rate.value) == pytest.approx((0.2, 0.02))
    assert fit.break_width == pytest.approx(0.3)
    assert fit.predict(STEP_K) == pytest.approx(planted())
    assert fit.final_loss.value == pytest.approx(3.6 * (20_000 / 1500) ** -0.02)
    assert fit.r2 == pytest.approx(1)


@pytest.mark.parametrize("break_step", [300, 6000])
@pytest.mark.parametrize("width", [0.05, 0.6])
def test_a_break_is_found_wherever_it_lies(break_step, width):
    step = np.geomspace(100, 20_000, 80)
    loss = planted(step, break_step=break_step, width=width)
    fit = fit_deceleration(step, loss, n_resamples=2)
    assert fit.break_step.value == pytest.approx(break_step, rel=1e-3)
    assert fit.break_width == pytest.approx(width, rel=1e-2)


@pytest.mark.parametrize(
    ("break_loss", "break_step", "late_rate", "final_loss"),
    [
        (4.05, 5877, 0.013, 3.86),
        (3.60, 5907, 0.016, 3.39),
        (3.38, 5928, 0.020, 3.14),
        (3.25, 6074, 0.023, 2.98),
        (3.14, 5264, 0.025, 2.85),
    ],
)
def test_final_losses_are_those_of_the_papers_table(break_loss, break_step, late_rate, final_loss):
    """Compare for 14M to 285M, T = 262144. The rate is rounded to 5e-4, the losses to 5e-3."""
    predicted = late_loss(break_loss, break_step, late_rate, 262_144)
    rounding = 5e-3 + 5e-3 + 5e-4 * np.log(262_144 / break_step) * final_loss
    assert predicted == pytest.approx(final_loss, abs=rounding)


def test_the_fit_is_at_least_as_good_as_scipys_from_the_papers_start():
    rng = np.random.default_rng(0)
    loss = planted(break_step=5000) * np.exp(0.003 * rng.standard_normal(len(STEP_K)))
    theirs, _ = curve_fit(
        log_bnsl,
        STEP_K,
        np.log(loss),
        p0=[3.0, 0.2, -0.1, np.log(6000), 0.3],
        method="dogbox",
        maxfev=100_000,
    )
    fit = fit_deceleration(STEP_K, loss, from_=100, n_resamples=2)
    ours = ((np.log(fit.predict(STEP_K)) - np.log(loss)) ** 2).sum()
    assert ours <= ((log_bnsl(STEP_K, *theirs) - np.log(loss)) ** 2).sum() * (1 + 1e-6)
    assert fit.break_step.value == pytest.approx(np.exp(theirs[3]), rel=1e-2)
    assert fit.late_rate.value == pytest.approx(theirs[1] + theirs[2], rel=1e-2)


@pytest.mark.parametrize("correlation", [0.0, 0.5])
def test_intervals_cover_a_planted_break(correlation):
    truth = np.array([3.6, 1500, 0.02, late_loss(3.6, 1500, 0.02, 20_000)])
    covered = np.zeros(4)
    for seed in range(12):
        noise = 0.005 * correlated_noise(np.random.default_rng(seed), len(STEP_K), correlation)
        fit = fit_deceleration(STEP_K, planted() * np.exp(noise), from_=100, n_resamples=30)
        assert fit.test.verdict is Verdict.HOLDS
        low, high = np.array(
            [
                (each.low, each.high)
                for each in (fit.break_loss, fit.break_step, fit.late_rate, fit.final_loss)
            ]
        ).T
        covered += (low <= truth) & (truth <= high)
    assert (covered >= 0.66 * 12).all()


@pytest.mark.parametrize("correlation", [0.0, 0.5])
def test_a_straight_power_law_does_not_decelerate(correlation):
    called = 0
    for seed in range(15):
        noise = 0.005 * correlated_noise(np.random.default_rng(seed), len(STEP_K), correlation)
        fit = fit_deceleration(STEP_K, 8 * STEP_K**-0.12 * np.exp(noise), n_resamples=20)
        called += fit.test.verdict is Verdict.HOLDS
    assert called <= 1


def test_a_straight_power_law_without_noise_does_not_decelerate():
    fit = fit_deceleration(STEP_K, 8 * STEP_K**-0.12, n_resamples=10)
    assert fit.rate_ratio.value == pytest.approx(1)
    assert fit.test.verdict is Verdict.FAILS


def test_an_acceleration_is_no_deceleration():
    noise = 0.001 * np.random.default_rng(3).standard_normal(len(STEP_K))
    loss = planted(early=0.02, late=0.2) * np.exp(noise)
    fit = fit_deceleration(STEP_K, loss, n_resamples=20)
    assert fit.delta_bic > 10
    assert fit.test.verdict is Verdict.FAILS


def test_a_rising_loss_has_no_deceleration():
    step = np.geomspace(101, 10_000, 40)
    noise = np.random.default_rng(0).normal(0, 0.005, 40)
    with pytest.raises(UndefinedError, match=r"does not fall: .* nats at 101 and 4\.\d+ at 10,0"):
        fit_deceleration(step, 3 * (step / 101) ** 0.1 * np.exp(noise))


def test_the_first_hundred_steps_are_left_out():
    step = np.concatenate([[0], np.geomspace(1, 20_000, 80)])
    loss = np.where(step < 100, 11, planted(np.maximum(step, 1)))
    fit = fit_deceleration(step, loss, n_resamples=2)
    assert fit.from_step > 100
    assert fit.n_points == (step > 100).sum()
    assert fit.break_step.value == pytest.approx(1500)


def test_the_log_window_is_the_papers_for_every_step():
    loss = np.random.default_rng(0).uniform(2, 3, 60)
    step = np.arange(1, 61)
    loop = [loss[int(np.ceil(s / 1.2)) - 1 : s].mean() for s in step]
    assert log_window_mean(step, loss, 1.2) == pytest.approx(loop)
    assert log_window_mean([10, 20, 40], [3, 2, 1], 1.2).tolist() == [3, 2, 1]


def test_the_rows_of_the_papers_subsample():
    """Repeat the condition of fit_bnsl.ipynb (mirandrom/zsl), step % 10^min(floor(lg - 1), 3)."""
    step = np.arange(1, 25_432)
    wanted = [s for s in step if s % 10 ** min(np.floor(np.log10(s) - 1), 3) == 0 or s < 10]
    assert step[decimal_rows(step)].tolist() == [*wanted, 25_431]
    coarse = np.array([0, 128, 256, 1280, 12_800])
    assert decimal_rows(coarse).tolist() == [1, 2, 3, 4]  # each wanted step takes the next row


def test_a_step_that_comes_twice_counts_once_with_its_mean_loss():
    twice = np.insert(STEP_K, [20, 50], STEP_K[[20, 49]])
    loss = planted(twice)
    loss[[20, 21]] += [0.2, -0.2]
    fit = fit_deceleration(twice, loss, from_=100, n_resamples=2)
    assert fit.n_points == 50
    assert fit.break_step.value == pytest.approx(1500)


@pytest.mark.skipif(not ZSL.exists(), reason="the curves of Mircea et al. are not here")
def test_the_breaks_of_the_papers_curves_are_those_published():
    curves = json.loads(ZSL.read_text())
    for name, step in PUBLISHED_BREAKS.items():
        smoothed = curves[name]["smoothed_loss"]
        fit = fit_deceleration(smoothed["x"], smoothed["y"], n_resamples=2)
        assert fit.break_step.value == pytest.approx(step, rel=1e-3)


def test_the_same_seed_gives_the_same_intervals():
    loss = planted() * np.exp(0.005 * np.random.default_rng(5).standard_normal(len(STEP_K)))
    first, again = (fit_deceleration(STEP_K, loss, n_resamples=5) for _ in range(2))
    assert first == again


@pytest.mark.parametrize(
    ("step", "loss", "message"),
    [
        (STEP_K[:9], planted()[:9], "8 probes after step 100 are too few"),
        (STEP_K, planted() - 5, "not finite and positive"),
        (STEP_K[::-1], planted(), "do not ascend"),
        (STEP_K, planted()[:-1], "are not a loss curve"),
        ([], [], "are not a loss curve"),
    ],
)
def test_invalid_loss_curves_are_refused(step, loss, message):
    with pytest.raises((TokscaleError, UndefinedError), match=message):
        fit_deceleration(step, loss)


def test_a_window_that_averages_nothing_is_refused():
    with pytest.raises(TokscaleError, match="below 1"):
        fit_deceleration(STEP_K, planted(), window=0.5)
