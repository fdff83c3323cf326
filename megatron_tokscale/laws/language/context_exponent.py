"""Exponent gamma of the losses by length of context, L_n - H_inf ~ n^-gamma.

The theory is Cagnetta et al.'s (docs/references.md 2). Shapes: S lengths of context, R bootstrap
resamples, G grid of floors.
"""

import math
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import ArrayLike

from megatron_tokscale.core.arrays import Floats
from megatron_tokscale.core.errors import TokscaleError, UndefinedError
from megatron_tokscale.core.seed import DEFAULT_SEED
from megatron_tokscale.laws.estimates import percentile_estimate
from megatron_tokscale.results.laws import ContextExponent

MIN_POINTS = 5  # least lengths of context; our choice: more than the three parameters
FLOOR_STEP = 0.005  # nats, between floors; this and the next four: docs/references.md 2.5
MIN_GAMMA = 0.05  # least gamma that counts as a power law
MIN_R2 = 0.9  # least R^2 that counts as a power law
MAX_WIDTH = 0.15  # greatest range of gamma over floors that fit as well as the best
_WIDTH_R2 = 0.001  # largest R^2 below the best at which a floor fits as well
_PARAMETERS = 3  # floor, scale, exponent


def fit_context_exponent(
    context_S: ArrayLike,
    loss_S: ArrayLike,
    *,
    loss_RS: ArrayLike | None = None,
    floor: float | None = None,
    to_context: float = math.inf,
    n_resamples: int = 200,
    seed: int = DEFAULT_SEED,
) -> ContextExponent:
    """Fit L_n = H_inf + A n^-gamma: lines of ln(L_n - H) on ln n, for the floor H of highest R^2.

    Choose a window of short contexts whose losses have converged. Losses of longer contexts show
    how far the run has learned, and not the statistics of the language. While the floor is unknown,
    even an exact law leaves a range of gamma undetermined (`width`): 0.16 over the authors' n = 1
    to 16, 0.11 over 1 to 64, and 0.08 over 1 to 512.

    Measured coverage of the 95% interval of gamma, on 200 planted runs for each setting over n = 1
    to 64: 92-97% if the means have errors up to 0.02 nats (some 15,000 tokens each). At errors of
    0.05 nats it is 86-93%, and gamma is 6% too low.

    Args:
        context_S: lengths of context, ascending: numbers of tokens that a token is predicted from.
        loss_S: mean losses at the last probe, in nats.
        loss_RS: mean losses of bootstrap resamples, as from `ContextBins.resample`. Without them,
            the residuals of the fit are resampled, which show only the scatter about the law.
        floor: H_inf in nats, taken as exact, if it is known; by default the best of a grid in steps
            of 0.005 nats.
        to_context: longest context to fit; by default all are fitted.
        n_resamples: number of resamples of the residuals.
        seed: seed of these resamples.

    Raises:
        TokscaleError: the arguments do not fit together.
        UndefinedError: there are fewer than five points, losses are not finite or not above the
            floor, or a criterion of docs/references.md 2.5 is not met: gamma over 0.05, R^2 of 0.9
            or more, the floor inside its grid, and `width` up to 0.15.
    """
    context, loss = _checked_contexts(context_S, loss_S)
    window_S = context <= to_context
    x_S, loss = np.log(context[window_S]), loss[window_S]
    if len(x_S) < MIN_POINTS:
        raise UndefinedError(
            f"{len(x_S)} context lengths up to {to_context:g} are too few for gamma; expected "
            f"{MIN_POINTS} or more; take a longer window or more bins"
        )
    floor_G = _floors(loss, floor)
    lines = _Lines.through(x_S, loss, floor_G)
    best = int(lines.r2_G.argmax())
    width = lines.width()
    _check_is_law(lines, best, width, floor)
    if loss_RS is None:
        drawn_RS = _resample_residuals(
            x_S, loss, lines, best, float(floor_G[best]), n_resamples, seed
        )
    else:
        drawn_RS = np.asarray(loss_RS, dtype=np.float64)[:, window_S]
    gamma_R, floor_R = _refit(x_S, drawn_RS, floor)
    return ContextExponent(
        gamma=percentile_estimate(float(lines.gamma_G[best]), gamma_R),
        se=float(gamma_R.std(ddof=1)),
        floor=percentile_estimate(float(floor_G[best]), floor_R),
        scale=float(np.exp(lines.level_G[best])),
        r2=float(lines.r2_G[best]),
        width=width,
        n_points=len(x_S),
        from_context=float(np.exp(x_S[0])),
        to_context=float(np.exp(x_S[-1])),
    )


