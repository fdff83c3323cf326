"""Loss deceleration of Mircea et al.: fit of a power law of the step that breaks to a slower one.

The law (docs/references.md 8.1) is a broken neural scaling law with one break in x = ln step,
ln L = ln b - c0 x - c1 f1 ln(1 + exp((x - ln d1) / f1)). Given d1 and f1 it is linear in ln b, c0
and c1.

Shapes: K probe steps, I distinct steps, J pairs of d1 and f1 on a grid, R bootstrap resamples.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import least_squares

from megatron_tokscale.core.arrays import Floats, Integers
from megatron_tokscale.core.errors import TokscaleError, UndefinedError
from megatron_tokscale.core.seed import DEFAULT_SEED
from megatron_tokscale.core.serial_correlation import (
    LEAST_FREEDOM,
    NO_ERROR,
    effective_points,
    serial_correlation,
)
from megatron_tokscale.core.words import time_text
from megatron_tokscale.laws.estimates import percentile_estimate
from megatron_tokscale.results.estimate import Estimate
from megatron_tokscale.results.laws import Deceleration

MIN_POINTS = 10  # twice the parameters; our choice
DISCARDED_STEPS = 100  # first steps, which the authors leave out; step 100 is the last of them
WINDOW = 1.2  # the authors' log window
_DECIMALS = 3  # the authors thin to every 1,000th step from step 10,000 on
_GREATEST_RATIO = 100.0  # of two rates: stands for infinity; our choice
_PART = 1 / 3  # of the fitted ln step, whose mean rates are compared; our choice
_PARAMETERS = 5  # parameters of the broken law
_LINE_PARAMETERS = 2  # parameters of a straight power law
_STARTS = 4  # descents from the best pairs of the grid; our choice
_LEAST_WIDTH, _GREATEST_WIDTH = 0.02, 2.0  # of a break, in ln step: kink to slow bend; our choice
_N_BREAKS, _N_WIDTHS = 24, 5  # grid of breaks and widths; our choice: cost against missed minima


def late_loss(break_loss: float, break_step: float, late_rate: float, step: float) -> float:
    """Return L_T = L_d (T / t_d)^-r_d, the loss at a `step` T after the break, in nats.

    The formula is Mircea et al.'s (docs/references.md 8.1).
    """
    return float(break_loss * (step / break_step) ** -late_rate)


def log_window_mean(step_K: ArrayLike, loss_K: ArrayLike, window: float = WINDOW) -> Floats:
    """Return the mean loss of the probes from each step / window up to the step, in nats.

    Mircea et al. average over every step (docs/references.md 8.1). Where probes are further apart
    than `window`, the losses stay as they are.
    """
    step, loss = np.asarray(step_K, dtype=np.float64), np.asarray(loss_K, dtype=np.float64)
    first_K = np.searchsorted(step, step / window)
    total_K = np.concatenate([[0.0], np.cumsum(loss)])
    last_K = np.arange(1, len(step) + 1)
    return np.asarray((total_K[last_K] - total_K[first_K]) / (last_K - first_K))


def merged_steps(step_K: Floats, loss_K: Floats) -> tuple[Floats, Floats]:
    """Return each step once, ascending, with the mean of its losses."""
    step_I, row_K, count_I = np.unique(step_K, return_inverse=True, return_counts=True)
    return step_I, np.asarray(np.bincount(row_K, loss_K) / count_I)


def decimal_rows(step_K: ArrayLike) -> Integers:
    """Return the rows that Mircea et al. fit of a curve with a loss at every step.

    They are steps 1, 2, ..., 99, 100, 110, ..., 1,000, 1,100, ..., 10,000, 11,000, ..., and the
    last one (docs/references.md 8.1): without thinning, the many late steps decide the fit. Where a
    curve has no row at such a step, the next row is taken.

    Args:
        step_K: steps of the rows, ascending.
    """
    step = np.maximum(np.asarray(step_K, dtype=np.float64), 0.5)
    every_K = 10 ** np.clip(np.floor(np.log10(step)) - 1, 0, _DECIMALS)
    grid_K = np.floor(step / every_K) * every_K
    begins_K = (np.diff(grid_K, prepend=0.0) > 0) & (step >= 1)
    begins_K[-1] = True
    return np.flatnonzero(begins_K)


def fit_deceleration(
    step_K: ArrayLike,
    loss_K: ArrayLike,
    *,
    from_: float | None = None,
    window: float = 1.0,
    n_resamples: int = 200,
    seed: int = DEFAULT_SEED,
) -> Deceleration:
    """Fit the broken power law of Mircea et al. by least squares on log losses.

    Mircea et al. (docs/references.md 8.1) average the losses of all steps over a log window of 1.2,
    take the averages at the steps of `decimal_rows`, leave out those up to step 100, and descend
    from d1 = 6000 and f1 = 0.3. On their smoothed curves this fit finds the breaks that they
    publish, within 0.1% (benchmarks/results/real_laws.md). The result depends on where the fit
    begins: with step 100 itself, breaks come 0.9 to 5% later.

    Here probes are few and spaced by the user, so by default they are neither averaged (`window` 1)
    nor thinned. A run may end before step 6000, so the descent starts from the best d1 and f1 of a
    grid over the fitted steps; given these, the other parameters are linear. Probes should lie
    evenly in ln step. Losses of equal steps, as a resumed run leaves them, are replaced by their
    mean.

    Intervals are percentiles of a residual bootstrap scaled for serial correlation, as in
    `fit_power_law`; they hold only if the loss follows the law. A smooth curve with a floor bends
    as well: a clear break shows that one power law without a floor is not enough. It does not show
    two power laws.

    Measured on 60 planted runs for each setting, of 40 or 60 probes with AR(1) noise of 0.5%: the
    95% intervals covered in 85 to 100%.

    Args:
        step_K: steps of the probes, ascending; equal steps are allowed.
        loss_K: loss in nats.
        from_: first step to fit; by default the first one after step 100.
        window: log window of `log_window_mean`, whose means replace the losses.
        n_resamples: number of bootstrap resamples R.
        seed: seed of the bootstrap.

    Raises:
        TokscaleError: the arguments do not fit together, or the steps descend.
        UndefinedError: there are fewer than ten probes, losses are not finite and positive, or the
            fitted loss does not fall from the first probe to the last.
    """
    step, loss = _fitted_losses(step_K, loss_K, from_, window)
    x_K, target_K = np.log(step), np.log(loss)
    grid = _Grid.over(x_K)
    best = _fit(x_K, target_K, grid)
    first, last = np.exp(best.predict(x_K[[0, -1]]))
    if last >= first:
        raise UndefinedError(
            f"the loss does not fall: {first:.4g} nats at {time_text(step[0])} and {last:.4g} at "
            f"{time_text(step[-1])}; expected a fall, which could slow down; train on"
        )
    residual_K = target_K - best.predict(x_K)
    rho = float(serial_correlation(residual_K, _PARAMETERS))
    effective = float(effective_points(len(x_K), rho))
    noise_K = _scaled_residuals(residual_K, effective)
    drawn_RK = np.random.default_rng(seed).choice(noise_K, (n_resamples, len(x_K)))
    resamples = [_fit(x_K, best.predict(x_K) + drawn_K, grid, n_starts=1) for drawn_K in drawn_RK]

    def estimate(number: Callable[[_BrokenLaw], float]) -> Estimate:
        return percentile_estimate(number(best), [number(law) for law in resamples])

    return Deceleration(
        break_loss=estimate(lambda law: law.break_loss),
        break_step=estimate(lambda law: law.break_step),
        late_rate=estimate(lambda law: law.late_rate),
        early_rate=best.early_rate,
        break_width=best.width,
        final_loss=estimate(lambda law: law.loss_at(step[-1])),
        rate_ratio=estimate(lambda law: law.rate_ratio(x_K)),
        delta_bic=_delta_bic(x_K, target_K, residual_K, effective),
        autocorrelation=rho,
        r2=float(1 - (residual_K**2).sum() / (len(x_K) * target_K.var())),
        n_points=len(x_K),
        from_step=float(step[0]),
        to_step=float(step[-1]),
    )


@dataclass(frozen=True)
class _BrokenLaw:
    """ln L = level - early_rate (x - x_d) - bend f ln(1 + exp((x - x_d) / f)), x_d = ln d1."""

    level: float
    early_rate: float
    bend: float
    x_break: float
    log_width: float

    @property
    def width(self) -> float:
        return float(np.exp(self.log_width))

    @property
    def late_rate(self) -> float:
        return self.early_rate + self.bend

    @property
    def break_step(self) -> float:
        return float(np.exp(self.x_break))

    @property
    def break_loss(self) -> float:
        return float(np.exp(self.level))

    def loss_at(self, step: float) -> float:
        return late_loss(self.break_loss, self.break_step, self.late_rate, step)

    def rate_ratio(self, x_K: Floats) -> float:
        """Return the mean exponent over the last third of the steps over that of the first third.

        Thirds are of ln step. A first rate that is nearly zero or negative gives the greatest
        ratio: such a curve does not decelerate.
        """
        part = (x_K[-1] - x_K[0]) * _PART
        ends = np.array([x_K[0], x_K[0] + part, x_K[-1] - part, x_K[-1]])
        first, _, last = -np.diff(self.predict(ends)) / part
        return float(last / first) if first * _GREATEST_RATIO > abs(last) else _GREATEST_RATIO

    def predict(self, x_K: Floats) -> Floats:
        """Return the law's log losses."""
        linear = np.array([self.level, self.early_rate, self.bend])
        return np.asarray(_columns(x_K, self.x_break, self.width) @ linear)


