"""What a plan may not do, whatever its policy: starve a dataset, lurch, or repeat too often.

Shapes: T stages, D datasets. The weights of a stage sum to one. Each guard moves them along a
straight line towards weights that are allowed, so none undoes what another has ensured.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from megatron_tokscale.errors import TokscaleError

type Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Guards:
    """Limits on a plan; the defaults of the first two are our choice.

    Attributes:
        floor: smallest weight of a dataset, as a fraction of its base weight.
        max_change: largest factor by which a weight grows or shrinks from one stage to the next.
        max_epochs: how often a dataset may be gone through in the whole plan; None is no limit.
            Up to 4 times, repeated text is nearly as good as new (Muennighoff et al., "Scaling
            Data-Constrained Language Models", 2023).

    Raises:
        TokscaleError: on construction, if no plan can meet a limit.
    """

    floor: float = 0.25
    max_change: float = 1.5
    max_epochs: float | None = 4.0

    def __post_init__(self) -> None:
        if not 0 < self.floor <= 1:
            raise TokscaleError(f"the floor {self.floor} is not above 0 and at most 1")
        if not self.max_change > 1:
            raise TokscaleError(f"the limit on change per stage, {self.max_change}, must exceed 1")
        if self.max_epochs is not None and not self.max_epochs > 0:
            raise TokscaleError(f"the limit on epochs, {self.max_epochs}, must be positive")


def apply_floor(weights_TD: Floats, base_D: Floats, floor: float) -> Floats:
    """Mix base weights in, so that none falls below `floor` times its base."""
    return floor * base_D + (1 - floor) * weights_TD


def limit_change(weights_TD: Floats, max_change: float) -> Floats:
    """From each stage go towards the next only as far as every weight may change."""
    limited_TD = weights_TD.copy()
    for before_D, after_D in pairwise(limited_TD):
        step_D = after_D - before_D
        room_D = before_D * np.where(step_D > 0, max_change - 1, 1 - 1 / max_change)
        moved = step_D != 0
        after_D[:] = before_D + step_D * (room_D[moved] / np.abs(step_D[moved])).min(initial=1.0)
    return limited_TD


def limit_repetition(
    weights_TD: Floats, base_D: Floats, length_T: NDArray[np.int64], limit_D: Floats
) -> Floats:
    """Damp a whole plan towards its base weights until no dataset gives more than its limit.

    Args:
        weights_TD: the plan's weights.
        base_D: weights that are themselves within the limit.
        length_T: samples of each stage.
        limit_D: most samples that each dataset may give.
    """
    base_draws_D = base_D * length_T.sum()
    extra_D = length_T @ weights_TD - base_draws_D
    grows = extra_D > 0
    fraction = ((limit_D - base_draws_D)[grows] / extra_D[grows]).min(initial=1.0)
    return np.asarray(base_D + fraction * (weights_TD - base_D))


def refuse_repetition(
    names: Sequence[str], draws_D: Floats, epoch_samples_D: Floats, max_epochs: float
) -> None:
    """Refuse a number of draws that goes through a dataset more than `max_epochs` times.

    Raises:
        TokscaleError: naming the dataset that would be repeated most.
    """
    epochs_D = draws_D / epoch_samples_D
    worst = int(np.argmax(epochs_D))
    if epochs_D[worst] > max_epochs:
        raise TokscaleError(
            f"dataset {names[worst]!r} would be gone through {epochs_D[worst]:.3g} times, the "
            f"limit is {max_epochs:g}; lower its weight or raise the limit on epochs"
        )
