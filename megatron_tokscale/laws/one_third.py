"""The one-third law of Liu et al. (papers.md 3), and whether groups of tokens share its slope.

tau is the sum of the learning rates, x = ln tau. `fit_one_third` fits one loss curve as they do.
`group_test` sets a slope that all groups share against drops at the groups' own times: each is, for
every group g, floor_g + drop_g h(x; own_g, common), whose linear part has a closed form; so all
groups and resamples are fitted at once, on grids of the rest that close in on the minimum.

Shapes: K probe steps, G groups, R data sets (the first as given, then resamples), B blocks of
probes, M models, P values of a group's own parameter, Q of the one that groups may share.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import curve_fit
from scipy.special import expit
from scipy.stats import chi2
from scipy.stats import t as student_t

from megatron_tokscale.errors import TokscaleError

Array = NDArray[np.float64]
Interval = tuple[float, float]

ONE_THIRD = 1 / 3
MIN_POINTS = 6
DISCARDED = 0.1
DISCARDED_POINTS = 2
GROUPS_DISCARDED = 0.01
MIN_BLOCKS = 4
_POINTS_PER_BLOCK = 2
_MAX_CORRELATION = 0.9
_LEAST_FREEDOM = 2.0
_ROUNDING = 1e-8
_FLAT = 1e-12
_NO_ERROR = 1e-24  # relative squared error of what has none but rounding

_LEAST_EXPONENT, _GREATEST_EXPONENT, _N_EXPONENTS = 0.01, 5.0, 120
_LEAST_WIDTH = 0.05
_N_MIDPOINTS, _N_WIDTHS = 48, 10
_ROUNDS = 14
_SHRINK = 0.65  # of the step per round: slow enough to follow a narrow valley


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

    def predict(self, lr_sum: ArrayLike) -> Array:
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
        TokscaleError: fewer than six points, tau that does not ascend, losses that are not finite
            and positive, no minimum.
    """
    tau_K, loss = _checked(lr_sum_K, loss_K)
    if loss.ndim != 1:
        raise TokscaleError(f"losses of shape {loss.shape} are more than one curve; give one curve")
    start = _start(tau_K) if from_ is None else from_
    fitted_K = _from(tau_K, start, MIN_POINTS)
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


def serial_correlation(residual_GK: Array, n_parameters: float) -> Array:
    """Lag-1 correlation in [0, 0.9] along the last axis, corrected for a fit's `n_parameters`.

    A smooth parameter takes one slow mode out of the residuals, which lowers their lag-1
    correlation by about 1/K; estimating it lowers it by (1 + 3 rho)/K more (Kendall 1954).
    """
    centred_GK = residual_GK - residual_GK.mean(axis=-1, keepdims=True)
    n = centred_GK.shape[-1]
    square_G = (centred_GK**2).sum(axis=-1)
    product_G = (centred_GK[..., 1:] * centred_GK[..., :-1]).sum(axis=-1)
    raw_G = np.where(square_G > n * _ROUNDING**2, product_G / np.maximum(square_G, 1e-300), -1)
    corrected_G = (n * raw_G + n_parameters) / max(n - n_parameters - 1, 1)
    return np.asarray(np.clip(corrected_G, 0, _MAX_CORRELATION))


def effective_points(n_points: int, correlation: ArrayLike) -> Array:
    """How many independent residuals so many correlated ones are worth: K (1 - rho) / (1 + rho)."""
    rho = np.asarray(correlation, dtype=np.float64)
    return np.asarray(n_points * (1 - rho) / (1 + rho))


def _log_law(tau_K: Array, scale: float, exponent: float, floor: float) -> Array:
    return np.asarray(np.log(floor + scale * tau_K**-exponent))


def _log_one_third(tau_K: Array, scale: float, floor: float) -> Array:
    return _log_law(tau_K, scale, ONE_THIRD, floor)