def _checked_contexts(context_S: ArrayLike, loss_S: ArrayLike) -> tuple[Floats, Floats]:
    context, loss = np.asarray(context_S, np.float64), np.asarray(loss_S, np.float64)
    if context.ndim != 1 or context.shape != loss.shape:
        raise TokscaleError(
            f"contexts are of shape {context.shape} and losses of shape {loss.shape}; expected one "
            "loss per length of context"
        )
    if not (np.isfinite(loss) & (loss > 0)).all():
        raise UndefinedError(
            "losses by context are not finite and positive; leave out the tokens that miss losses"
        )
    if not len(context) or context[0] < 1 or (np.diff(context) <= 0).any():
        raise TokscaleError("lengths of context do not ascend from 1 or more; sort them")
    return context, loss


def _floors(loss_S: Floats, floor: float | None) -> Floats:
    lowest = float(loss_S.min())
    if floor is None:
        return np.arange(0, lowest, FLOOR_STEP)
    if not 0 <= floor < lowest:
        raise UndefinedError(
            f"the floor of {floor:g} nats is not from 0 to below all losses (lowest {lowest:.4g}); "
            "give a lower one"
        )
    return np.array([floor])


@dataclass(frozen=True)
class _Lines:
    """Lines ln(L - H) = level - gamma x, one per floor H, by least squares."""

    gamma_G: Floats
    level_G: Floats
    r2_G: Floats

    @classmethod
    def through(cls, x_S: Floats, loss_S: Floats, floor_G: Floats) -> Self:
        """Fit the lines to losses at x = ln n, for each floor."""
        y_GS = np.log(loss_S - floor_G[:, None])
        centred_S = x_S - x_S.mean()
        y_G = y_GS.mean(axis=1)
        gamma_G = -(y_GS @ centred_S) / (centred_S @ centred_S)
        spread_G = ((y_GS - y_G[:, None]) ** 2).sum(axis=1)
        r2_G = gamma_G**2 * (centred_S @ centred_S) / np.maximum(spread_G, np.finfo(float).tiny)
        return cls(gamma_G, y_G + gamma_G * x_S.mean(), r2_G)

    def width(self) -> float:
        """Return the range of gamma over the floors that fit as well as the best."""
        return float(np.ptp(self.gamma_G[self.r2_G >= self.r2_G.max() - _WIDTH_R2]))


def _check_is_law(lines: _Lines, best: int, width: float, floor: float | None) -> None:
    gamma, r2 = lines.gamma_G[best], lines.r2_G[best]
    at_end = floor is None and best in (0, len(lines.r2_G) - 1)
    doubts = {
        f"gamma is {gamma:.3f}, expected above {MIN_GAMMA:g}": gamma <= MIN_GAMMA,
        f"R^2 is {r2:.3f}, expected {MIN_R2:g} or more": r2 < MIN_R2,
        "the best floor is at the end of its grid": at_end,
        f"floors that fit as well give gammas {width:.2f} apart, "
        f"expected {MAX_WIDTH:g} or less": width > MAX_WIDTH,
    }
    reasons = [reason for reason, applies in doubts.items() if applies]
    if reasons:
        raise UndefinedError(
            f"the losses by context follow no power law: {'; '.join(reasons)}; "
            "take another window, more tokens or a known floor"
        )


def _resample_residuals(
    x_S: Floats, loss_S: Floats, lines: _Lines, best: int, floor: float, n_resamples: int, seed: int
) -> Floats:
    """Return the law plus log residuals drawn with replacement, scaled for three parameters."""
    fitted_S = lines.level_G[best] - lines.gamma_G[best] * x_S
    n = len(x_S)
    residual_S = (np.log(loss_S - floor) - fitted_S) * math.sqrt(n / (n - _PARAMETERS))
    drawn_RS = np.random.default_rng(seed).choice(residual_S, (n_resamples, n))
    return np.asarray(floor + np.exp(fitted_S + drawn_RS))


def _refit(x_S: Floats, loss_RS: Floats, floor: float | None) -> tuple[Floats, Floats]:
    """Return gamma and floor of each resample, without the checks of the fit."""
    if not np.isfinite(loss_RS).all():
        raise UndefinedError(
            "some resamples have no tokens at some context; merge bins or watch more tokens"
        )
    pairs = []
    for loss_S in loss_RS:
        floor_G = _floors(loss_S, floor)
        lines = _Lines.through(x_S, loss_S, floor_G)
        best = int(lines.r2_G.argmax())
        pairs.append((lines.gamma_G[best], floor_G[best]))
    gamma_R, floor_R = np.array(pairs).T
    return gamma_R, floor_R
