"""Guards: limits on a plan, whatever its policy, on low weights, sudden changes and repetition.

Each guard moves the weights along a straight line towards weights that are allowed, so that no
guard undoes another.

Shapes: T stages, Z strata, or datasets where these are not cut. The weights of a stage sum to one,
or to the share of a dataset.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from megatron_tokscale.core.arrays import Floats, Integers
from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.data.plan_parts import FLOOR, MAX_CHANGE


@dataclass(frozen=True)
class Guards:
    """Limits on a plan; the defaults of the first two are our choice (`data/plan_parts.py`).

    Attributes:
        floor: smallest weight of a stratum, as a fraction of its base weight.
        max_change: largest factor by which a weight grows or shrinks from one stage to the next.
        max_epochs: largest number of epochs of a stratum in the whole plan; None for no limit.
            Up to 4 times, repeated text is nearly as good as new (Muennighoff et al., "Scaling
            Data-Constrained Language Models", 2023).

    Raises:
        TokscaleError: on construction, if no plan can meet a limit.
    """

    floor: float = FLOOR
    max_change: float = MAX_CHANGE
    max_epochs: float | None = 4.0

    def __post_init__(self) -> None:
        if not 0 < self.floor <= 1:
            raise TokscaleError(
                f"the floor is {self.floor}; expected a fraction above 0 and at most 1; give "
                "another --floor"
            )
        if not self.max_change > 1:
            raise TokscaleError(
                f"the limit on change per stage is {self.max_change}; expected a factor above 1; "
                "give another --max-change"
            )
        if self.max_epochs is not None and not self.max_epochs > 0:
            raise TokscaleError(
                f"the limit on epochs is {self.max_epochs}; expected a positive number; give "
                "another --max-epochs"
            )


def apply_floor(weights_TZ: Floats, base_Z: Floats, floor: float) -> Floats:
    """Mix in base weights, so that no weight is below `floor` times its base weight."""
    return floor * base_Z + (1 - floor) * weights_TZ


def limit_change(weights_TZ: Floats, max_change: float) -> Floats:
    """Move from each stage towards the next only as far as every weight may change."""
    limited_TZ = weights_TZ.copy()
    for before_Z, after_Z in pairwise(limited_TZ):
        step_Z = after_Z - before_Z
        room_Z = before_Z * np.where(step_Z > 0, max_change - 1, 1 - 1 / max_change)
        moved = step_Z != 0
        fraction = (room_Z[moved] / np.abs(step_Z[moved])).min(initial=1.0)
        if fraction < 1:  # else the weights stay as they are, to the last bit
            after_Z[:] = before_Z + fraction * step_Z
    return limited_TZ


def limit_shares(
    weights_TZ: Floats, base_Z: Floats, dataset_Z: Integers, share_limit: float
) -> Floats:
    """Move the shares of datasets towards their base shares until each is within a factor of it.

    The proportions of the strata within a dataset stay; they are those of the base weights in a
    dataset without weight.

    Args:
        weights_TZ: weights of the strata, summing to one.
        base_Z: base weights.
        dataset_Z: dataset of each stratum.
        share_limit: the factor, either way.
    """
    base_D = np.bincount(dataset_Z, base_Z)
    limited_TZ = np.empty_like(weights_TZ)
    for weights_Z, limited_Z in zip(weights_TZ, limited_TZ, strict=True):
        share_D = np.bincount(dataset_Z, weights_Z)
        change_D = share_D - base_D
        room_D = base_D * np.where(change_D > 0, share_limit - 1, 1 - 1 / share_limit)
        moved = change_D != 0
        fraction = (room_D[moved] / np.abs(change_D[moved])).min(initial=1.0)
        has_weight_Z = (share_D > 0)[dataset_Z]
        within_Z = np.where(has_weight_Z, weights_Z, base_Z)
        within_Z = within_Z / np.bincount(dataset_Z, within_Z)[dataset_Z]
        limited_Z[:] = (base_D + fraction * change_D)[dataset_Z] * within_Z
    return limited_TZ


def limit_repetition(
    weights_TZ: Floats, base_Z: Floats, length_T: Integers, limit_Z: Floats
) -> Floats:
    """Move a whole plan towards its base weights until every stratum is within its limit.

    Args:
        weights_TZ: the plan's weights.
        base_Z: base weights, which are within the limit.
        length_T: samples of each stage.
        limit_Z: largest number of samples from each stratum.
    """
    base_draws_Z = base_Z * length_T.sum()
    extra_Z = length_T @ weights_TZ - base_draws_Z
    grows = extra_Z > 0
    fraction = ((limit_Z - base_draws_Z)[grows] / extra_Z[grows]).min(initial=1.0)
    return np.asarray(base_Z + fraction * (weights_TZ - base_Z))


def refuse_repetition(
    names: Sequence[str], draws_Z: Floats, epoch_samples_Z: Floats, max_epochs: float
) -> None:
    """Refuse a number of draws that repeats a stratum for more than `max_epochs` epochs.

    Args:
        names: names of the strata.
        draws_Z: samples drawn from each stratum.
        epoch_samples_Z: samples of each stratum in one epoch.
        max_epochs: the limit.

    Raises:
        TokscaleError: naming the stratum that would be repeated most.
    """
    epochs_Z = draws_Z / epoch_samples_Z
    worst = int(np.argmax(epochs_Z))
    if epochs_Z[worst] > max_epochs:
        raise TokscaleError(
            f"stratum {names[worst]!r} would be repeated for {epochs_Z[worst]:.3g} epochs; "
            f"expected at most {max_epochs:g}; lower its weight or raise --max-epochs"
        )