def _curve_fit(
    law: Callable[..., Array], tau_K: Array, target_K: Array, start: list[float]
) -> tuple[Array, Array]:
    """curve_fit with every parameter from 0 on and the last, the floor, up to the last loss."""
    highest = [np.inf] * (len(start) - 1) + [start[-1]]
    try:
        best, covariance = curve_fit(
            law, tau_K, target_K, p0=start, bounds=([0] * len(start), highest), maxfev=100_000
        )
    except (RuntimeError, ValueError) as error:
        raise TokscaleError(
            f"the loss from tau {tau_K[0]:g} on has no best power law ({error}); fit another range"
        ) from error
    return np.asarray(best), np.asarray(covariance)


def _r2(target_K: Array, residual_K: Array) -> float:
    return float(1 - (residual_K**2).sum() / (len(target_K) * target_K.var()))


def _reach(se: float, n_points: int, rho: float) -> float:
    """Half a 95% interval from a standard error that took the residuals for independent."""
    effective = float(effective_points(n_points, rho))
    freedom = max(effective - 3, _LEAST_FREEDOM)
    widened = se * np.sqrt((n_points - 3) / freedom)
    return float(widened * student_t.ppf(0.975, freedom))


@dataclass(frozen=True)
class ModelScore:
    """How well one model describes all groups; errors are mean squares of relative residuals.

    Attributes:
        n_parameters: fitted numbers, over all groups.
        error: at all probes, fitted to all.
        held_out_error: at probes that the fit did not see, mean over blocks.
        held_out_error_B: the same by block.
        bic: n ln(error) + n_parameters ln(n) for n effective points; lower is better.
    """

    n_parameters: int
    error: float
    held_out_error: float
    held_out_error_B: Array
    bic: float


@dataclass(frozen=True)
class GroupExponents:
    """The exponents of power laws with floors, common and by group, with 95% intervals.

    Attributes:
        common: alpha of "one slope".
        common_interval: profile interval with the correlations of probes and of groups.
        exponent_G: alpha_g of "own slopes".
        se_G: half of the one-sigma profile interval.
        interval_G2: profile intervals; from 0 or to inf where the losses do not tell.
        heterogeneity: Cochran's Q, the groups' squared distances from one exponent in standard
            errors, along their profiles.
        heterogeneity_p: its p-value, chi-squared of G - 1; near 0: one exponent is not enough.
    """

    common: float
    common_interval: Interval
    exponent_G: Array
    se_G: Array
    interval_G2: Array
    heterogeneity: float
    heterogeneity_p: float

    @property
    def holds_one_third_G(self) -> NDArray[np.bool_]:
        """Whether each group's interval holds 1/3."""
        low_G, high_G = self.interval_G2.T
        return np.asarray((low_G <= ONE_THIRD) & (high_G >= ONE_THIRD))


@dataclass(frozen=True)
class GroupDrops:
    """The sigmoids of "own times".

    Attributes:
        midpoint_G: e^c_g, in the unit of tau.
        width: w, in units of ln tau; 10-90% of a drop takes 4.394 w.
        floor_G: f_g, nats.
        drop_G: A_g, nats.
    """

    midpoint_G: Array
    width: float
    floor_G: Array
    drop_G: Array


@dataclass(frozen=True)
class GroupNoise:
    """How alike neighbouring probes and different groups err, from the closest fit's residuals.

    Attributes:
        autocorrelation: lag-1 correlation over probes, corrected for the fit's bias.
        group_correlation: mean correlation of two groups.
        n_effective: independent points that all fitted losses are worth.
    """

    autocorrelation: float
    group_correlation: float
    n_effective: float


