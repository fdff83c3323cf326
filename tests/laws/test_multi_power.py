"""A double loop, planted laws and the authors' curves, against the multi-power law.

T steps of a schedule, I measured losses.
"""

from pathlib import Path

import numpy as np
import pytest
from scipy.optimize import check_grad

from megatron_tokscale.core.errors import TokscaleError, UndefinedError
from megatron_tokscale.laws.multi_power.multi_power import (
    LossCurve,
    fit_multi_power,
    predict_losses,
    score_forecast,
)
from megatron_tokscale.laws.multi_power.schedule import LearningRateSchedule, loss_drop
from megatron_tokscale.laws.multi_power.schedule_fit import HeldDrop, Problem
from megatron_tokscale.results.laws import MultiPowerLaw

DATA = Path(__file__).parents[2] / ".." / "shared" / "data" / "multi_power_law"
PEAK, LAST, WARMUP = 3e-4, 3e-5, 2160
TRAINED = ("cosine_24000", "constant_24000", "wsdcon_9")
TESTED = (
    "constant_72000",
    "cosine_72000",
    "wsd_20000_24000",
    "wsdld_20000_24000",
    "wsdcon_3",
    "wsdcon_18",
)
LAW = MultiPowerLaw(2.65, 0.6, 0.45, 440.0, 2.1, 0.6, 0.65, mae=0.0, n_points=0, converged=True)


def schedule(name, warmup=WARMUP):
    """The authors' schedules, as named by their files; learning rates of every step."""
    kind, *numbers = name.split("_")
    total = {"wsdcon": 16_000, "wsd": 24_000, "wsdld": 24_000}.get(kind) or int(numbers[0])
    step = np.arange(warmup, total)
    decayed = np.maximum(step - 20_000, 0) / 4000
    rate = {
        "constant": lambda: np.full(len(step), PEAK),
        "cosine": lambda: (
            LAST + (PEAK - LAST) * (1 + np.cos(np.pi * (step - warmup) / (total - warmup))) / 2
        ),
        "wsdcon": lambda: np.where(step < 8000, PEAK, 1e-5 * int(numbers[0])),
        "wsd": lambda: PEAK * (LAST / PEAK) ** decayed,
        "wsdld": lambda: PEAK + (LAST - PEAK) * decayed,
    }[kind]()
    return np.concatenate([np.linspace(0, PEAK, warmup), rate])


def planted(name, every=256, noise=0.0):
    rate = schedule(name)
    step = np.arange(WARMUP, len(rate), every)
    factor = np.exp(noise * np.random.default_rng(0).standard_normal(len(step)))
    return LossCurve(rate, step, predict_losses(LAW, rate, step) * factor)


def published(size, name):
    path = DATA / f"csv_{size}" / f"{name}.csv"
    if not path.is_file():
        pytest.skip(f"the authors' loss curves are not at {DATA}")
    step, rate, loss = np.loadtxt(path, delimiter=",", skiprows=1).T
    within = step < len(schedule(name))
    curve = LossCurve(schedule(name), step[within].astype(int), loss[within])
    assert curve.learning_rate_T[curve.step_I] == pytest.approx(rate[within])
    return curve


@pytest.mark.parametrize("gamma", [0.0, 0.7])
def test_the_loss_drop_is_that_of_a_double_loop(gamma):
    rate = np.array([0, 1, 2, 3, 3, 3, 2, 2, 1.5, 1.2, 1.2, 2, 2, 0.5, 0.5]) * 1e-3
    step, c, beta = np.array([3, 4, 6, 9, 11, 14]), 40.0, 0.6

    def drop(t):
        total = 0.0
        for k in range(1, t + 1):
            x = rate[k] ** -gamma * sum(rate[k : t + 1])
            total += (rate[k - 1] - rate[k]) * (1 - (c * x + 1) ** -beta)
        return total

    ours = loss_drop(LearningRateSchedule.from_rates(rate, step), c, beta, gamma)[:, 0]
    assert ours == pytest.approx([drop(t) for t in step], rel=1e-12)
    law = MultiPowerLaw(2.0, 0.1, 0.5, 9.0, c, beta, gamma, mae=0, n_points=0, converged=True)
    by_hand = [2.0 + 0.1 * sum(rate[: t + 1]) ** -0.5 - 9.0 * drop(t) for t in step]
    assert predict_losses(law, rate, step) == pytest.approx(by_hand, rel=1e-12)


