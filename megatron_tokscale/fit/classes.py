"""The choice of the model that describes a trajectory: flat, one sigmoid, two sigmoids, or a ramp.

The criterion is the Bayesian information criterion K' ln(SSE/K) + p ln K: K' is the number of
independent losses that a token's K losses are worth (`noise.effective_count`), p the number of
parameters: flat 1, ramp 3 (level, onset, slope), sigmoid 4, two sigmoids 7. Midpoints and onsets
are searched over the whole axis, which BIC does not allow for: a model of one change must beat
flat, and a model of two changes a model of one, by `MARGIN` more ("strong evidence" of Kass and
Raftery 1995). The models, the margin and the level that separates flat tokens are our choice; the
classes of planted trajectories and of noise: benchmarks/results/fit_accuracy.md.

A ramp is constant until its onset and straight in x from there to the last probe: a loss that falls
as a power law where it is small against its level. Step 0 counts as the first finite probe.

Shapes: N tokens.
"""

import math

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from megatron_tokscale.fit.noise import effective_count
from megatron_tokscale.fit.table import TokenClass

MARGIN = 6.0
"""Decrease of the criterion that a model must reach for each change that it has: Kass and Raftery's
"strong evidence" begins at 6. At 60 probes, 0.2% of tokens of white noise are then classed other
than flat, and 2% with an autocorrelation of 0.6."""
KNOWN_BELOW = math.log(2)
"""Mean loss in nats below which a flat token is known: the token is more likely right than
wrong."""

PARAMETERS = {"flat": 1, "sigmoid": 4, "ramp": 3, "two": 7}
"""Number of parameters of each model."""
_CHANGES = {"flat": 0, "sigmoid": 1, "ramp": 1, "two": 2}
"""Number of changes of each model, each of which costs `MARGIN`."""
_RESOLUTION = 1e-12  # least mean squared residual of losses of unit variance in float32
_REACH = 10.0
"""Two sigmoids are fitted only if their criterion is at most this much above the best rival's.
Their SSE is first estimated from the best second cell, and the search may still lower it; our
choice."""
_QUANTILES = 200  # degrees of freedom in the table of Student's t, near its limit


def criterion(model: str, sse_N: Tensor, count_N: Tensor, phi_N: Tensor) -> Tensor:
    """Return BIC plus the margin, for losses of unit variance; infinite with too few losses."""
    parameters = PARAMETERS[model]
    misfit_N = (sse_N / count_N).clamp_min(_RESOLUTION).log() * effective_count(count_N, phi_N)
    bic_N = misfit_N + parameters * count_N.log() + MARGIN * _CHANGES[model]
    return torch.where(count_N > parameters, bic_N, torch.inf)


def in_reach(model: str, sse_N: Tensor, rivals: dict[str, Tensor], count_N: Tensor) -> Tensor:
    """Return whether `model`, not yet at its optimum, is within `_REACH` of the best of `rivals`.

    The noise is taken for white: its autocorrelation is known only when all models are fitted.
    """
    white_N = torch.zeros_like(count_N)
    best_N = torch.stack(
        [criterion(name, sse, count_N, white_N) for name, sse in rivals.items()]
    ).amin(dim=0)
    return criterion(model, sse_N, count_N, white_N) < best_N + _REACH


def student(free_N: Tensor) -> Tensor:
    """Return the 97.5% quantile of Student's t, to 1%, for each number of degrees of freedom (>
    0)."""
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
    """Return the class of every token, the runner-up, and the difference of their criteria.

    Args:
        sse_N: SSE of each model of `PARAMETERS`; infinite to rule it out.
        drop_N: drop of the one sigmoid, whose sign separates falling from rising.
        level_N: mean loss in nats.
        count_N: number of losses of each token.
        phi_N: lag-one autocorrelation of the noise.
        known_below: nats; see `KNOWN_BELOW`.
    """
    bic_NM = torch.stack([criterion(m, sse_N[m], count_N, phi_N) for m in PARAMETERS], dim=1)
    best = bic_NM.topk(2, dim=1, largest=False)
    flat = torch.where(level_N < known_below, TokenClass.FLAT_KNOWN, TokenClass.FLAT_UNLEARNED)
    single = torch.where(drop_N > 0, TokenClass.FALLING, TokenClass.RISING)
    ramp = torch.full_like(flat, TokenClass.GRADUAL)
    two = torch.full_like(flat, TokenClass.TWO_STEP)
    classes_NM = torch.stack([flat, single, ramp, two], dim=1)
    class_N, runner_up_N = classes_NM.gather(1, best.indices).unbind(dim=1)
    return class_N, runner_up_N, best.values[:, 1] - best.values[:, 0]
