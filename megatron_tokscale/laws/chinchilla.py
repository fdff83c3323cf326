"""`fit_chinchilla`: L = E + A N^-alpha + B D^-beta over runs, and the best split of compute.

As Besiroglu et al. fit it (papers.md 8.3). Shapes: I runs, P = 5 parameters (E, ln A, ln B, alpha,
beta, centred), R bootstrap resamples.
"""

from dataclasses import dataclass
from functools import cached_property
from itertools import product

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import minimize, nnls

from megatron_tokscale.core.arrays import Floats, Interval
from megatron_tokscale.core.errors import TokscaleError, UndefinedError
from megatron_tokscale.core.resampling import percentile_interval
from megatron_tokscale.laws.power_law.huber import DELTA, EXPONENT_BOUNDS

MIN_RUNS = 6
MIN_LEVELS = 3
_EXPONENTS = (0.05, 0.15, 0.3, 0.5, 0.8, 1.2, 2.0)
_DESCENTS = 12
_LEVEL_BOUNDS = (-50.0, 50.0)  # keeps a wild step of the descent from a loss of zero
_NO_LEVEL = 1e-6  # instead of ln 0, for a term that a start does without
_COLLINEAR = 1e-6


@dataclass(frozen=True)
class ChinchillaLaw:
    """L(N, D) = floor + A N^-alpha + B D^-beta, in nats, with 95% intervals.

    Attributes:
        floor: E, the loss of an infinite model on infinite data; 0 where the runs show none.
        A: nats at one parameter, if the law held there.
        B: nats at one token, if the law held there.
        alpha: exponent of the parameters.
        beta: exponent of the tokens.
        a: beta / (alpha + beta): the best number of parameters grows as flops^a.
        floor_interval: 95% interval of the floor.
        A_interval: 95% interval of A.
        B_interval: 95% interval of B.
        alpha_interval: 95% interval of alpha.
        beta_interval: 95% interval of beta.
        a_interval: 95% interval of a.
        r2: of the log losses.
        n_runs: runs fitted.
        converged: the optimiser reached a minimum, and no exponent is at a bound.
    """

    floor: float
    A: float
    B: float
    alpha: float
    beta: float
    a: float
    floor_interval: Interval
    A_interval: Interval
    B_interval: Interval
    alpha_interval: Interval
    beta_interval: Interval
    a_interval: Interval
    r2: float
    n_runs: int
    converged: bool

    def predict(self, parameters: ArrayLike, tokens: ArrayLike) -> Floats:
        """The law's loss of models of `parameters` trained on `tokens`, in nats."""
        n, d = np.asarray(parameters, np.float64), np.asarray(tokens, np.float64)
        return np.asarray(self.floor + self.A * n**-self.alpha + self.B * d**-self.beta)


