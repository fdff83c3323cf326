"""Test of the one-third law by groups of tokens: one shared slope, or drops at own times.

`group_test` compares a slope in x = ln tau that all groups share (docs/references.md 3) with drops
at the groups' own times (docs/references.md 4), by the errors at probes that the fits did not see.

Shapes: K probe steps, G groups, R data sets (the data as they are, then resamples), B blocks of
probes.
"""

from collections.abc import Mapping

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import t as student_t

from megatron_tokscale.core.arrays import Floats, Interval
from megatron_tokscale.core.errors import TokscaleError, UndefinedError
from megatron_tokscale.core.serial_correlation import NO_ERROR, GroupNoise
from megatron_tokscale.laws.estimates import symmetric_estimate
from megatron_tokscale.laws.one_third.group_exponents import group_exponents
from megatron_tokscale.laws.one_third.group_fit import (
    GroupFit,
    GroupLosses,
    GroupModel,
    group_models,
)
from megatron_tokscale.laws.one_third.lr_sum import checked_losses, probes_from
from megatron_tokscale.results.estimate import Estimate
from megatron_tokscale.results.laws import GroupDrops, GroupTest, ModelScore

FIRST_GROUP_TAU_SHARE = 0.01  # of the last tau; our choice: later starts cut off drops
MIN_BLOCKS = 4  # two of the blocks are held out, the least that has a variance
_POINTS_PER_BLOCK = 2  # least number of probes of a block


def group_test(
    lr_sum_K: ArrayLike,
    loss_GK: ArrayLike,
    *,
    weight_G: ArrayLike | None = None,
    loss_RGK: ArrayLike | None = None,
    from_: float | None = None,
    n_blocks: int = 10,
) -> GroupTest:
    """Compare one slope in ln tau for all groups with drops at the groups' own times.

    The softmax mechanism (docs/references.md 3) gives every group the slope -1/3 and its own scale
    and floor; the quanta mechanism (docs/references.md 4) lets each group drop at its own time. All
    models are fitted by least squares on relative residuals, to first order the residuals of log
    losses, with floors and drops not negative. They are scored at probes that the fit did not see.
    Errors of neighbouring probes and of groups are correlated, so contiguous blocks of probes are
    held out one at a time, for all groups at once. The first and the last block are always fitted:
    a drop outside of the fitted probes would be arbitrary, and its error would count against drops.

    A sigmoid far before the first probe with a width of 3 in ln tau is the one-third law. Therefore
    (our choice) the midpoint of a drop lies in the fitted range, and the 10-90% of a drop, 2 ln 9 w
    (docs/references.md 1.4), is not longer than that range.

    Groups must not be chosen by the noise of the tested losses: take token frequency, or learning
    times of another run or of other tokens. Resamples of tokens do not contain the noise that all
    tokens share; blocks of probes do.

    Measured on 50 planted data sets each, 10 or 4 groups, 24 or 45 probes over two decades, AR(1)
    noise of 0.5% (rho 0.5 within each group, or rho 0.7 and nearly the same noise in all groups):
    all 200 sets with one slope and all 250 with own times, w 0.2 to 0.8, had the right verdict. At
    noise of 2% no verdict was wrong, and 2 of 100 were missing. Q's p-value is below 5% for 0 to
    12% of data sets with one exponent; each group's interval covers in 92 to 94%, the common one in
    90 to 96%.

    The verdict compares two models only: check whether a third has the least held-out error. Of 15
    planted sets of groups with exponents of their own, 14 were undecided and one was called drops.

    Args:
        lr_sum_K: tau, the sum of the learning rates up to each probe, ascending; a tau of 0 is
            always left out.
        loss_GK: mean loss of each group, in nats.
        weight_G: share of each group in errors and common parameters; equal by default.
        loss_RGK: resamples of `loss_GK`, for example over documents.
        from_: first tau to fit; by default a hundredth of the last. From a tenth on, the default
            for one curve, few probes are left and hardly a drop is seen whole. Report other starts
            too.
        n_blocks: number of blocks of probes, at least four.

    Raises:
        TokscaleError: the arguments do not fit together.
        UndefinedError: there are fewer than two groups or than two probes per block, losses are not
            finite and positive, or weights are not positive.
    """
    tau_K, loss_SGK, weights_G = _checked_groups(lr_sum_K, loss_GK, weight_G, loss_RGK)
    if n_blocks < MIN_BLOCKS:
        raise TokscaleError(f"{n_blocks} blocks are too few to compare; take at least four blocks")
    start = FIRST_GROUP_TAU_SHARE * tau_K[-1] if from_ is None else from_
    fitted_K = probes_from(tau_K, start, _POINTS_PER_BLOCK * n_blocks)
    tau_K, loss_SGK = tau_K[fitted_K], loss_SGK[:, :, fitted_K]
    x_K = np.log(tau_K / tau_K[0])
    # Fit every model to the data as they are.
    models = group_models(float(x_K[-1]))
    losses = GroupLosses(x_K, loss_SGK[:1], weights_G)
    fits = {name: losses.fit(model) for name, model in models.items()}
    # Estimate the noise from the residuals of the closest fit.
    closest = min(fits, key=lambda name: losses.error(fits[name]))
    per_group = models[closest].n_parameters(len(weights_G)) / len(weights_G)
    noise = GroupNoise.from_residuals(fits[closest].residual_RGK[0], per_group)
    # Score every model at held-out blocks, and the two of the verdict on every resample.
    scores = {
        name: _score(losses, model, fits[name], noise.n_effective, n_blocks)
        for name, model in models.items()
    }
    resampled = GroupLosses(x_K, loss_SGK[1:], weights_G)
    slope_B, times_B = (scores[name].held_out_error_B for name in ("one slope", "own times"))
    return GroupTest(
        models=scores,
        difference=_mean_over_blocks(np.subtract(slope_B, times_B)),
        resample_interval=_resample_interval(resampled, models, n_blocks),
        exponents=group_exponents(losses, models, fits),
        drops=_drops(fits["own times"], float(tau_K[0])),
        noise=noise,
        n_points=len(tau_K),
        from_lr_sum=float(tau_K[0]),
        to_lr_sum=float(tau_K[-1]),
    )