def _columns(x_K: Floats, x_break: ArrayLike, width: ArrayLike) -> Floats:
    """Return (..., K, 3): the factors of level, early rate and bend, for each break and width."""
    x_break, width = np.asarray(x_break)[..., None], np.asarray(width)[..., None]
    after = x_K - x_break
    return np.stack([np.ones_like(after), -after, -width * np.logaddexp(0, after / width)], axis=-1)


@dataclass(frozen=True)
class _Grid:
    """Pairs of break and width, each with an orthonormal basis of the curves that it can fit."""

    x_break_J: Floats
    log_width_J: Floats
    basis_JK3: Floats

    @classmethod
    def over(cls, x_K: Floats) -> Self:
        """Return the grid of breaks inside the fitted steps, and of widths, even in logarithm."""
        x_break_J, log_width_J = np.meshgrid(
            np.linspace(x_K[0], x_K[-1], _N_BREAKS + 2)[1:-1],
            np.linspace(np.log(_LEAST_WIDTH), np.log(_GREATEST_WIDTH), _N_WIDTHS),
        )
        columns_JK3 = _columns(x_K, x_break_J.ravel(), np.exp(log_width_J.ravel()))
        return cls(x_break_J.ravel(), log_width_J.ravel(), np.linalg.qr(columns_JK3).Q)

    def starts(self, target_K: Floats, n_starts: int) -> list[tuple[float, float]]:
        """Return the pairs of break and log width that fit the target best, best first."""
        explained_J = ((target_K @ self.basis_JK3) ** 2).sum(axis=-1)
        best_J = np.argsort(-explained_J)[:n_starts]
        return [(float(self.x_break_J[j]), float(self.log_width_J[j])) for j in best_J]


