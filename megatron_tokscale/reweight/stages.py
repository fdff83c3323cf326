"""Stages of a policy, and the tilt of base weights that policies share.

Shapes: T stages, Z strata.
"""

from typing import NamedTuple

import numpy as np

from megatron_tokscale.core.arrays import Floats, Integers
from megatron_tokscale.core.errors import TokscaleError


class PolicyStages(NamedTuple):
    """The stages of a policy.

    Attributes:
        start_T: consumed samples at which each stage begins.
        weights_TZ: weights of each stage, summing to one.
    """

    start_T: Integers
    weights_TZ: Floats


def stage_starts(
    n_stages: int, first: int | None, train_samples: int, divisor: int = 50
) -> Integers:
    """Return the starts of stages: 0, and from `first` on evenly spaced in ln samples.

    Args:
        n_stages: number of stages.
        first: consumed samples before the second stage; None: the training's over `divisor`.
        train_samples: length of the training.
        divisor: see `first`.

    Raises:
        TokscaleError: the first stage is empty or the whole training.
    """
    first = first if first is not None else max(train_samples // divisor, 1)
    if not 0 < first < train_samples:
        raise TokscaleError(
            f"the first stage has {first} samples of a training of {train_samples}; expected 1 or "
            "more, and fewer than the training has; give another --train-samples"
        )
    later_T = np.geomspace(first, train_samples, n_stages)[:-1].round().astype(np.int64)
    return np.unique(np.concatenate([[0], later_T]))


def tilt(strength: float, base: Floats, learnability: Floats) -> Floats:
    """Return base weights times a power of learnability, with the sum of the base weights.

    The base weights stay where the mean learnability is not above 0.
    """
    mean = float(base @ learnability) / base.sum()
    if mean <= 0:
        return base
    tilted = base * (learnability / mean) ** strength
    return np.asarray(tilted * (base.sum() / tilted.sum()))


def check_stages(n_stages: int) -> None:
    """Refuse fewer than two stages.

    Raises:
        TokscaleError: naming the flag.
    """
    if n_stages < 2:
        raise TokscaleError(
            f"the number of stages is {n_stages}; expected 2 or more; give another --stages"
        )


def check_strength(strength: float) -> None:
    """Refuse a strength that is negative or not finite.

    Raises:
        TokscaleError: naming the flag.
    """
    if not 0 <= strength < np.inf:
        raise TokscaleError(
            f"the strength is {strength}; expected a finite number of 0 or more; give another "
            "--strength"
        )