@dataclass(frozen=True)
class GroupTest:
    """Do groups of tokens share one slope in ln tau, or does each drop at its own time?

    Attributes:
        models: scores by name; of a group g at x = ln tau
            "one third": floor_g + scale_g tau^-1/3,
            "one slope": floor_g + scale_g tau^-alpha,
            "own slopes": floor_g + scale_g tau^-alpha_g,
            "own times": floor_g + drop_g / (1 + exp((x - c_g) / w)),
            "own times and widths": the same with w_g.
        difference: held-out error of "one slope" less that of "own times".
        block_interval: 95% interval of the difference, Student's t over the blocks of probes.
        resample_interval: 95% of the differences of the resamples; None without resamples.
        exponents: of the power laws.
        drops: of the sigmoids with a common width.
        noise: its correlations.
        n_points: probes fitted.
        from_lr_sum: first fitted tau.
        to_lr_sum: last fitted tau.
    """

    models: dict[str, ModelScore]
    difference: float
    block_interval: Interval
    resample_interval: Interval | None
    exponents: GroupExponents
    drops: GroupDrops
    noise: GroupNoise
    n_points: int
    from_lr_sum: float
    to_lr_sum: float

    @property
    def verdict(self) -> str:
        """In words: decided if each interval of the difference keeps to the same side of zero."""
        given = [self.block_interval, self.resample_interval]
        sides = {_side(interval) for interval in given if interval is not None}
        return _VERDICTS[sides.pop()] if len(sides) == 1 else _VERDICTS[0]


_VERDICTS = {
    1: "each group drops at its own time",
    0: "not decided",
    -1: "all groups share one slope",
}


def _side(interval: Interval) -> int:
    return int(interval[0] > 0) - int(interval[1] < 0)


def group_test(
    lr_sum_K: ArrayLike,
    loss_GK: ArrayLike,
    *,
    weight_G: ArrayLike | None = None,
    loss_RGK: ArrayLike | None = None,
    from_: float | None = None,
    n_blocks: int = 10,
) -> GroupTest:
    """Set one slope in ln tau for all groups against drops at the groups' own times.

    The softmax mechanism (papers.md 3) gives every group the slope -1/3 and its own scale and
    floor; the quanta mechanism (papers.md 4) lets each group drop at its own time. All models are
    fitted by least squares on relative residuals, to first order those of log losses, with floors
    and drops not negative. They are scored at probes that the fit did not see: contiguous blocks
    are held out one at a time, of all groups at once, since neighbouring probes and groups err
    alike. The first and the last block are always fitted: beyond the fitted probes a drop that none
    of them shows could be anything, and that would count for the other side.

    A sigmoid far before the first probe with a width of 3 in ln tau is the one-third law. So only a
    drop counts as one (our choice): midpoints lie in the fitted range, and the 10-90% of a drop,
    2 ln 9 w (papers.md 1.4), is not longer than that range.

    Groups must not be chosen by the noise of the losses tested: take token frequency, or learning
    times of another run or of other tokens. Resamples of tokens know of no noise that all tokens
    share; blocks do.

    Measured on 50 planted data sets each, 10 or 4 groups, 24 or 45 probes over two decades, AR(1)
    noise of 0.5% (rho 0.5 within each group, or 0.7 and nearly the same in all): all 200 of one
    slope and all 250 of own times, w 0.2 to 0.8, had the right verdict. At noise of 2% a verdict
    was never wrong, and missing in 2 of 100. Q's p-value is below 5% for 0 to 12% of data sets
    with one exponent; each group's interval covers in 92 to 94%, the common one in 90 to 96%.

    The verdict is between two models only: look whether a third has the least held-out error. Of 15
    planted sets of groups with exponents of their own, 14 were undecided and one was called drops.

    Args:
        lr_sum_K: tau, the sum of the learning rates up to each probe, ascending; tau of 0 is always
            left out.
        loss_GK: mean loss of each group, nats.
        weight_G: share of each group in errors and common parameters; by default all alike.
        loss_RGK: resamples of `loss_GK`, for example over documents.
        from_: first tau to fit; by default a hundredth of the last. From a tenth on, as for one
            curve, few probes are left and hardly a drop is seen whole. Report other starts too.
        n_blocks: blocks of probes, at least four.

    Raises:
        TokscaleError: shapes that do not fit together, fewer than two groups or than two probes per
            block, losses that are not finite and positive, weights that are not positive.
    """
    tau_K, loss_SGK, weights_G = _checked_groups(lr_sum_K, loss_GK, weight_G, loss_RGK)
    if n_blocks < MIN_BLOCKS:
        raise TokscaleError(f"{n_blocks} blocks are too few to compare; take at least four blocks")
    start = GROUPS_DISCARDED * tau_K[-1] if from_ is None else from_
    fitted_K = _from(tau_K, start, _POINTS_PER_BLOCK * n_blocks)
    tau_K, loss_SGK = tau_K[fitted_K], loss_SGK[:, :, fitted_K]
    x_K = np.log(tau_K / tau_K[0])
    models = _models(float(x_K[-1]))
    given = _Losses(x_K, loss_SGK[:1], weights_G)
    fits = {name: given.fit(model) for name, model in models.items()}
    closest = min(fits, key=lambda name: given.error(fits[name]))
    per_group = models[closest].n_parameters(len(weights_G)) / len(weights_G)
    noise = _noise(fits[closest].residual_RGK[0], per_group)
    scores = {
        name: _score(given, model, fits[name], noise.n_effective, n_blocks)
        for name, model in models.items()
    }
    resampled = _Losses(x_K, loss_SGK[1:], weights_G)
    slope, times = (scores[name].held_out_error_B for name in ("one slope", "own times"))
    return GroupTest(
        models=scores,
        difference=float((slope - times).mean()),
        block_interval=_block_interval(slope - times),
        resample_interval=_resample_interval(resampled, models, n_blocks),
        exponents=_exponents(given, models, fits),
        drops=_drops(fits["own times"], float(tau_K[0])),
        noise=noise,
        n_points=len(tau_K),
        from_lr_sum=float(tau_K[0]),
        to_lr_sum=float(tau_K[-1]),
    )


