"""The one-third law of Liu et al. (papers.md 3), fitted to one loss curve as they do.

tau is the sum of the learning rates. Shapes: K probe steps.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import curve_fit
from scipy.stats import t as student_t

from megatron_tokscale.core.arrays import Floats, Interval
from megatron_tokscale.core.errors import TokscaleError, UndefinedError
from megatron_tokscale.core.serial_correlation import (
    LEAST_FREEDOM,
    effective_points,
    serial_correlation,
)
from megatron_tokscale.laws.one_third.lr_sum import ONE_THIRD, checked, from_tau

MIN_POINTS = 6
FIRST_TAU_SHARE = 0.1  # of the last tau
DISCARDED_POINTS = 2


@dataclass(frozen=True)
class OneThirdLaw:
    """L(tau) = floor + scale * tau^-exponent, in nats, by least squares on log losses.

    Attributes:
        floor: L_0, at most the last loss.
        scale: c, in nats times the unit of tau to the power of the exponent.
        exponent: alpha; does not depend on the unit of tau.
        exponent_se: standard error as Liu et al. give it: it takes residuals for independent.
        exponent_interval: 95% interval that counts neighbouring residuals as correlated.
        r2: of the log losses.
        r2_one_third: the same with the exponent held at 1/3.
        autocorrelation: lag-1 correlation of the residuals, corrected for the fit's bias.
        n_points: probes fitted.
        from_lr_sum: first fitted tau.
        to_lr_sum: last fitted tau.
    """

    floor: float
    scale: float
    exponent: float
    exponent_se: float
    exponent_interval: Interval
    r2: float
    r2_one_third: float
    autocorrelation: float
    n_points: int
    from_lr_sum: float
    to_lr_sum: float

    @property
    def holds_one_third(self) -> bool:
        """Whether the interval of the exponent holds 1/3."""
        low, high = self.exponent_interval
        return low <= ONE_THIRD <= high

    def predict(self, lr_sum: ArrayLike) -> Floats:
        """The law's loss at `lr_sum`, in nats."""
        tau = np.asarray(lr_sum, dtype=np.float64)
        return np.asarray(self.floor + self.scale * tau**-self.exponent)


def fit_one_third(
    lr_sum_K: ArrayLike, loss_K: ArrayLike, *, from_: float | None = None
) -> OneThirdLaw:
    """Fit L = L_0 + c tau^-alpha as Liu et al. do (papers.md 3.2): scipy's curve_fit on log losses.

    Theirs are the start (c, alpha, L_0) = (1, 0.33, last loss), the bounds c >= 0, alpha >= 0,
    0 <= L_0 <= last loss, and the standard error. They drop one or two early checkpoints of
    thirteen by eye. The interval is our choice: K residuals with lag-1 correlation rho count as
    n = K (1 - rho) / (1 + rho), with Student's t for n - 3 (as in `fit_power_law`).

    Args:
        lr_sum_K: tau, the sum of the learning rates up to each probe, ascending; tau of 0 is always
            left out.
        loss_K: loss in nats.
        from_: first tau to fit. By default a tenth of the last (papers.md 8.4), but at least the
            third tau above 0, as Liu et al. mostly drop the first two.

    Raises:
        TokscaleError: the arguments do not fit together.
        UndefinedError: fewer than six points, tau that does not ascend, losses that are not finite
            and positive, no minimum.
    """
    tau_K, loss = checked(lr_sum_K, loss_K)
    if loss.ndim != 1:
        raise TokscaleError(f"losses of shape {loss.shape} are more than one curve; give one curve")
    start = _start(tau_K) if from_ is None else from_
    fitted_K = from_tau(tau_K, start, MIN_POINTS)
    tau_K, loss = tau_K[fitted_K], loss[fitted_K]
    target_K = np.log(loss)
    (scale, exponent, floor), covariance = _curve_fit(
        _log_law, tau_K, target_K, [1, 0.33, loss[-1]]
    )
    held = _curve_fit(_log_one_third, tau_K, target_K, [1, loss[-1]])[0]
    residual_K = target_K - _log_law(tau_K, scale, exponent, floor)
    rho = float(serial_correlation(residual_K, 3))
    se = float(np.sqrt(covariance[1, 1]))
    reach = _reach(se, len(tau_K), rho)
    return OneThirdLaw(
        floor=float(floor),
        scale=float(scale),
        exponent=float(exponent),
        exponent_se=se,
        exponent_interval=(float(exponent - reach), float(exponent + reach)),
        r2=_r2(target_K, residual_K),
        r2_one_third=_r2(target_K, target_K - _log_one_third(tau_K, *held)),
        autocorrelation=rho,
        n_points=len(tau_K),
        from_lr_sum=float(tau_K[0]),
        to_lr_sum=float(tau_K[-1]),
    )


def _log_law(tau_K: Floats, scale: float, exponent: float, floor: float) -> Floats:
    return np.asarray(np.log(floor + scale * tau_K**-exponent))


def _log_one_third(tau_K: Floats, scale: float, floor: float) -> Floats:
    return _log_law(tau_K, scale, ONE_THIRD, floor)


def _curve_fit(
    law: Callable[..., Floats], tau_K: Floats, target_K: Floats, start: list[float]
) -> tuple[Floats, Floats]:
    """curve_fit with every parameter from 0 on and the last, the floor, up to the last loss."""
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
    return float(1 - (residual_K**2).sum() / (len(target_K) * target_K.var()))


def _reach(se: float, n_points: int, rho: float) -> float:
    """Half a 95% interval from a standard error that took the residuals for independent."""
    effective = float(effective_points(n_points, rho))
    freedom = max(effective - 3, LEAST_FREEDOM)
    widened = se * np.sqrt((n_points - 3) / freedom)
    return float(widened * student_t.ppf(0.975, freedom))


def _start(tau_K: Floats) -> float:
    """A tenth of the last tau, or the third above 0 if that is later."""
    positive_K = tau_K[tau_K > 0]
    third = positive_K[min(DISCARDED_POINTS, len(positive_K) - 1)] if len(positive_K) else 0.0
    return float(max(FIRST_TAU_SHARE * tau_K[-1], third))