def _fit(x_K: Floats, target_K: Floats, grid: _Grid, n_starts: int = _STARTS) -> _BrokenLaw:
    """Return the best law of the descents from the `n_starts` best pairs of the grid."""
    descents = [_descend(x_K, target_K, start) for start in grid.starts(target_K, n_starts)]
    return min(descents, key=lambda law: float(((target_K - law.predict(x_K)) ** 2).sum()))


def _descend(x_K: Floats, target_K: Floats, start: tuple[float, float]) -> _BrokenLaw:
    """Descend in break and log width, and solve for the linear parameters (variable projection)."""

    def basis(pair: Floats) -> tuple[Floats, Floats]:
        basis_K3, triangle_33 = np.linalg.qr(_columns(x_K, pair[0], np.exp(pair[1])))
        return np.asarray(basis_K3), np.asarray(triangle_33)

    def residual(pair: Floats) -> Floats:
        basis_K3, _ = basis(pair)
        return np.asarray(basis_K3 @ (target_K @ basis_K3) - target_K)

    low, high = [x_K[0], np.log(_LEAST_WIDTH)], [x_K[-1], np.log(_GREATEST_WIDTH)]
    best = least_squares(residual, np.clip(start, low, high), bounds=(low, high), max_nfev=60)
    basis_K3, triangle_33 = basis(best.x)
    level, early_rate, bend = np.linalg.solve(triangle_33, target_K @ basis_K3).tolist()
    return _BrokenLaw(level, early_rate, bend, float(best.x[0]), float(best.x[1]))