@dataclass(frozen=True)
class _Model:
    """floor_g + drop_g curve(x; own_g, common), with even grids of what is not linear in it."""

    curve: Callable[[Array, Array, Array], Array]
    own_P: Array
    common_Q: Array
    shared: bool

    def n_parameters(self, n_groups: int) -> int:
        free = len(self.common_Q) > 1
        per_group = 2 + (len(self.own_P) > 1) + (free and not self.shared)
        return per_group * n_groups + (free and self.shared)


def _models(length: float) -> dict[str, _Model]:
    """The models of `GroupTest.models` for probes over `length` units of x from 0 on."""
    none_P = np.zeros(1)
    third_Q = np.log([ONE_THIRD])
    exponent_Q = np.linspace(np.log(_LEAST_EXPONENT), np.log(_GREATEST_EXPONENT), _N_EXPONENTS)
    midpoint_P = np.linspace(0, length, _N_MIDPOINTS)
    greatest = max(length / (2 * np.log(9)), 2 * _LEAST_WIDTH)
    width_Q = np.linspace(np.log(_LEAST_WIDTH), np.log(greatest), _N_WIDTHS)
    return {
        "one third": _Model(_power, none_P, third_Q, True),
        "one slope": _Model(_power, none_P, exponent_Q, True),
        "own slopes": _Model(_power, none_P, exponent_Q, False),
        "own times": _Model(_sigmoid, midpoint_P, width_Q, True),
        "own times and widths": _Model(_sigmoid, midpoint_P, width_Q, False),
    }


def _power(x: Array, shift: Array, log_exponent: Array) -> Array:
    """tau^-exponent; its shift is never free, as scale_g takes it up."""
    return np.asarray(np.exp(np.exp(log_exponent) * (shift - x)))


def _sigmoid(x: Array, midpoint: Array, log_width: Array) -> Array:
    return np.asarray(expit((midpoint - x) / np.exp(log_width)))


@dataclass(frozen=True)
class _Fit:
    """A model's parameters and relative residuals, for every data set and group."""

    own_RG: Array
    common_RG: Array
    floor_RG: Array
    drop_RG: Array
    residual_RGK: Array


