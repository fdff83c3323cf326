"""Laws over several runs: Chinchilla's law, and the multi-power law's forecast of a schedule."""

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import ArrayLike

from megatron_tokscale.core.arrays import Floats
from megatron_tokscale.results.estimate import Estimate, Undefined
from megatron_tokscale.results.verdict import Claim, ClaimTest

CHINCHILLA_CLAIM: Final = Claim.about("the law of smaller models predicts the largest", 0.0, 0.01)
"""Claim on the mean relative error of the predicted losses (the margin is our choice)."""
MULTI_POWER_CLAIM: Final = Claim("the loss under a schedule that was not fitted", most=0.005)
"""Claim on the mean of error over loss (our choice; Luo et al. publish 0.0011 to 0.0017)."""


@dataclass(frozen=True)
class RunLoss:
    """The size of one run and its last mean loss.

    Attributes:
        name: name of the run's directory.
        parameters: number of parameters; None if run.json does not hold it.
        non_embedding: number of parameters without embeddings.
        flops_per_token: FLOPs that a token of training costs.
        tokens: number of training tokens.
        loss: mean loss of the watched tokens at the last probe, in nats.
    """

    name: str
    parameters: int | None
    non_embedding: int | None
    flops_per_token: int | None
    tokens: int | None
    loss: float


@dataclass(frozen=True)
class ChinchillaLaw:
    """L(N, D) = floor + A N^-alpha + B D^-beta, in nats, with 95% intervals.

    Attributes:
        floor: E, the loss of an infinite model on infinite data; 0 where the runs show no floor.
        A: loss due to the model's size at one parameter, if the law held there, in nats.
        B: loss due to the data's size at one token, if the law held there, in nats.
        alpha: exponent of the parameters.
        beta: exponent of the tokens.
        a: beta / (alpha + beta): the best number of parameters grows as flops^a.
        r2: R^2 of the log losses.
        n_runs: number of runs fitted.
        converged: the optimiser reached a minimum, and no exponent is at a bound.
    """

    floor: Estimate
    A: Estimate
    B: Estimate
    alpha: Estimate
    beta: Estimate
    a: Estimate
    r2: float
    n_runs: int
    converged: bool

    def predict(self, parameters: ArrayLike, tokens: ArrayLike) -> Floats:
        """Return the law's loss of models of `parameters` trained on `tokens`, in nats."""
        n, d = np.asarray(parameters, np.float64), np.asarray(tokens, np.float64)
        of_size = self.A.value * n**-self.alpha.value
        return np.asarray(self.floor.value + of_size + self.B.value * d**-self.beta.value)


@dataclass(frozen=True)
class ChinchillaForecast:
    """Chinchilla's law of the smaller models, and its predictions for the largest.

    Attributes:
        law: the law fitted to all runs but those of the largest model.
        names: names of the predicted runs, S of them.
        loss_S: their measured losses, in nats.
        predicted_S: their predicted losses, in nats.
        error: mean of (predicted - measured) / measured, over resamples of the fitted runs and of
            the predicted ones.
    """

    law: ChinchillaLaw
    names: tuple[str, ...]
    loss_S: tuple[float, ...]
    predicted_S: tuple[float, ...]
    error: Estimate

    @property
    def test(self) -> ClaimTest:
        """The test of `CHINCHILLA_CLAIM`."""
        return ClaimTest.of(CHINCHILLA_CLAIM, self.error)


@dataclass(frozen=True)
class MultiPowerLaw:
    """The multi-power law in its authors' parameters, for unscaled learning rates.

    Attributes:
        L0: floor, in nats.
        A: reducible loss at a summed learning rate of one, in nats.
        alpha: exponent of the summed learning rate.
        B: final gain of a lower learning rate, in nats per unit of learning rate.
        C: speed of the approach to that gain, per unit of eta^-gamma S.
        beta: exponent of the approach.
        gamma: exponent of the learning rate eta in the approach.
        mae: mean absolute residual of the fitted losses, in nats. Forecasts have larger errors: up
            to 2.6 times as large on the authors' schedules, which are three times as long, with the
            default of `fit_multi_power`.
        n_points: number of losses fitted.
        converged: the optimiser reached a minimum, and no parameter is at a bound.
    """

    L0: float
    A: float
    alpha: float
    B: float
    C: float
    beta: float
    gamma: float
    mae: float
    n_points: int
    converged: bool


@dataclass(frozen=True)
class ForecastScore:
    """Errors of predicted losses.

    Attributes:
        r2: R^2 of the losses.
        mae: mean absolute error, in nats.
        rmse: root mean squared error, in nats.
        mean_relative: mean of error over loss, with a 95% interval by Student's t that counts
            neighbouring errors as correlated.
        worst_relative: greatest error over loss.
    """

    r2: float
    mae: float
    rmse: float
    mean_relative: Estimate
    worst_relative: float


@dataclass(frozen=True)
class ScheduleForecast:
    """The multi-power law of shorter runs, scored on a longest run, which was not fitted.

    Attributes:
        fitted_on: names of the fitted runs.
        held_out: name of the run that is predicted.
        law: the fitted law.
        score: errors of the predicted losses.
        last_loss: last measured loss of the predicted run, in nats.
        last_loss_predicted: the law's prediction of it, in nats.
    """

    fitted_on: tuple[str, ...]
    held_out: str
    law: MultiPowerLaw
    score: ForecastScore
    last_loss: float
    last_loss_predicted: float

    @property
    def test(self) -> ClaimTest:
        """The test of `MULTI_POWER_CLAIM`."""
        return ClaimTest.of(MULTI_POWER_CLAIM, self.score.mean_relative)


@dataclass(frozen=True)
class SeveralRuns:
    """The runs, and the laws fitted over them.

    Attributes:
        runs: size and last loss of each run.
        chinchilla: Chinchilla's law, or why it is undefined.
        chinchilla_forecast: its forecast of the largest model, or why it is undefined.
        multi_power: the forecast of each longest run, or why there is none.
    """

    runs: tuple[RunLoss, ...]
    chinchilla: ChinchillaLaw | Undefined
    chinchilla_forecast: ChinchillaForecast | Undefined
    multi_power: tuple[ScheduleForecast, ...] | Undefined