def _scaled_residuals(residual_K: Floats, effective: float) -> Floats:
    """Return residuals to draw one by one, scaled for correlation and the fitted parameters."""
    freedom = max(effective - _PARAMETERS, LEAST_FREEDOM)
    return np.asarray((residual_K - residual_K.mean()) * np.sqrt(len(residual_K) / freedom))


def _delta_bic(x_K: Floats, target_K: Floats, residual_K: Floats, effective: float) -> float:
    line_K = target_K - np.polyval(np.polyfit(x_K, target_K, 1), x_K)
    fall = np.log(max((line_K**2).mean(), NO_ERROR) / max((residual_K**2).mean(), NO_ERROR))
    return float(effective * fall - (_PARAMETERS - _LINE_PARAMETERS) * np.log(effective))


def _fitted_losses(
    step_K: ArrayLike, loss_K: ArrayLike, from_: float | None, window: float
) -> tuple[Floats, Floats]:
    """Return steps and losses to fit.

    Losses are averaged before the first steps are left out, as the first window reaches into them.
    """
    step, loss = _checked_curve(step_K, loss_K)
    if window < 1:
        raise TokscaleError(
            f"the log window of {window:g} is below 1, which averages nothing; take 1"
        )
    fitted_K = (step > DISCARDED_STEPS) if from_ is None else (step > 0) & (step >= from_)
    if fitted_K.sum() < MIN_POINTS:
        start = f"after step {DISCARDED_STEPS}" if from_ is None else f"from step {from_:g} on"
        raise UndefinedError(
            f"{fitted_K.sum()} probes {start} are too few for a break; expected {MIN_POINTS} or "
            "more; fit from an earlier step or probe more often"
        )
    return step[fitted_K], log_window_mean(step, loss, window)[fitted_K]


def _checked_curve(step_K: ArrayLike, loss_K: ArrayLike) -> tuple[Floats, Floats]:
    """Return ascending steps and the mean loss of each."""
    step, loss = np.asarray(step_K, dtype=np.float64), np.asarray(loss_K, dtype=np.float64)
    if step.ndim != 1 or step.shape != loss.shape or not len(step):
        raise TokscaleError(
            f"steps of shape {step.shape} and losses of shape {loss.shape} are not a loss curve; "
            "expected one loss per step"
        )
    if not np.isfinite(step).all() or step[0] < 0 or (np.diff(step) < 0).any():
        raise TokscaleError("the steps of a loss curve do not ascend from 0 or later; sort them")
    if not (np.isfinite(loss) & (loss > 0)).all():
        raise UndefinedError(
            "losses are not finite and positive, as a power law needs them; leave out those probes"
        )
    return merged_steps(step, loss)