@dataclass(frozen=True)
class _Losses:
    """Losses of groups at x. Squared relative residuals weigh a squared residual by loss^-2."""

    x_K: Array
    loss_RGK: Array
    weight_G: Array

    def fit(self, model: _Model, held_out_K: NDArray[np.bool_] | None = None) -> _Fit:
        """The best parameters on the model's grids, then on ever finer ones around the best."""
        kept_K = np.ones(len(self.x_K), bool) if held_out_K is None else ~held_out_K
        x_K, loss_RGK = self.x_K[kept_K], self.loss_RGK[:, :, kept_K]
        many = (*loss_RGK.shape[:2], 1)
        own_RGP, common_RGQ = np.tile(model.own_P, many), np.tile(model.common_Q, many)
        error_RGPQ = _grid_errors(model, x_K, loss_RGK)
        own_RG, common_RG = self._best(model.shared, own_RGP, common_RGQ, error_RGPQ)
        for shrink in _SHRINK ** np.arange(1, _ROUNDS + 1):
            own_RGP = _around(own_RG, model.own_P, shrink)
            common_RGQ = _around(common_RG, model.common_Q, shrink)
            h_RGPQK = model.curve(x_K, own_RGP[..., None, None], common_RGQ[..., None, :, None])
            error_RGPQ = _solve(_Moments.of(h_RGPQK, loss_RGK[:, :, None, None])).error
            own_RG, common_RG = self._best(model.shared, own_RGP, common_RGQ, error_RGPQ)
        h_RGK = model.curve(self.x_K, own_RG[..., None], common_RG[..., None])
        linear = _solve(_Moments.of(h_RGK[:, :, kept_K], loss_RGK))
        fitted_RGK = linear.floor[..., None] + linear.drop[..., None] * h_RGK
        residual_RGK = fitted_RGK / self.loss_RGK - 1
        return _Fit(own_RG, common_RG, linear.floor, linear.drop, residual_RGK)

    def error(self, fit: _Fit) -> float:
        """Mean squared relative residual of the first data set, over all probes."""
        return float(self.weight_G @ (fit.residual_RGK[0] ** 2).mean(axis=-1))

    def held_out_errors(self, model: _Model, n_blocks: int) -> Array:
        """(R, B) mean squared relative residuals at each inner block, fitted without it."""
        block_K = np.arange(len(self.x_K)) * n_blocks // len(self.x_K)
        blocks = [block_K == block for block in range(1, n_blocks - 1)]
        return np.stack([self._held_out_error(model, held_out_K) for held_out_K in blocks], axis=1)

    def _held_out_error(self, model: _Model, held_out_K: NDArray[np.bool_]) -> Array:
        residual_RGK = self.fit(model, held_out_K).residual_RGK[:, :, held_out_K]
        return np.asarray((residual_RGK**2).mean(axis=-1) @ self.weight_G)

    def _best(
        self, shared: bool, own_RGP: Array, common_RGQ: Array, error_RGPQ: Array
    ) -> tuple[Array, Array]:
        """Own and common parameters of least error, the second over all groups if `shared`."""
        error_RGQ = error_RGPQ.min(axis=2)
        if shared:
            total_RQ = np.einsum("rgq,g->rq", error_RGQ, self.weight_G)
            error_RGQ = np.broadcast_to(total_RQ[:, None], error_RGQ.shape)
        q_RG1 = error_RGQ.argmin(axis=2)[..., None]
        p_RG1 = np.take_along_axis(error_RGPQ.argmin(axis=2), q_RG1, axis=2)
        own_RG = np.take_along_axis(own_RGP, p_RG1, axis=2)[..., 0]
        return own_RG, np.take_along_axis(common_RGQ, q_RG1, axis=2)[..., 0]


def _around(value_RG: Array, grid_P: Array, shrink: float) -> Array:
    """The value and one to each side, a share of the grid's spacing away and within the grid."""
    if len(grid_P) == 1:
        return value_RG[..., None]
    step = (grid_P[1] - grid_P[0]) * shrink
    around_RGP = value_RG[..., None] + step * np.array([-1, 0, 1])
    return np.asarray(np.clip(around_RGP, grid_P[0], grid_P[-1]))


