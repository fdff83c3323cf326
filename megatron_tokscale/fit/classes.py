"""Which model describes a trajectory: flat, one sigmoid, two sigmoids, or a ramp.

The Bayesian information criterion K ln(SSE/K) + p ln K, the noise estimated for every token, with p
the number of parameters: flat 1, ramp 3 (level, onset, slope), sigmoid 4, two sigmoids 7. Midpoints
and onsets are searched over the whole axis, which BIC does not know of: a model of one change must
beat flat, and one of two changes that of one, by `MARGIN` more ("strong evidence" of Kass and
Raftery 1995). The models, the margin and the level that tells flat tokens apart are our choice.

A ramp is constant until its onset and straight in x from there to the last probe: a loss that falls
as a power law where it is small against its level. Step 0 counts as the first finite probe.

Shapes: N tokens.
"""

import math

import torch
from torch import Tensor

from megatron_tokscale.fit.table import TokenClass

MARGIN = 6.0
KNOWN_BELOW = math.log(2)
"""A flat token is known if its mean loss is below this many nats: more likely right than wrong."""

PARAMETERS = {"flat": 1, "sigmoid": 4, "ramp": 3, "two": 7}
_CHANGES = {"flat": 0, "sigmoid": 1, "ramp": 1, "two": 2}
_RESOLUTION = 1e-12
_REACH = 10.0


def criterion(model: str, sse_N: Tensor, n_probes: int) -> Tensor:
    """BIC with the margin, for losses of unit variance; infinite if K is too small."""
    parameters = PARAMETERS[model]
    if n_probes <= parameters:
        return torch.full_like(sse_N, torch.inf)
    misfit_N = n_probes * (sse_N / n_probes).clamp_min(_RESOLUTION).log()
    return misfit_N + parameters * math.log(n_probes) + MARGIN * _CHANGES[model]


def in_reach(model: str, sse_N: Tensor, rivals: dict[str, Tensor], n_probes: int) -> Tensor:
    """Whether `model`, not yet at its optimum, is within `_REACH` of the best of `rivals`."""
    best = torch.stack([criterion(name, sse, n_probes) for name, sse in rivals.items()]).amin(dim=0)
    return criterion(model, sse_N, n_probes) < best + _REACH


def choose(
    sse_N: dict[str, Tensor], drop_N: Tensor, level_N: Tensor, n_probes: int, known_below: float
) -> tuple[Tensor, Tensor]:
    """The class of every token, and the margin of its criterion over the runner-up's.

    Args:
        sse_N: the SSE that each model of `PARAMETERS` leaves; infinite to rule it out.
        drop_N: the sigmoid's drop: its sign tells falling from rising.
        level_N: mean loss in nats.
        n_probes: K.
        known_below: nats; see `KNOWN_BELOW`.
    """
    bic_NM = torch.stack([criterion(name, sse_N[name], n_probes) for name in PARAMETERS], dim=1)
    best = bic_NM.topk(2, dim=1, largest=False)
    flat = torch.where(level_N < known_below, TokenClass.FLAT_KNOWN, TokenClass.FLAT_UNLEARNED)
    single = torch.where(drop_N > 0, TokenClass.FALLING, TokenClass.RISING)
    ramp = torch.full_like(flat, TokenClass.GRADUAL)
    two = torch.full_like(flat, TokenClass.TWO_STEP)
    classes_NM = torch.stack([flat, single, ramp, two], dim=1)
    class_N = classes_NM.gather(1, best.indices[:, :1])[:, 0]
    return class_N, best.values[:, 1] - best.values[:, 0]
