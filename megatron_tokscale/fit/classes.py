"""The choice of the model that describes a trajectory: flat, one sigmoid, two sigmoids, or a ramp.

A ramp is constant until its onset, and straight in x from there to the last probe: the form of a
loss that falls as a power law, as long as the fall is small against the loss. Step 0 counts as the
first finite probe.

The criterion of a model is the Bayesian information criterion (BIC) plus a margin:

    K' ln(SSE / K) + p ln K + MARGIN * changes

- K: the number of losses of the token. SSE: the sum of squared residuals of the model.
- K': how many independent losses they are worth (`noise.effective_count`).
- p: the number of parameters: flat 1, ramp 3 (level, onset, slope), sigmoid 4, two sigmoids 7.
- changes: flat 0, ramp and sigmoid 1, two sigmoids 2.

The model with the lowest criterion gives the class. Midpoints and onsets are searched over the
whole axis, which BIC does not allow for: the margin per change makes up for it. The models, the
margin and the level that separates flat tokens are our choice. benchmarks/results/fit_accuracy.md
has the classes of planted trajectories and of noise.

A token whose sigmoid explains 99% of its variance is not flat, whatever the criterion says. The
residuals of so good a fit are misfit rather than noise. They change slowly, so their phi is large,
K' small, and the criterion would call the smoothest falls flat.

Shapes: N tokens, M models.
"""

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from megatron_tokscale.fit.noise import effective_count
from megatron_tokscale.fit.table import TokenClass

MARGIN = 6.0
"""Decrease of BIC that each further change of a model must bring. Kass and Raftery (1995) call a
decrease of 6 "strong evidence". At 60 probes it leaves 0.2% of the tokens of white noise in another
class than flat, and 2% if the noise has an autocorrelation of 0.6."""

PARAMETERS = {"flat": 1, "sigmoid": 4, "ramp": 3, "two": 7}
"""Number of parameters of each model."""
_CHANGES = {"flat": 0, "sigmoid": 1, "ramp": 1, "two": 2}
"""Number of changes of each model; each change adds `MARGIN` to the criterion."""
_SURE = 0.01
"""Largest share of its variance that a sigmoid leaves of a token that is not flat. Our choice: it
leaves so little of 0.2% of random walks at 12 probes, and of 0.03% at 34 (of 4,000)."""
_SURE_PROBES = 12
"""Least number of losses for the same: of 8 losses, a sigmoid explains as much by chance."""
_RESOLUTION = 1e-12
"""Least mean squared residual of losses of unit variance. Smaller ones are rounding errors of
float32, and zero has no logarithm."""
_REACH = 10.0
"""Two sigmoids are fitted if their estimated criterion is at most this much above that of the best
other model. Our choice: the estimate comes from the best second cell, and the search may still
lower the SSE."""
_QUANTILES = 200
"""Degrees of freedom in the table of Student's t: with more of them, the quantile is within 1% of
the last entry."""


def criterion(model: str, sse_N: Tensor, count_N: Tensor, phi_N: Tensor) -> Tensor:
    """Return the criterion of a model, for losses of unit variance.

    It is infinite for a token that has no more losses than the model has parameters.
    """
    parameters = PARAMETERS[model]
    misfit_N = (sse_N / count_N).clamp_min(_RESOLUTION).log() * effective_count(count_N, phi_N)
    bic_N = misfit_N + parameters * count_N.log() + MARGIN * _CHANGES[model]
    return torch.where(count_N > parameters, bic_N, torch.inf)


def in_reach(model: str, sse_N: Tensor, rivals: dict[str, Tensor], count_N: Tensor) -> Tensor:
    """Return a mask of the tokens for which `model` may still have the lowest criterion.

    Its estimated criterion is at most `_REACH` above the best criterion of `rivals`.

    The noise counts as white here: its autocorrelation is known only when all models are fitted.

    Args:
        model: a model that is still to be fitted.
        sse_N: its estimated SSE.
        rivals: SSE of each fitted model.
        count_N: number of losses of each token.
    """
    white_N = torch.zeros_like(count_N)
    best_N = torch.stack(
        [criterion(name, sse, count_N, white_N) for name, sse in rivals.items()]
    ).amin(dim=0)
    return criterion(model, sse_N, count_N, white_N) < best_N + _REACH


def student(free_N: Tensor) -> Tensor:
    """Return the 97.5% quantile of Student's t, to 1%, for 1 or more degrees of freedom."""
    table = stats.t.ppf(0.975, np.arange(1, _QUANTILES + 1))
    return free_N.new_tensor(table)[(free_N.long() - 1).clamp(0, _QUANTILES - 1)]


def choose(
    sse_N: dict[str, Tensor],
    drop_N: Tensor,
    level_N: Tensor,
    count_N: Tensor,
    phi_N: Tensor,
    known_below: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the class of every token, the next best class, and the difference of their criteria.

    Args:
        sse_N: SSE of each model of `PARAMETERS`; infinite for tokens that the model must not
            describe.
        drop_N: drop of the one sigmoid, whose sign separates falling from rising.
        level_N: mean loss in nats.
        count_N: number of losses of each token.
        phi_N: lag-one autocorrelation of the noise.
        known_below: mean loss in nats below which a flat token is flat-known.
    """
    is_sure_N = (sse_N["sigmoid"] < _SURE * sse_N["flat"]) & (count_N >= _SURE_PROBES)
    sse_N = sse_N | {"flat": sse_N["flat"].masked_fill(is_sure_N, torch.inf)}
    bic_NM = torch.stack([criterion(m, sse_N[m], count_N, phi_N) for m in PARAMETERS], dim=1)
    best = bic_NM.topk(2, dim=1, largest=False)
    flat = torch.where(level_N < known_below, TokenClass.FLAT_KNOWN, TokenClass.FLAT_UNLEARNED)
    single = torch.where(drop_N > 0, TokenClass.FALLING, TokenClass.RISING)
    ramp = torch.full_like(flat, TokenClass.GRADUAL)
    two = torch.full_like(flat, TokenClass.TWO_STEP)
    classes_NM = torch.stack([flat, single, ramp, two], dim=1)
    class_N, runner_up_N = classes_NM.gather(1, best.indices).unbind(dim=1)
    return class_N, runner_up_N, best.values[:, 1] - best.values[:, 0]
