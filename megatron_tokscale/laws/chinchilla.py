"""Chinchilla's law L = E + A N^-alpha + B D^-beta over runs, and the best use of compute.

The fit is Besiroglu et al.'s (docs/references.md 8.3). Shapes: I runs, S predicted
runs, P = 5 parameters (E, ln A, ln B, alpha, beta, centred), R bootstrap resamples.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Self

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import minimize, nnls

from megatron_tokscale.core.arrays import Floats
from megatron_tokscale.core.errors import TokscaleError, UndefinedError
from megatron_tokscale.core.seed import DEFAULT_SEED
from megatron_tokscale.core.words import counted
from megatron_tokscale.laws.estimates import percentile_estimate
from megatron_tokscale.laws.power_law.huber import DELTA, EXPONENT_BOUNDS
from megatron_tokscale.results.laws import ChinchillaForecast, ChinchillaLaw, RunLoss

MIN_RUNS = 6  # one more than the law's parameters
MIN_LEVELS = 3  # different values of N and of D: two show no curvature, so no exponent
_EXPONENTS = (0.05, 0.15, 0.3, 0.5, 0.8, 1.2, 2.0)  # exponents in the grid of starts; our choice
_DESCENTS = 12  # from the best of 49 starts; our choice: cost against missed minima
_LEVEL_BOUNDS = (-50.0, 50.0)  # bounds of ln A and ln B: keep a wild step from overflow
_NO_LEVEL = 1e-6  # stands for zero, whose logarithm is infinite, if a start lacks a term
_COLLINEAR = 1e-6  # 1 minus the correlation of ln N and ln D that counts as 0


def fit_chinchilla(
    parameters_I: ArrayLike,
    tokens_I: ArrayLike,
    loss_I: ArrayLike,
    *,
    n_resamples: int = 200,
    seed: int = DEFAULT_SEED,
) -> ChinchillaLaw:
    """Fit L = E + A N^-alpha + B D^-beta, E >= 0: Huber loss (delta 1e-3) on log residuals.

    The objective is the sum over runs; L-BFGS-B minimises it with its exact gradient from the best
    of a grid of exponents. Intervals are percentiles of a bootstrap over runs: they count runs as
    independent, which checkpoints of one run are not. With few runs, or a narrow range of N or D, A
    and B are known only to an order of magnitude; alpha, beta and a are known better. Several runs
    of one size or budget are allowed, such as repeats with another seed.

    Measured coverage of the 95% intervals: 96-98% in 57 planted repeats of 30 runs over two decades
    of N and D, noise 0.3%.

    Args:
        parameters_I: N, the parameters of each run's model.
        tokens_I: D, the tokens that each run was trained on.
        loss_I: final loss of each run, in nats.
        n_resamples: number of bootstrap resamples R.
        seed: seed of the bootstrap.

    Raises:
        TokscaleError: the arguments do not fit together.
        UndefinedError: there are fewer than six runs, or fewer than three different N or D; N and D
            vary only together; all losses are the same; or a number is not finite and positive.
    """
    return _Fit.to(_checked_runs(parameters_I, tokens_I, loss_I), n_resamples, seed).law


def forecast_chinchilla(
    rows: Sequence[RunLoss], *, n_resamples: int = 200, seed: int = DEFAULT_SEED
) -> ChinchillaForecast:
    """Fit the law to all runs but those of the largest model, and predict the losses of these.

    N is without embeddings. The interval of the mean relative error is percentiles of a bootstrap
    over the fitted and over the predicted runs.

    Raises:
        UndefinedError: a run's size or tokens are unknown, there are too few runs of smaller
            models, or as in `fit_chinchilla`.
    """
    n_I, d_I, loss_I = _sizes(rows)
    held_I = n_I == n_I.max()
    smaller = int((~held_I).sum())
    if smaller < MIN_RUNS:
        raise UndefinedError(
            f"{counted(smaller, 'run')} of models smaller than the largest are too few to forecast "
            f"it from; expected {MIN_RUNS} or more; add runs of smaller models"
        )
    fit = _Fit.to(_checked_runs(n_I[~held_I], d_I[~held_I], loss_I[~held_I]), n_resamples, seed)
    n_S, d_S, loss_S = n_I[held_I], d_I[held_I], loss_I[held_I]
    predicted_S = fit.law.predict(n_S, d_S)
    floor_R, scale_n_R, scale_d_R, alpha_R, beta_R, _ = fit.constants_RC.T[..., None]
    predicted_RS = floor_R + scale_n_R * n_S**-alpha_R + scale_d_R * d_S**-beta_R
    drawn_RS = np.random.default_rng(seed).integers(len(n_S), size=predicted_RS.shape)
    error_RS = np.take_along_axis(predicted_RS / loss_S - 1, drawn_RS, axis=1)
    return ChinchillaForecast(
        law=fit.law,
        names=tuple(row.name for row, is_held in zip(rows, held_I, strict=True) if is_held),
        loss_S=tuple(loss_S.tolist()),
        predicted_S=tuple(predicted_S.tolist()),
        error=percentile_estimate(float((predicted_S / loss_S - 1).mean()), error_RS.mean(axis=1)),
    )


def chinchilla_over_runs(rows: Sequence[RunLoss], n_resamples: int, seed: int) -> ChinchillaLaw:
    """Fit Chinchilla's law to the last losses of runs, N without embeddings.

    Raises:
        UndefinedError: a run's size or tokens are unknown, or as in `fit_chinchilla`.
    """
    return fit_chinchilla(*_sizes(rows), n_resamples=n_resamples, seed=seed)


def _sizes(rows: Sequence[RunLoss]) -> tuple[Floats, Floats, Floats]:
    """Return the parameters without embeddings, the tokens and the losses of runs."""
    parameters, tokens = [], []
    for row in rows:
        if row.non_embedding is None:
            raise UndefinedError(f"the size of the model of {row.name} is not known")
        if row.tokens is None:
            raise UndefinedError(f"{row.name} has no record of its consumed tokens")
        parameters.append(row.non_embedding)
        tokens.append(row.tokens)
    losses = [row.loss for row in rows]
    return np.array(parameters, float), np.array(tokens, float), np.array(losses)


@dataclass(frozen=True)
class _Fit:
    """A fitted law, and the constants of its resamples (R, C): E, A, B, alpha, beta and a."""

    law: ChinchillaLaw
    constants_RC: Floats

    @classmethod
    def to(cls, runs: "Runs", n_resamples: int, seed: int) -> Self:
        """Fit the law to the runs, and to resamples of them."""
        best_P, converged = runs.solve()
        n_runs = len(runs.loss)
        rng = np.random.default_rng(seed)
        drawn_RI = rng.multinomial(n_runs, np.full(n_runs, 1 / n_runs), n_resamples)
        solution_RP = [runs.descend(best_P, drawn_I.astype(np.float64))[0] for drawn_I in drawn_RI]
        constants_RC = np.array([runs.constants(solution_P) for solution_P in solution_RP])
        pairs = zip(runs.constants(best_P).tolist(), constants_RC.T, strict=True)
        floor, scale_n, scale_d, alpha, beta, share = (percentile_estimate(*pair) for pair in pairs)
        residual_I = np.log(runs.predict(best_P)[0] / runs.loss)
        law = ChinchillaLaw(
            floor=floor,
            A=scale_n,
            B=scale_d,
            alpha=alpha,
            beta=beta,
            a=share,
            r2=float(1 - (residual_I**2).mean() / np.log(runs.loss).var()),
            n_runs=n_runs,
            converged=converged,
        )
        return cls(law, constants_RC)


@dataclass(frozen=True)
class Runs:
    """Logarithms of N and D, and the losses, of the fitted runs.

    The optimiser works on ln N minus its mean, on ln D minus its mean, and on losses divided by the
    lowest loss. A and B are then losses at the middle of the runs, and hardly correlate with alpha
    and beta. E itself is a parameter, not its logarithm, as in `huber.Curve`.
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
        """Return the best point reached from the best starts, and whether it is a minimum.

        A point at a bound of an exponent is no minimum.
        """
        every_I = np.ones_like(self.loss)
        starts = [self._start(alpha, beta) for alpha, beta in product(_EXPONENTS, repeat=2)]
        starts.sort(key=lambda start_P: self.objective(start_P, every_I)[0])
        minima = [self.descend(start_P, every_I) for start_P in starts[:_DESCENTS]]
        best_P, _, success = min(minima, key=lambda minimum: minimum[1])
        low, high = EXPONENT_BOUNDS
        return best_P, success and bool(((best_P[3:] > low) & (best_P[3:] < high)).all())

    def descend(self, start_P: Floats, weight_I: Floats) -> tuple[Floats, float, bool]:
        """Return the point reached from `start_P`, its objective, and whether it is a minimum."""
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
        """Return the weighted sum of the Huber losses over delta, and its gradient."""
        loss_I, slope_PI = self.predict(point_P, 1.0)
        residual_I = np.log(loss_I) - self._log_loss_I
        clipped_I = np.clip(residual_I, -DELTA, DELTA)
        value = weight_I @ (clipped_I * (residual_I - clipped_I / 2)) / DELTA
        return float(value), slope_PI @ (weight_I * clipped_I / (loss_I * DELTA))

    def predict(self, point_P: Floats, unit: float | None = None) -> tuple[Floats, Floats]:
        """Return the law's losses at the runs, and their derivatives (P, I).

        Args:
            point_P: parameters of the optimiser.
            unit: the lowest loss in the unit of the result; by default in nats.
        """
        floor, level_n, level_d, alpha, beta = point_P
        unit = float(self.loss.min()) if unit is None else unit
        n_I, d_I = np.exp(level_n - alpha * self._n_I), np.exp(level_d - beta * self._d_I)
        slope_PI = np.stack([np.ones_like(n_I), n_I, d_I, -n_I * self._n_I, -d_I * self._d_I])
        return unit * (floor + n_I + d_I), unit * slope_PI

    def constants(self, point_P: Floats) -> Floats:
        """Return E, A, B, alpha, beta and a, in the units of N, D and the losses."""
        floor, level_n, level_d, alpha, beta = point_P.tolist()
        lowest = float(self.loss.min())
        scale_n = np.exp(level_n + alpha * self.log_parameters.mean())
        scale_d = np.exp(level_d + beta * self.log_tokens.mean())
        share = beta / (alpha + beta)
        return np.array([lowest * floor, lowest * scale_n, lowest * scale_d, alpha, beta, share])

    def _start(self, alpha: float, beta: float) -> Floats:
        """Return the start at given exponents: E, A and B by non-negative least squares."""
        terms_I3 = np.stack(
            [np.ones_like(self.loss), np.exp(-alpha * self._n_I), np.exp(-beta * self._d_I)], axis=1
        )
        relative_I3 = terms_I3 * np.exp(-self._log_loss_I)[:, None]
        floor, scale_n, scale_d = nnls(relative_I3, np.ones_like(self.loss))[0]
        levels = np.log(np.maximum([scale_n, scale_d], _NO_LEVEL))
        return np.array([floor, *levels, alpha, beta])