@dataclass(frozen=True)
class _Moments:
    """Sums over probes, with u = loss^-2: of u, u h, u h^2, u loss, u loss h, u loss^2."""

    u: Array
    uh: Array
    uhh: Array
    uy: Array
    uyh: Array
    uyy: int

    @staticmethod
    def of(h_K: Array, loss_K: Array) -> "_Moments":
        """Of curves and losses whose leading shapes broadcast."""
        y_K = 1 / loss_K
        uh_K = y_K**2 * h_K
        return _Moments(
            (y_K**2).sum(axis=-1),
            uh_K.sum(axis=-1),
            (uh_K * h_K).sum(axis=-1),
            y_K.sum(axis=-1),
            (y_K * h_K).sum(axis=-1),
            loss_K.shape[-1],
        )


@dataclass(frozen=True)
class _Linear:
    """The best floor and drop, neither negative, and the sum of squared relative residuals."""

    floor: Array
    drop: Array
    error: Array


def _solve(m: _Moments) -> _Linear:
    """Normal equations; where one parameter would be negative it is 0 and the other alone is best.

    Sums are positive, so the other one is not negative then. A curve that is flat at the probes has
    no drop.
    """
    determinant = m.u * m.uhh - m.uh**2
    curved = determinant > _FLAT * m.u * m.uhh
    drop = np.maximum(m.u * m.uyh - m.uh * m.uy, 0) / np.where(curved, determinant, np.inf)
    floor = np.maximum(m.uy - drop * m.uh, 0) / m.u
    drop = np.where(floor > 0, drop, m.uyh / m.uhh)
    return _Linear(floor, drop, np.maximum(m.uyy - floor * m.uy - drop * m.uyh, 0))


def _grid_errors(model: _Model, x_K: Array, loss_RGK: Array) -> Array:
    """(R, G, P, Q) sums of squared relative residuals on the model's grids, by matrix products."""
    h_PQK = model.curve(x_K, model.own_P[:, None, None], model.common_Q[:, None])
    h_KJ = h_PQK.reshape(-1, len(x_K)).T
    y_RGK = 1 / loss_RGK
    u_RGK = y_RGK**2
    moments = _Moments(
        u_RGK.sum(axis=-1, keepdims=True),
        u_RGK @ h_KJ,
        u_RGK @ h_KJ**2,
        y_RGK.sum(axis=-1, keepdims=True),
        y_RGK @ h_KJ,
        len(x_K),
    )
    return _solve(moments).error.reshape(*loss_RGK.shape[:2], *h_PQK.shape[:2])


def _noise(residual_GK: Array, n_parameters: float) -> GroupNoise:
    """Correlations of residuals; AR(1) over probes, one correlation between any two groups."""
    n_groups, n_probes = residual_GK.shape
    scaled_GK = residual_GK - residual_GK.mean(axis=1, keepdims=True)
    scaled_GK /= np.maximum(scaled_GK.std(axis=1, keepdims=True), np.sqrt(_NO_ERROR))
    rho = float(serial_correlation(scaled_GK, n_parameters).mean())
    alike = (scaled_GK.sum(axis=0).var() / n_groups - 1) / (n_groups - 1)
    alike = float(np.clip(alike, 0, 1))
    groups = n_groups / (1 + (n_groups - 1) * alike)
    return GroupNoise(rho, alike, groups * float(effective_points(n_probes, rho)))


def _score(
    losses: _Losses, model: _Model, fit: _Fit, n_effective: float, n_blocks: int
) -> ModelScore:
    held_out_B = losses.held_out_errors(model, n_blocks)[0]
    error = losses.error(fit)
    n_parameters = model.n_parameters(len(losses.weight_G))
    return ModelScore(
        n_parameters=n_parameters,
        error=error,
        held_out_error=float(held_out_B.mean()),
        held_out_error_B=held_out_B,
        bic=n_effective * float(np.log(max(error, _NO_ERROR)))
        + n_parameters * float(np.log(n_effective)),
    )


def _block_interval(difference_B: Array) -> Interval:
    n = len(difference_B)
    mean = float(difference_B.mean())
    reach = float(difference_B.std(ddof=1) / np.sqrt(n) * student_t.ppf(0.975, n - 1))
    return mean - reach, mean + reach


