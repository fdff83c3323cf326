"""Do groups of tokens share the one-third law's slope, or does each drop at its own time?

`group_test` sets a slope in x = ln tau that all groups share (papers.md 3) against drops at the
groups' own times (papers.md 4), by the errors at probes that the fits did not see.

Shapes: K probe steps, G groups, R data sets (the first as given, then resamples), B blocks of
probes.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import t as student_t

from megatron_tokscale.core.arrays import Floats, Interval
from megatron_tokscale.core.errors import TokscaleError, UndefinedError
from megatron_tokscale.core.serial_correlation import NO_ERROR, GroupNoise
from megatron_tokscale.laws.one_third.group_exponents import GroupExponents, group_exponents
from megatron_tokscale.laws.one_third.group_fit import Fit, Losses, Model, models_over
from megatron_tokscale.laws.one_third.lr_sum import checked, from_tau

FIRST_GROUP_TAU_SHARE = 0.01  # of the last tau
MIN_BLOCKS = 4
_POINTS_PER_BLOCK = 2


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
    held_out_error_B: Floats
    bic: float


@dataclass(frozen=True)
class GroupDrops:
    """The sigmoids of "own times".

    Attributes:
        midpoint_G: e^c_g, in the unit of tau.
        width: w, in units of ln tau; 10-90% of a drop takes 4.394 w.
        floor_G: f_g, nats.
        drop_G: A_g, nats.
    """

    midpoint_G: Floats
    width: float
    floor_G: Floats
    drop_G: Floats


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
        TokscaleError: the arguments do not fit together.
        UndefinedError: fewer than two groups or than two probes per block, losses that are not
            finite and positive, weights that are not positive.
    """
    tau_K, loss_SGK, weights_G = _checked_groups(lr_sum_K, loss_GK, weight_G, loss_RGK)
    if n_blocks < MIN_BLOCKS:
        raise TokscaleError(f"{n_blocks} blocks are too few to compare; take at least four blocks")
    start = FIRST_GROUP_TAU_SHARE * tau_K[-1] if from_ is None else from_
    fitted_K = from_tau(tau_K, start, _POINTS_PER_BLOCK * n_blocks)
    tau_K, loss_SGK = tau_K[fitted_K], loss_SGK[:, :, fitted_K]
    x_K = np.log(tau_K / tau_K[0])
    models = models_over(float(x_K[-1]))
    given = Losses(x_K, loss_SGK[:1], weights_G)
    fits = {name: given.fit(model) for name, model in models.items()}
    closest = min(fits, key=lambda name: given.error(fits[name]))
    per_group = models[closest].n_parameters(len(weights_G)) / len(weights_G)
    noise = GroupNoise.from_residuals(fits[closest].residual_RGK[0], per_group)
    scores = {
        name: _score(given, model, fits[name], noise.n_effective, n_blocks)
        for name, model in models.items()
    }
    resampled = Losses(x_K, loss_SGK[1:], weights_G)
    slope, times = (scores[name].held_out_error_B for name in ("one slope", "own times"))
    return GroupTest(
        models=scores,
        difference=float((slope - times).mean()),
        block_interval=_block_interval(slope - times),
        resample_interval=_resample_interval(resampled, models, n_blocks),
        exponents=group_exponents(given, models, fits),
        drops=_drops(fits["own times"], float(tau_K[0])),
        noise=noise,
        n_points=len(tau_K),
        from_lr_sum=float(tau_K[0]),
        to_lr_sum=float(tau_K[-1]),
    )


def _score(losses: Losses, model: Model, fit: Fit, n_effective: float, n_blocks: int) -> ModelScore:
    held_out_B = losses.held_out_errors(model, n_blocks)[0]
    error = losses.error(fit)
    n_parameters = model.n_parameters(len(losses.weight_G))
    return ModelScore(
        n_parameters=n_parameters,
        error=error,
        held_out_error=float(held_out_B.mean()),
        held_out_error_B=held_out_B,
        bic=n_effective * float(np.log(max(error, NO_ERROR)))
        + n_parameters * float(np.log(n_effective)),
    )


def _block_interval(difference_B: Floats) -> Interval:
    n = len(difference_B)
    mean = float(difference_B.mean())
    reach = float(difference_B.std(ddof=1) / np.sqrt(n) * student_t.ppf(0.975, n - 1))
    return mean - reach, mean + reach


def _resample_interval(
    resampled: Losses, models: Mapping[str, Model], n_blocks: int
) -> Interval | None:
    if not len(resampled.loss_RGK):
        return None
    slope_RB, times_RB = (
        resampled.held_out_errors(models[name], n_blocks) for name in ("one slope", "own times")
    )
    low, high = np.quantile((slope_RB - times_RB).mean(axis=1), [0.025, 0.975]).tolist()
    return low, high


def _drops(fit: Fit, first_lr_sum: float) -> GroupDrops:
    return GroupDrops(
        midpoint_G=first_lr_sum * np.exp(fit.own_RG[0]),
        width=float(np.exp(fit.common_RG[0, 0])),
        floor_G=fit.floor_RG[0],
        drop_G=fit.drop_RG[0],
    )


def _checked_groups(
    lr_sum_K: ArrayLike,
    loss_GK: ArrayLike,
    weight_G: ArrayLike | None,
    loss_RGK: ArrayLike | None,
) -> tuple[Floats, Floats, Floats]:
    """tau, the losses with their resamples behind them, and weights that sum to one."""
    tau_K, loss = checked(lr_sum_K, loss_GK)
    if loss.ndim != 2 or len(loss) < 2:
        raise UndefinedError(
            f"losses of shape {loss.shape} are none of groups; give two groups or more, a row each"
        )
    weights_G = np.ones(len(loss)) if weight_G is None else np.asarray(weight_G, dtype=np.float64)
    if weights_G.shape != loss.shape[:1] or not (np.isfinite(weights_G) & (weights_G > 0)).all():
        raise UndefinedError(
            f"weights of shape {weights_G.shape} do not go with {len(loss)} groups; give one "
            "finite, positive weight per group"
        )
    _, resampled = checked(tau_K, loss[None, :][:0] if loss_RGK is None else loss_RGK)
    if resampled.shape[1:] != loss.shape:
        raise TokscaleError(
            f"resamples of shape {resampled.shape} do not go with losses of shape {loss.shape}; "
            "give all groups and probes of each resample"
        )
    return tau_K, np.concatenate([loss[None], resampled]), weights_G / weights_G.sum()