def fit_chinchilla(
    parameters_I: ArrayLike,
    tokens_I: ArrayLike,
    loss_I: ArrayLike,
    *,
    n_resamples: int = 200,
    seed: int = 0,
) -> ChinchillaLaw:
    """Fit L = E + A N^-alpha + B D^-beta, E >= 0: Huber loss (delta 1e-3) on log residuals.

    The objective is the sum over runs, descended with its exact gradient from the best of a grid of
    exponents. Intervals are percentiles of a bootstrap over runs: they take runs as independent,
    which checkpoints of one run are not. With few runs, or a narrow range of N or D, A and B are
    known to no better than an order of magnitude; alpha, beta and a fare better.

    Measured coverage of the 95% intervals: 96-98% in 57 planted repeats of 30 runs over two decades
    of N and D, noise 0.3%.

    Args:
        parameters_I: N, the parameters of each run's model.
        tokens_I: D, the tokens each run was trained on.
        loss_I: each run's final loss in nats.
        n_resamples: number of bootstrap resamples R.
        seed: of the bootstrap.

    Raises:
        TokscaleError: the arguments do not fit together.
        UndefinedError: fewer than six runs, fewer than three different N or D, N and D that only
            vary together, losses that are all the same, or numbers not finite and positive.
    """
    runs = _checked(parameters_I, tokens_I, loss_I)
    best_P, converged = runs.solve()
    rng = np.random.default_rng(seed)
    drawn_RI = rng.multinomial(
        len(runs.loss), np.full(len(runs.loss), 1 / len(runs.loss)), n_resamples
    )
    solution_RP = [runs.descend(best_P, drawn_I.astype(np.float64))[0] for drawn_I in drawn_RI]
    value_R = np.array([runs.constants(solution_P) for solution_P in solution_RP])
    constants = runs.constants(best_P).tolist()
    floor, scale_n, scale_d, alpha, beta, share = constants
    intervals = [percentile_interval(*each) for each in zip(constants, value_R.T, strict=True)]
    residual_I = np.log(runs.predict(best_P)[0] / runs.loss)
    return ChinchillaLaw(
        floor=floor,
        A=scale_n,
        B=scale_d,
        alpha=alpha,
        beta=beta,
        a=share,
        floor_interval=intervals[0],
        A_interval=intervals[1],
        B_interval=intervals[2],
        alpha_interval=intervals[3],
        beta_interval=intervals[4],
        a_interval=intervals[5],
        r2=float(1 - (residual_I**2).mean() / np.log(runs.loss).var()),
        n_runs=len(runs.loss),
        converged=converged,
    )


@dataclass(frozen=True)
class Runs:
    """Logarithms of N and D, and the losses, of the fitted runs.

    Within, ln N and ln D are less their means and losses are over the lowest: A and B are then
    losses at the middle of the runs and hardly correlate with alpha and beta. E itself, not its
    logarithm, as in `huber.Curve`.
    """

    log_parameters: Floats
    log_tokens: Floats
    loss: Floats

    @cached_property
    def _n_I(self) -> Floats:
        return self.log_parameters - self.log_parameters.mean()

    @cached_property
    def _d_I(self) -> Floats:
        return self.log_tokens - self.log_tokens.mean()

    @cached_property
    def _log_loss_I(self) -> Floats:
        return np.asarray(np.log(self.loss / self.loss.min()))

    def solve(self) -> tuple[Floats, bool]:
        """The best of the minima reached from the best starts."""
        every_I = np.ones_like(self.loss)
        starts = [self._start(alpha, beta) for alpha, beta in product(_EXPONENTS, repeat=2)]
        starts.sort(key=lambda start_P: self.objective(start_P, every_I)[0])
        minima = [self.descend(start_P, every_I) for start_P in starts[:_DESCENTS]]
        best_P, _, success = min(minima, key=lambda minimum: minimum[1])
        low, high = EXPONENT_BOUNDS
        return best_P, success and bool(((best_P[3:] > low) & (best_P[3:] < high)).all())

    def descend(self, start_P: Floats, weight_I: Floats) -> tuple[Floats, float, bool]:
        """The minimum reached from `start_P`, its objective, and whether it is one."""
        best = minimize(
            self.objective,
            start_P,
            args=(weight_I,),
            jac=True,
            method="L-BFGS-B",
            bounds=[(0, None), _LEVEL_BOUNDS, _LEVEL_BOUNDS, EXPONENT_BOUNDS, EXPONENT_BOUNDS],
            options={"maxiter": 1000, "ftol": 1e-12, "gtol": 1e-6},
        )
        return np.asarray(best.x), float(best.fun), bool(best.success)

    def objective(self, point_P: Floats, weight_I: Floats) -> tuple[float, Floats]:
        """Weighted sum of the Huber losses over delta, and its gradient."""
        loss_I, slope_PI = self.predict(point_P, 1.0)
        residual_I = np.log(loss_I) - self._log_loss_I
        clipped_I = np.clip(residual_I, -DELTA, DELTA)
        value = weight_I @ (clipped_I * (residual_I - clipped_I / 2)) / DELTA
        return float(value), slope_PI @ (weight_I * clipped_I / (loss_I * DELTA))

    def predict(self, point_P: Floats, lowest: float | None = None) -> tuple[Floats, Floats]:
        """Losses of the law at the runs, in units of the lowest, and their derivatives (P, I)."""
        floor, level_n, level_d, alpha, beta = point_P
        unit = float(self.loss.min()) if lowest is None else lowest
        n_I, d_I = np.exp(level_n - alpha * self._n_I), np.exp(level_d - beta * self._d_I)
        slope_PI = np.stack([np.ones_like(n_I), n_I, d_I, -n_I * self._n_I, -d_I * self._d_I])
        return unit * (floor + n_I + d_I), unit * slope_PI

    def constants(self, point_P: Floats) -> Floats:
        """E, A, B, alpha, beta and a, of N, D and losses as they were given."""
        floor, level_n, level_d, alpha, beta = point_P.tolist()
        lowest = float(self.loss.min())
        scale_n = np.exp(level_n + alpha * self.log_parameters.mean())
        scale_d = np.exp(level_d + beta * self.log_tokens.mean())
        share = beta / (alpha + beta)
        return np.array([lowest * floor, lowest * scale_n, lowest * scale_d, alpha, beta, share])

    def _start(self, alpha: float, beta: float) -> Floats:
        """For given exponents the law is linear: E, A and B by non-negative least squares."""
        terms_I3 = np.stack(
            [np.ones_like(self.loss), np.exp(-alpha * self._n_I), np.exp(-beta * self._d_I)], axis=1
        )
        relative_I3 = terms_I3 * np.exp(-self._log_loss_I)[:, None]
        floor, scale_n, scale_d = nnls(relative_I3, np.ones_like(self.loss))[0]
        levels = np.log(np.maximum([scale_n, scale_d], _NO_LEVEL))
        return np.array([floor, *levels, alpha, beta])