def _resample_interval(
    resampled: _Losses, models: dict[str, _Model], n_blocks: int
) -> Interval | None:
    if not len(resampled.loss_RGK):
        return None
    slope_RB, times_RB = (
        resampled.held_out_errors(models[name], n_blocks) for name in ("one slope", "own times")
    )
    low, high = np.quantile((slope_RB - times_RB).mean(axis=1), [0.025, 0.975]).tolist()
    return low, high


def _exponents(given: _Losses, models: dict[str, _Model], fits: dict[str, _Fit]) -> GroupExponents:
    """Profiles of the squared error over the exponent, of each group and of all together."""
    own, common = fits["own slopes"], fits["one slope"]
    n_groups, n_probes = own.residual_RGK.shape[1:]
    log_exponent_Q = models["own slopes"].common_Q
    error_GQ = _grid_errors(models["own slopes"], given.x_K, given.loss_RGK)[0, :, 0]
    best_G = (own.residual_RGK[0] ** 2).sum(axis=1)
    effective_G = effective_points(n_probes, serial_correlation(own.residual_RGK[0], 3))
    profiles = [
        _Profile.of(log_exponent_Q, error_Q, log_best, best, effective - 3)
        for error_Q, log_best, best, effective in zip(
            error_GQ, own.common_RG[0], best_G, effective_G, strict=True
        )
    ]
    noise = _noise(common.residual_RGK[0], 2 + 1 / n_groups)
    together = _Profile.of(
        log_exponent_Q,
        given.weight_G @ error_GQ,
        float(common.common_RG[0, 0]),
        given.error(common) * n_probes,
        noise.n_effective * (1 - (2 * n_groups + 1) / (n_groups * n_probes)),
    )
    heterogeneity = _heterogeneity(profiles, log_exponent_Q)
    return GroupExponents(
        common=float(np.exp(together.log_best)),
        common_interval=together.interval(),
        exponent_G=np.exp(own.common_RG[0]),
        se_G=np.array([profile.se() for profile in profiles]),
        interval_G2=np.array([profile.interval() for profile in profiles]),
        heterogeneity=heterogeneity,
        heterogeneity_p=float(chi2.sf(heterogeneity, n_groups - 1)),
    )


@dataclass(frozen=True)
class _Profile:
    """How many standard errors, with a sign, each exponent lies from the best: z(ln alpha)."""

    log_best: float
    freedom: float
    log_exponent_Q: Array
    z_Q: Array

    @staticmethod
    def of(
        log_exponent_Q: Array, error_Q: Array, log_best: float, best: float, freedom: float
    ) -> "_Profile":
        """Root of freedom (error / best - 1), made monotone; the best itself joins the grid."""
        freedom = max(freedom, _LEAST_FREEDOM)
        excess_Q = np.maximum(error_Q / max(best, _NO_ERROR) - 1, 0)
        z_Q = np.sign(log_exponent_Q - log_best) * np.sqrt(freedom * excess_Q)
        above_Q = np.maximum.accumulate(np.maximum(z_Q, 0))
        below_Q = np.minimum.accumulate(np.minimum(z_Q, 0)[::-1])[::-1]
        place = np.searchsorted(log_exponent_Q, log_best)
        return _Profile(
            log_best,
            freedom,
            np.insert(log_exponent_Q, place, log_best),
            np.insert(above_Q + below_Q, place, 0),
        )

    def at(self, log_exponent: Array) -> Array:
        return np.interp(log_exponent, self.log_exponent_Q, self.z_Q)

    def between(self, reach: float) -> Interval:
        """Exponents within so many standard errors; from 0 or to inf if the grid does not tell."""
        low, high = np.exp(
            np.interp([-reach, reach], self.z_Q, self.log_exponent_Q, left=-np.inf, right=np.inf)
        ).tolist()
        return low, high

    def interval(self) -> Interval:
        """95% interval, Student's t."""
        return self.between(float(student_t.ppf(0.975, self.freedom)))

    def se(self) -> float:
        """Half the width of the interval of one standard error."""
        low, high = self.between(1.0)
        return (high - low) / 2


