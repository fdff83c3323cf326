"""Schedules from run.json against Megatron's own scheduler, and forecasts from other schedules.

Shapes: T steps, K probe steps.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from runs import write_run

from megatron_tokscale.core.errors import UndefinedError
from megatron_tokscale.laws.multi_power.learning_rates import learning_rates
from megatron_tokscale.laws.multi_power.multi_power import predict_losses
from megatron_tokscale.laws.several_runs import several_runs
from megatron_tokscale.results.laws import MultiPowerLaw
from megatron_tokscale.store import LearningRates

PEAK, MINIMUM, WARMUP = 3e-3, 3e-4, 20


def megatron_rates(style, n_steps, warmup=WARMUP):
    """The learning rate of every step, as Megatron's scheduler sets it."""
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=PEAK,
        min_lr=MINIMUM,
        lr_warmup_steps=warmup,
        lr_decay_steps=n_steps,
        lr_decay_style=style,
        start_wd=0.0,
        end_wd=0.0,
        wd_incr_steps=n_steps,
        wd_incr_style="constant",
    )
    rates = []
    for _ in range(n_steps):
        rates.append(optimizer.param_groups[0]["lr"])
        scheduler.step(increment=1)
    return np.array(rates)


def run_of(path, style, rate_T, loss_K=None, steps=None):
    """A run that recorded the sums of these rates."""
    steps = np.array([0, 5, WARMUP, 60, len(rate_T)]) if steps is None else steps
    loss_K = np.ones(len(steps)) if loss_K is None else loss_K
    run = write_run(path, steps, np.tile(loss_K, (16, 1)))
    batch = run.launches[0].batch.global_batch_size
    rates = LearningRates(
        peak=PEAK,
        minimum=MINIMUM,
        initial=0.0,
        decay_style=style,
        warmup_samples=batch * WARMUP,
        decay_samples=batch * len(rate_T),
    )
    sums = np.concatenate([[0.0], np.cumsum(rate_T)])
    records = [replace(record, lr_sum=float(sums[record.step])) for record in run.records]
    size = {"parameters": 10, "non_embedding": 5, "flops_per_token": 60}
    launches = (replace(run.launches[0], learning_rate=rates),)
    info = replace(run.info, launches=launches, size=size)
    return replace(run, info=info, records=tuple(records))


@pytest.mark.parametrize("style", ["constant", "linear", "cosine"])
def test_rates_are_megatrons(tmp_path, style):
    expected_T = megatron_rates(style, 100)
    found_T = learning_rates(run_of(tmp_path / style, style, expected_T))
    np.testing.assert_allclose(found_T, expected_T, rtol=1e-9, atol=1e-15)


def test_rates_that_were_not_recorded_are_refused(tmp_path):
    with pytest.raises(UndefinedError, match="are not those of its run"):
        learning_rates(run_of(tmp_path / "a", "linear", megatron_rates("cosine", 100)))
    with pytest.raises(UndefinedError, match="the learning-rate schedule polynomial is not known"):
        learning_rates(run_of(tmp_path / "b", "polynomial", megatron_rates("cosine", 100)))


def test_the_longest_schedule_is_forecast_from_shorter_ones_alone(tmp_path):
    truth = MultiPowerLaw(2.0, 0.6, 0.45, 200.0, 20.0, 2.0, 0.0, 0.0, 0, True)
    runs = []
    for name, n_steps in (("a", 300), ("b", 600), ("long", 2400), ("longer", 2400)):
        rate_T = megatron_rates("cosine", n_steps)
        steps = np.unique(np.geomspace(30, n_steps, 40).round()).astype(int)
        loss_K = predict_losses(truth, rate_T, steps - 1)
        runs.append(run_of(tmp_path / name, "cosine", rate_T, loss_K, steps))
    found = several_runs(runs, n_resamples=2, seed=0).multi_power
    assert [each.held_out for each in found] == ["long", "longer"]
    for each in found:
        assert each.fitted_on == ("a", "b")
        assert each.score.r2 > 0.9
        assert each.last_loss_predicted == pytest.approx(each.last_loss, abs=0.05)


def test_without_a_shorter_run_the_forecast_is_undefined(tmp_path):
    rate_T = megatron_rates("cosine", 100)
    runs = [run_of(tmp_path / name, "cosine", rate_T) for name in "ab"]
    assert "no shorter run" in several_runs(runs, n_resamples=2, seed=0).multi_power.undefined