def _score(
    losses: GroupLosses, model: GroupModel, fit: GroupFit, n_effective: float, n_blocks: int
) -> ModelScore:
    held_out_B = losses.held_out_errors(model, n_blocks)[0]
    error = losses.error(fit)
    n_parameters = model.n_parameters(len(losses.weight_G))
    return ModelScore(
        n_parameters=n_parameters,
        error=error,
        held_out_error=float(held_out_B.mean()),
        held_out_error_B=tuple(held_out_B.tolist()),
        bic=n_effective * float(np.log(max(error, NO_ERROR)))
        + n_parameters * float(np.log(n_effective)),
    )


def _mean_over_blocks(difference_B: Floats) -> Estimate:
    n = len(difference_B)
    reach = float(difference_B.std(ddof=1) / np.sqrt(n) * student_t.ppf(0.975, n - 1))
    return symmetric_estimate(float(difference_B.mean()), reach)


def _resample_interval(
    resampled: GroupLosses, models: Mapping[str, GroupModel], n_blocks: int
) -> Interval | None:
    if not len(resampled.loss_RGK):
        return None
    slope_RB, times_RB = (
        resampled.held_out_errors(models[name], n_blocks) for name in ("one slope", "own times")
    )
    low, high = np.quantile((slope_RB - times_RB).mean(axis=1), [0.025, 0.975]).tolist()
    return low, high


def _drops(fit: GroupFit, first_lr_sum: float) -> GroupDrops:
    return GroupDrops(
        midpoint_G=tuple((first_lr_sum * np.exp(fit.own_RG[0])).tolist()),
        width=float(np.exp(fit.common_RG[0, 0])),
        floor_G=tuple(fit.floor_RG[0].tolist()),
        drop_G=tuple(fit.drop_RG[0].tolist()),
    )


def _checked_groups(
    lr_sum_K: ArrayLike,
    loss_GK: ArrayLike,
    weight_G: ArrayLike | None,
    loss_RGK: ArrayLike | None,
) -> tuple[Floats, Floats, Floats]:
    """Return tau, the losses followed by their resamples, and weights that sum to one."""
    tau_K, loss = checked_losses(lr_sum_K, loss_GK)
    if loss.ndim != 2 or len(loss) < 2:
        raise UndefinedError(
            f"losses are of shape {loss.shape}; expected a row for each of two groups or more"
        )
    weights_G = np.ones(len(loss)) if weight_G is None else np.asarray(weight_G, dtype=np.float64)
    if weights_G.shape != loss.shape[:1] or not (np.isfinite(weights_G) & (weights_G > 0)).all():
        raise UndefinedError(
            f"weights of shape {weights_G.shape} do not match {len(loss)} groups; expected one "
            "finite, positive weight per group"
        )
    _, resampled = checked_losses(tau_K, loss[None, :][:0] if loss_RGK is None else loss_RGK)
    if resampled.shape[1:] != loss.shape:
        raise TokscaleError(
            f"resamples of shape {resampled.shape} do not match losses of shape {loss.shape}; "
            "expected all groups and probes in each resample"
        )
    return tau_K, np.concatenate([loss[None], resampled]), weights_G / weights_G.sum()