def _heterogeneity(profiles: list[_Profile], log_exponent_Q: Array) -> float:
    """The least sum of the groups' z^2 over one exponent.

    An estimated error inflates z^2 by freedom / (freedom - 2), as it does Student's t squared.
    """
    fine = np.linspace(log_exponent_Q[0], log_exponent_Q[-1], 50 * len(log_exponent_Q))
    deflation = [1 - 2 / max(profile.freedom, 2 * _LEAST_FREEDOM) for profile in profiles]
    squares = [
        share * profile.at(fine) ** 2 for share, profile in zip(deflation, profiles, strict=True)
    ]
    return float(np.sum(squares, axis=0).min())


def _drops(fit: _Fit, first_lr_sum: float) -> GroupDrops:
    return GroupDrops(
        midpoint_G=first_lr_sum * np.exp(fit.own_RG[0]),
        width=float(np.exp(fit.common_RG[0, 0])),
        floor_G=fit.floor_RG[0],
        drop_G=fit.drop_RG[0],
    )


# Input, checked once.


def _checked(lr_sum_K: ArrayLike, loss_K: ArrayLike) -> tuple[Array, Array]:
    """tau and losses whose last axis is that of tau."""
    tau_K, loss = np.asarray(lr_sum_K, dtype=np.float64), np.asarray(loss_K, dtype=np.float64)
    if tau_K.ndim != 1 or not len(tau_K) or loss.shape[-1:] != tau_K.shape:
        raise TokscaleError(
            f"sums of learning rates of shape {tau_K.shape} do not go with losses of shape "
            f"{loss.shape}; give one sum per probe"
        )
    if not np.isfinite(tau_K).all() or tau_K[0] < 0 or (np.diff(tau_K) <= 0).any():
        raise TokscaleError(
            "sums of learning rates must be finite and ascend from 0 or later; sort the probes and "
            "leave out those at a learning rate of 0"
        )
    if not (np.isfinite(loss) & (loss > 0)).all():
        raise TokscaleError(
            "a power law needs finite, positive losses; leave out the probes that have none"
        )
    return tau_K, loss


def _checked_groups(
    lr_sum_K: ArrayLike,
    loss_GK: ArrayLike,
    weight_G: ArrayLike | None,
    loss_RGK: ArrayLike | None,
) -> tuple[Array, Array, Array]:
    """tau, the losses with their resamples behind them, and weights that sum to one."""
    tau_K, loss = _checked(lr_sum_K, loss_GK)
    if loss.ndim != 2 or len(loss) < 2:
        raise TokscaleError(
            f"losses of shape {loss.shape} are none of groups; give two groups or more, a row each"
        )
    weights_G = np.ones(len(loss)) if weight_G is None else np.asarray(weight_G, dtype=np.float64)
    if weights_G.shape != loss.shape[:1] or not (np.isfinite(weights_G) & (weights_G > 0)).all():
        raise TokscaleError(
            f"weights of shape {weights_G.shape} do not go with {len(loss)} groups; give one "
            "finite, positive weight per group"
        )
    _, resampled = _checked(tau_K, loss[None, :][:0] if loss_RGK is None else loss_RGK)
    if resampled.shape[1:] != loss.shape:
        raise TokscaleError(
            f"resamples of shape {resampled.shape} do not go with losses of shape {loss.shape}; "
            "give all groups and probes of each resample"
        )
    return tau_K, np.concatenate([loss[None], resampled]), weights_G / weights_G.sum()


def _start(tau_K: Array) -> float:
    """A tenth of the last tau, or the third above 0 if that is later."""
    positive_K = tau_K[tau_K > 0]
    third = positive_K[min(DISCARDED_POINTS, len(positive_K) - 1)] if len(positive_K) else 0.0
    return float(max(DISCARDED * tau_K[-1], third))


def _from(tau_K: Array, start: float, least: int) -> NDArray[np.bool_]:
    fitted_K = (tau_K > 0) & (tau_K >= start * (1 - _ROUNDING))
    if fitted_K.sum() < least:
        raise TokscaleError(
            f"{fitted_K.sum()} probes from tau {start:g} on are too few, {least} are needed; fit "
            "from an earlier tau, take fewer blocks or probe more often"
        )
    return np.asarray(fitted_K)