@pytest.mark.parametrize("name", ["cosine_24000", "wsd_20000_24000", "wsdcon_3"])
def test_grouped_changes_move_no_loss_by_a_ten_thousandth(name):
    rate, step = schedule(name), np.arange(WARMUP, len(schedule(name)), 128)
    exact = loss_drop(LearningRateSchedule.from_rates(rate, step), LAW.C, LAW.beta, LAW.gamma)[:, 0]
    grouped = loss_drop(
        LearningRateSchedule.from_rates(rate, step, 16), LAW.C, LAW.beta, LAW.gamma
    )[:, 0]
    assert LAW.B * np.abs(grouped - exact).max() < 1e-4


def test_a_rate_that_decays_to_zero_gives_finite_losses():
    rate = np.concatenate([np.linspace(0, 1e-3, 11), np.linspace(1e-3, 0, 50)])
    assert np.isfinite(predict_losses(LAW, rate, np.arange(11, 61))).all()


def test_the_gradient_is_that_of_the_objective():
    curves = [planted(name, every=2048, noise=0.002) for name in ("cosine_24000", "wsdcon_9")]
    problem = Problem.from_curves([(c.learning_rate_T, c.step_I, c.loss_I) for c in curves])
    for point in ([0.9, -1.5, 0.4, -3.0, 3.0, 0.6, 0.65], [0.7, -1.0, 0.8, -2.5, 5.0, 2.0, 0.0]):
        error = check_grad(
            lambda p: problem.objective(p)[0], lambda p: problem.objective(p)[1], np.array(point)
        )
        assert error < 1e-5 * np.linalg.norm(problem.objective(np.array(point))[1])


def test_a_planted_law_forecasts_schedules_it_has_not_seen():
    fit = fit_multi_power([planted(name) for name in TRAINED], held=None)
    for name in ("cosine_72000", "wsd_20000_24000", "wsdcon_3"):
        unseen = planted(name, every=1024)
        result = score_forecast(
            predict_losses(fit, unseen.learning_rate_T, unseen.step_I), unseen.loss_I
        )
        assert result.worst_relative < 5e-4
    assert (fit.L0, fit.A, fit.alpha) == pytest.approx((LAW.L0, LAW.A, LAW.alpha), rel=0.01)


def test_held_parameters_stay_fixed():
    curves = [planted(name, every=1024) for name in TRAINED]
    fits = [fit_multi_power(curves, held=HeldDrop(rest, 1.5, 0.25)) for rest in (1.0, 0.8)]
    assert all((fit.beta, fit.gamma) == (1.5, 0.25) for fit in fits)
    ratio = fits[1].B / fits[0].B
    assert ratio == pytest.approx(0.8)


def test_the_first_half_of_a_run_forecasts_its_decay():
    """Fit one run to the middle of its approach after a jump of the learning rate at step 8000."""
    whole = planted("wsdcon_9", every=64, noise=0.0005)
    seen = whole.step_I < 12_000
    fit = fit_multi_power(LossCurve(whole.learning_rate_T, whole.step_I[seen], whole.loss_I[seen]))
    result = score_forecast(
        predict_losses(fit, whole.learning_rate_T, whole.step_I[~seen]), whole.loss_I[~seen]
    )
    assert result.worst_relative < 0.005