def _checked(parameters_I: ArrayLike, tokens_I: ArrayLike, loss_I: ArrayLike) -> Runs:
    named = {"parameters": parameters_I, "tokens": tokens_I, "loss": loss_I}
    arrays = {name: np.asarray(value, dtype=np.float64) for name, value in named.items()}
    shapes = {array.shape for array in arrays.values()}
    if len(shapes) != 1 or arrays["loss"].ndim != 1:
        raise TokscaleError(
            f"shapes {sorted(shapes)} are no runs; give one number of parameters, one of tokens "
            "and one loss per run"
        )
    for name, array in arrays.items():
        bad_I = ~(np.isfinite(array) & (array > 0))
        if bad_I.any():
            i = int(bad_I.argmax())
            raise UndefinedError(
                f"{name} of run {i} is {array[i]:g}; give finite, positive numbers"
            )
    if len(arrays["loss"]) < MIN_RUNS:
        raise UndefinedError(
            f"{len(arrays['loss'])} runs are too few for five parameters; give {MIN_RUNS} or more"
        )
    for name in ("parameters", "tokens"):
        if len(np.unique(arrays[name])) < MIN_LEVELS:
            raise UndefinedError(
                f"the runs have fewer than {MIN_LEVELS} different numbers of {name}, which show no "
                "exponent; vary them"
            )
    runs = Runs(np.log(arrays["parameters"]), np.log(arrays["tokens"]), arrays["loss"])
    if abs(np.corrcoef(runs.log_parameters, runs.log_tokens)[0, 1]) > 1 - _COLLINEAR:
        raise UndefinedError(
            "parameters and tokens of the runs vary only together, so alpha and beta cannot be "
            "told apart; add runs with other tokens per parameter"
        )
    if np.ptp(runs.loss) == 0:
        raise UndefinedError("all runs have the same loss, so there is no law; check the losses")
    return runs
