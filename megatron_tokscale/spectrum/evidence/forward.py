"""Forward in time: do fits of the first half of a run predict the last factor of two in time?

Two rivals see the same probes: the best power law of the mean loss, from a tenth of the first
half's end on, and a uniform spectrum, under which the loss keeps its slope over the factor of two
in time before.

Shapes: N tokens, K probes, H probes held out, U units, R resamples (the first is the data as they
are).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import numpy as np

from megatron_tokscale.core.arrays import Floats, Floats32, Mask
from megatron_tokscale.core.errors import UndefinedError
from megatron_tokscale.core.resampling import Units
from megatron_tokscale.fit import SigmoidFits, fit_sigmoids
from megatron_tokscale.laws.power_law.huber import Curve
from megatron_tokscale.laws.power_law.power_law import FIRST_TIME_SHARE
from megatron_tokscale.results.estimate import Estimate
from megatron_tokscale.results.evidence import ForwardPrediction, LastOctaveForecast
from megatron_tokscale.spectrum.evidence.transfer import Alignment, TransferSums
from megatron_tokscale.spectrum.groups import Groups
from megatron_tokscale.spectrum.sums import loss_sums, model_sums

_LEAST_FITTED = 8  # probes of the first half: twice the parameters of a sigmoid (our choice)
_LEAST_HELD_OUT = 2  # probes held out, for a mean error over more than one (our choice)
_ROUNDING = 1e-9  # in x: a probe at exactly half of the last time belongs to the first half


def predict_forward(
    x_K: Floats,
    loss_NK: Floats32,
    units: Units,
    groupings: Mapping[str, Groups],
    weight_RU: Floats,
    seed: int,
) -> ForwardPrediction:
    """Fit the first half of the time, and compare the forecast with the last factor of two.

    There is no verdict. The fit of a token whose fall has not begun by the end of the first half
    stays flat, so the fits miss every fall that begins later. The skill for groups of tokens is
    measured on falls from the end of the first half (`TransferSums.skills`); its null model
    permutes the learning times over the tokens.

    Args:
        x_K: natural logarithm of time at the probes.
        loss_NK: finite losses in nats.
        units: resampling units of these tokens.
        groupings: groupings of these tokens by name.
        weight_RU: weights of the units.
        seed: seed of the permutations.

    Raises:
        UndefinedError: there are fewer than eight finite probes in the first half of the time, or
            fewer than two after it.
    """
    half = _FirstHalf.of(x_K)
    fits = fit_sigmoids(x_K[half.first_K], loss_NK[:, half.first_K])
    # Measured mean losses of the resamples that have tokens.
    n_units = len(units)
    tokens_U = np.bincount(units.unit_N, minlength=n_units).astype(np.float64)
    weight_RU = weight_RU[weight_RU @ tokens_U > 0]
    share_RU = weight_RU / (weight_RU @ tokens_U)[:, None]
    mean_RK = share_RU @ loss_sums(loss_NK, units.unit_N, n_units)
    at_half_R, measured_RH = mean_RK[:, half.last], mean_RK[:, ~half.first_K]

    def forecast(predicted_RH: Floats) -> LastOctaveForecast:
        return LastOctaveForecast(
            error=Estimate.from_resamples(_error(predicted_RH, measured_RH), least=0),
            fall=Estimate.from_resamples(at_half_R - predicted_RH[:, -1]),
        )

    # Forecasts, and the skill for the falls of groups.
    tokens_RH = _mean_of_fits(fits, units, weight_RU, x_K[~half.first_K])
    power_law_RH, uniform_RH = half.power_law(x_K, mean_RK), half.uniform(x_K, mean_RK)
    best_R = np.minimum(_error(power_law_RH, measured_RH), _error(uniform_RH, measured_RH))
    transfer = TransferSums(half.falls(x_K), groupings, units)
    transfer.add(slice(0, len(loss_NK)), fits, loss_NK[:, half.from_last_K])
    return ForwardPrediction(
        from_x=float(x_K[half.last]),
        to_x=float(x_K[-1]),
        probes=measured_RH.shape[1],
        fall=Estimate.from_resamples(at_half_R - measured_RH[:, -1]),
        tokens=forecast(tokens_RH),
        power_law=forecast(power_law_RH),
        uniform=forecast(uniform_RH),
        gain_over_best_rival=Estimate.from_resamples(best_R - _error(tokens_RH, measured_RH)),
        groups=transfer.skills(weight_RU, seed),
    )


def _error(predicted_RH: Floats, measured_RH: Floats) -> Floats:
    """Return the mean absolute error over the probes held out, in nats."""
    return np.asarray(np.abs(predicted_RH - measured_RH).mean(axis=1))


def _mean_of_fits(fits: SigmoidFits, units: Units, weight_RU: Floats, x_H: Floats) -> Floats:
    """Return the mean over the fitted tokens of their models at `x_H`, (R, H)."""
    whole_N, n_units = fits.complete_N, len(units)
    model_UH = model_sums(fits.rows(whole_N), units.unit_N[whole_N], n_units, x_H)
    whole_U = np.bincount(units.unit_N[whole_N], minlength=n_units)
    return np.asarray(weight_RU @ model_UH / (weight_RU @ whole_U)[:, None])


@dataclass(frozen=True)
class _FirstHalf:
    """Probes in the first half of a run's time: all but the last factor of two.

    Attributes:
        first_K: mask of the probes of the first half.
        last: index of its last probe.
    """

    first_K: Mask
    last: int

    @classmethod
    def of(cls, x_K: Floats) -> Self:
        """Return the first half of the probes at `x_K`: up to half of the last time.

        Raises:
            UndefinedError: there are too few probes in it, or after it.
        """
        first_K = x_K <= x_K[-1] - math.log(2) + _ROUNDING
        fitted, held_out = (first_K & np.isfinite(x_K)).sum(), (~first_K).sum()
        if fitted < _LEAST_FITTED or held_out < _LEAST_HELD_OUT:
            raise UndefinedError(
                f"{fitted} probes before the last factor of two and {held_out} in it are too few "
                f"to predict it; expected {_LEAST_FITTED} and {_LEAST_HELD_OUT}; probe more often"
            )
        return cls(first_K, int(first_K.sum()) - 1)

    @property
    def from_last_K(self) -> Mask:
        """Mask of the last probe of the first half and all later probes."""
        chosen = ~self.first_K
        chosen[self.last] = True
        return chosen

    def falls(self, x_K: Floats) -> Alignment:
        """Return the comparison of falls, from the end of the first half to each probe held out."""
        held_out = int((~self.first_K).sum())
        operator_HX = np.concatenate([np.ones((1, held_out)), -np.eye(held_out)])
        return Alignment(x_K[self.from_last_K], operator_HX)

    def power_law(self, x_K: Floats, mean_RK: Floats) -> Floats:
        """Return mean losses at the probes held out, by a power law of the first half, (R, H)."""
        held_K = ~self.first_K
        late = (
            self.first_K
            & np.isfinite(x_K)
            & (x_K >= x_K[self.last] + math.log(FIRST_TIME_SHARE) - _ROUNDING)
        )
        law_RH = np.empty((len(mean_RK), int(held_K.sum())))
        best = None
        for r, loss_K in enumerate(mean_RK[:, late]):
            curve = Curve(x_K[late], np.log(loss_K))
            best = curve.solve() if best is None else curve.solve_near(best)
            law_RH[r] = np.exp(Curve(x_K[held_K], np.zeros(held_K.sum())).predict(best))
        return law_RH

    def uniform(self, x_K: Floats, mean_RK: Floats) -> Floats:
        """Return mean losses at the probes held out, by a line in x, (R, H).

        The line is fitted to the last factor of two in time of the first half.
        """
        recent = self.first_K & np.isfinite(x_K) & (x_K >= x_K[self.last] - math.log(2) - _ROUNDING)
        slope_R, level_R = np.polyfit(x_K[recent], mean_RK[:, recent].T, 1)
        return np.asarray(level_R[:, None] + slope_R[:, None] * x_K[~self.first_K])
