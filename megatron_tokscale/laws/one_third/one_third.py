"""The one-third law of Liu et al. (docs/references.md 3), fitted to one loss curve as they do.

tau is the summed learning rate. Shapes: K probe steps, R resamples of the documents, F groups of
tokens by frequency.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import curve_fit
from scipy.stats import t as student_t

from megatron_tokscale.core.arrays import Floats
from megatron_tokscale.core.errors import TokscaleError, UndefinedError
from megatron_tokscale.core.serial_correlation import (
    LEAST_FREEDOM,
    effective_points,
    serial_correlation,
)
from megatron_tokscale.laws.estimates import symmetric_estimate
from megatron_tokscale.laws.inputs import Inputs
from megatron_tokscale.laws.one_third.group_test import group_test
from megatron_tokscale.laws.one_third.lr_sum import checked_losses, probes_from
from megatron_tokscale.results.estimate import defined_or_reason
from megatron_tokscale.results.laws import GroupTest, OneThirdLaw, OneThirdResult
from megatron_tokscale.results.laws.one_third import ONE_THIRD
from megatron_tokscale.store import Run

MIN_POINTS = 6  # twice the parameters; our choice
FIRST_TAU_SHARE = 0.1  # first tau as a share of the last (docs/references.md 8.4)
DISCARDED_POINTS = 2  # first probes that Liu et al. mostly leave out (docs/references.md 3.2)


def fit_one_third(
    lr_sum_K: ArrayLike, loss_K: ArrayLike, *, from_: float | None = None
) -> OneThirdLaw:
    """Fit L = L_0 + c tau^-alpha with scipy's curve_fit on log losses, as Liu et al. do.

    The start (c, alpha, L_0) = (1, 0.33, last loss), the bounds c >= 0, alpha >= 0, 0 <= L_0 <=
    last loss, and the standard error are those of Liu et al. (docs/references.md 3.2). By eye, they
    leave out the first one or two of thirteen checkpoints. The interval is our choice: K residuals
    with lag-1 correlation rho count as n = K (1 - rho) / (1 + rho), with Student's t for n - 3 (as
    in `fit_power_law`).

    Args:
        lr_sum_K: tau, the summed learning rate at each probe, ascending; a tau of 0 is always left
            out.
        loss_K: loss in nats.
        from_: first tau to fit. By default a tenth of the last tau (docs/references.md 8.4), but at
            least the third tau above 0, as Liu et al. mostly leave out the first two.

    Raises:
        TokscaleError: the arguments do not fit together.
        UndefinedError: there are fewer than six points, tau does not ascend, losses are not finite
            and positive, or no minimum is found.
    """
    tau_K, loss = checked_losses(lr_sum_K, loss_K)
    if loss.ndim != 1:
        raise TokscaleError(f"losses are of shape {loss.shape}; expected those of one curve")
    start = _first_tau(tau_K) if from_ is None else from_
    fitted_K = probes_from(tau_K, start, MIN_POINTS)
    tau_K, loss = tau_K[fitted_K], loss[fitted_K]
    target_K = np.log(loss)
    (scale, exponent, floor), covariance = _curve_fit(
        _log_law, tau_K, target_K, [1, 0.33, loss[-1]]
    )
    held = _curve_fit(_log_one_third, tau_K, target_K, [1, loss[-1]])[0]
    residual_K = target_K - _log_law(tau_K, scale, exponent, floor)
    rho = float(serial_correlation(residual_K, 3))
    se = float(np.sqrt(covariance[1, 1]))
    return OneThirdLaw(
        floor=float(floor),
        scale=float(scale),
        exponent=symmetric_estimate(float(exponent), _interval_reach(se, len(tau_K), rho)),
        exponent_se=se,
        r2=_r2(target_K, residual_K),
        r2_one_third=_r2(target_K, target_K - _log_one_third(tau_K, *held)),
        autocorrelation=rho,
        n_points=len(tau_K),
        from_lr_sum=float(tau_K[0]),
        to_lr_sum=float(tau_K[-1]),
    )


def measure_one_third(run: Run, inputs: Inputs) -> OneThirdResult:
    """Fit the one-third law to a run's mean loss, and test it by groups of token frequency.

    Raises:
        UndefinedError: the run has no record of its summed learning rate, or as in
            `fit_one_third`.
    """
    if not run.knows("lr-sum"):
        raise UndefinedError(f"{run.path} has no record of its summed learning rate")
    lr_sum_K = np.exp(run.x_K("lr-sum"))
    begun_K = lr_sum_K > 0  # the first step of a warm-up may have a learning rate of zero
    lr_sum_K = lr_sum_K[begun_K]
    law = fit_one_third(lr_sum_K, inputs.mean_loss_RK[0, begun_K])

    def test_groups() -> GroupTest:
        if not len(inputs.frequency_share_F):
            raise UndefinedError("the labels and so the frequencies of the tokens are not known")
        loss_RFK = inputs.frequency_loss_RFK[:, :, begun_K]
        loss_RFK = loss_RFK[np.isfinite(loss_RFK).all(axis=(1, 2))]
        return group_test(
            lr_sum_K,
            loss_RFK[0],
            weight_G=inputs.frequency_share_F,
            loss_RGK=loss_RFK[1:] if len(loss_RFK) > 1 else None,
        )

    return OneThirdResult(law, defined_or_reason(test_groups))


def _log_law(tau_K: Floats, scale: float, exponent: float, floor: float) -> Floats:
    return np.asarray(np.log(floor + scale * tau_K**-exponent))


def _log_one_third(tau_K: Floats, scale: float, floor: float) -> Floats:
    return _log_law(tau_K, scale, ONE_THIRD, floor)


def _curve_fit(
    law: Callable[..., Floats], tau_K: Floats, target_K: Floats, start: list[float]
) -> tuple[Floats, Floats]:
    """Return curve_fit's best parameters and their covariance.

    No parameter is negative; the last one, the floor, is at most the last loss.

    Raises:
        UndefinedError: curve_fit finds no minimum.
    """
    highest = [np.inf] * (len(start) - 1) + [start[-1]]
    try:
        best, covariance = curve_fit(
            law, tau_K, target_K, p0=start, bounds=([0] * len(start), highest), maxfev=100_000
        )
    except (RuntimeError, ValueError) as error:
        raise UndefinedError(
            f"the loss from tau {tau_K[0]:g} on has no best power law ({error}); fit another range"
        ) from error
    return np.asarray(best), np.asarray(covariance)


def _r2(target_K: Floats, residual_K: Floats) -> float:
    total = len(target_K) * target_K.var()
    return float(1 - (residual_K**2).sum() / total) if total > 0 else float("nan")


def _interval_reach(se: float, n_points: int, rho: float) -> float:
    """Return half the width of a 95% interval for correlated residuals.

    Args:
        se: standard error that counts the residuals as independent.
        n_points: number of residuals.
        rho: their lag-1 correlation.
    """
    effective = float(effective_points(n_points, rho))
    freedom = max(effective - 3, LEAST_FREEDOM)
    widened = se * np.sqrt((n_points - 3) / freedom)
    return float(widened * student_t.ppf(0.975, freedom))


def _first_tau(tau_K: Floats) -> float:
    """Return a tenth of the last tau, or the third tau above 0 if that is later."""
    positive_K = tau_K[tau_K > 0]
    third = positive_K[min(DISCARDED_POINTS, len(positive_K) - 1)] if len(positive_K) else 0.0
    return float(max(FIRST_TAU_SHARE * tau_K[-1], third))