def test_the_unit_of_the_learning_rate_does_not_matter():
    curve = planted("cosine_24000", every=1024, noise=0.001)
    other = LossCurve(curve.learning_rate_T * 1000, curve.step_I, curve.loss_I)
    fits = [fit_multi_power(c) for c in (curve, other)]
    assert fits[1].alpha == pytest.approx(fits[0].alpha, rel=1e-4)
    ratio = fits[1].B / fits[0].B
    assert ratio == pytest.approx(1e-3, rel=1e-4)
    assert predict_losses(fits[1], other.learning_rate_T, other.step_I) == pytest.approx(
        predict_losses(fits[0], curve.learning_rate_T, curve.step_I), rel=1e-6
    )


@pytest.mark.parametrize(
    ("size", "r2", "mae", "worst"),
    [
        (25, 0.9988, 0.00376, 0.00409),
        (100, 0.9983, 0.00435, 0.00583),
        (400, 0.9978, 0.00484, 0.00995),
    ],
)
def test_the_published_figures_are_reached(size, r2, mae, worst):
    """Each figure averaged over the six curves that were not fitted, as in the authors' table."""
    fit = fit_multi_power([published(size, name) for name in TRAINED])
    tested = [published(size, name) for name in TESTED]
    scores = [
        score_forecast(predict_losses(fit, c.learning_rate_T, c.step_I), c.loss_I) for c in tested
    ]
    assert fit.converged
    assert np.mean([s.r2 for s in scores]) >= r2
    assert np.mean([s.mae for s in scores]) <= mae
    assert np.mean([s.worst_relative for s in scores]) <= worst


def test_a_score_agrees_with_its_definitions():
    result = score_forecast([2.0, 3.0, 5.0], [2.0, 4.0, 4.0])
    assert result.r2 == pytest.approx(1 - 2 / (8 / 3))
    assert (result.mae, result.worst_relative) == pytest.approx((2 / 3, 0.25))
    assert (result.rmse, result.mean_relative.value) == pytest.approx((np.sqrt(2 / 3), 0.5 / 3))


RATE_T = np.full(100, 1e-3)
STEP_I = np.arange(0, 100, 5)
LOSS_I = np.linspace(4, 3, 20)


@pytest.mark.parametrize(
    ("rate", "step", "loss", "message"),
    [
        (-RATE_T, STEP_I, LOSS_I, "one finite learning rate per step"),
        (0 * RATE_T, STEP_I, LOSS_I, "not all zero"),
        (RATE_T, STEP_I + 50, LOSS_I, "steps 50 to 145 are not within the schedule"),
        (RATE_T, STEP_I[::-1], LOSS_I, "whole numbers that ascend"),
        (RATE_T, STEP_I + 0.5, LOSS_I, "whole numbers that ascend"),
        (RATE_T, STEP_I, LOSS_I[1:], "19 losses at 20 steps"),
        (RATE_T, STEP_I, LOSS_I - 3, "not finite and positive"),
    ],
)
def test_invalid_loss_curves_are_refused(rate, step, loss, message):
    with pytest.raises((TokscaleError, UndefinedError), match=message):
        LossCurve(rate, step, loss)


@pytest.mark.parametrize(
    ("rate", "loss", "message"),
    [
        (RATE_T, LOSS_I, "never falls before the last loss"),
        (np.linspace(1e-5, 1e-3, 100), LOSS_I, "0 losses after the warm-up are too few"),
        (RATE_T[::-1] * np.linspace(1, 0.5, 100), np.full(20, 3.0), "all losses are the same"),
    ],
)
def test_curves_that_determine_no_law_are_refused(rate, loss, message):
    with pytest.raises(UndefinedError, match=message):
        fit_multi_power(LossCurve(rate, STEP_I, loss))


def test_a_held_drop_of_zero_is_refused():
    with pytest.raises(UndefinedError, match="positive rest"):
        HeldDrop(rest=0.0)


def test_predictions_of_another_length_are_not_scored():
    with pytest.raises(TokscaleError, match="cannot be scored"):
        score_forecast([1.0, 2.0], [1.0])