def _checked_runs(parameters_I: ArrayLike, tokens_I: ArrayLike, loss_I: ArrayLike) -> Runs:
    named = {"parameters": parameters_I, "tokens": tokens_I, "loss": loss_I}
    arrays = {name: np.asarray(value, dtype=np.float64) for name, value in named.items()}
    shapes = {array.shape for array in arrays.values()}
    if len(shapes) != 1 or arrays["loss"].ndim != 1:
        raise TokscaleError(
            f"parameters, tokens and losses are of shapes {sorted(shapes)}; expected one number of "
            "each per run"
        )
    for name, array in arrays.items():
        bad_I = ~(np.isfinite(array) & (array > 0))
        if bad_I.any():
            i = int(bad_I.argmax())
            raise UndefinedError(
                f"{name} of run {i} is {array[i]:g}; expected a finite, positive number"
            )
    if len(arrays["loss"]) < MIN_RUNS:
        raise UndefinedError(
            f"{len(arrays['loss'])} runs are too few for the five constants of Chinchilla's law; "
            f"expected {MIN_RUNS} or more; add runs"
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
            "separated; add runs with other tokens per parameter"
        )
    if np.ptp(runs.loss) == 0:
        raise UndefinedError("all runs have the same loss, so there is no law; check the losses")
    return runs
