"""Policies: what weight each dataset should have, when. The guards come after.

Shapes: T stages, D datasets. The weights of a stage sum to one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from megatron_tokscale.errors import TokscaleError
from megatron_tokscale.reweight.learnability import Spectra

type Floats = NDArray[np.float64]
type Schedule = tuple[NDArray[np.int64], Floats]  # start_T in consumed samples, weights_TD

# A window that the reference run has not seen at least half of says nothing (our choice).
_SEEN: Final = 0.5


@dataclass(frozen=True)
class Uniform:
    """Control: the base weights throughout."""


@dataclass(frozen=True)
class Manual:
    """A schedule by hand: weights at given numbers of consumed samples.

    Attributes:
        points: weights from (`step`) or at (`linear`) a consumed sample; the first at 0.
        interpolation: `step` holds each point's weights until the next point; `linear` goes
            straight from point to point. After the last point its weights hold.
        n_stages: stages that a straight line is cut into; each has the line's mean weights.
    """

    points: Mapping[int, Sequence[float]]
    interpolation: Literal["step", "linear"] = "step"
    n_stages: int = 16


@dataclass(frozen=True)
class BySpectrum:
    """Favour the datasets that a reference run was about to learn from at this point.

    A dataset's learnability at consumed sample t is the drop, in nats per token, whose learning
    time lies between t and `window` * t: what is known already and what is out of reach do not
    count. Its weight is its base weight times (learnability / mean learnability) ** `strength`;
    the mean is over base weights. Before `first`, and where nothing is to be learned, the base
    weights hold; where the reference run ends before half of the window (in log time), the
    weights before it hold. All of this is our choice.

    Attributes:
        spectra: of the reference run, one per dataset of the plan, in its order.
        window: how far ahead to look, as a factor of training time.
        strength: 0 keeps the base weights, 1 is proportional.
        n_stages: number of stages, evenly spaced in the logarithm of consumed samples.
        first: consumed samples before the second stage; by default a fiftieth of training.
        shuffle_seed: control: give each dataset the learnability of another, drawn with this
            seed and the same in all stages; as much change, no information. Two datasets can
            only be swapped, which makes it the opposite of the policy rather than noise.
    """

    spectra: Spectra
    window: float = 4.0
    strength: float = 1.0
    n_stages: int = 24
    first: int | None = None
    shuffle_seed: int | None = None

    def __post_init__(self) -> None:
        if not self.window > 1:
            raise TokscaleError(f"the window {self.window} must be a factor above 1")
        if not 0 <= self.strength < np.inf:
            raise TokscaleError(f"the strength {self.strength} must be 0 or more")
        if self.n_stages < 2:
            raise TokscaleError(f"{self.n_stages} stages cannot follow a spectrum; take 2 or more")


type Policy = Uniform | Manual | BySpectrum


def schedule(policy: Policy, base_D: Floats, train_samples: int) -> Schedule:
    """Stages of a policy for a training of `train_samples`, before any guard.

    Raises:
        TokscaleError: the policy does not fit the datasets or the length of the training.
    """
    match policy:
        case Uniform():
            return np.zeros(1, dtype=np.int64), base_D[None]
        case Manual():
            return _by_hand(policy, len(base_D))
        case BySpectrum():
            return _by_spectrum(policy, base_D, train_samples)


def _by_hand(policy: Manual, n_datasets: int) -> Schedule:
    points = sorted(policy.points.items())
    if not points or points[0][0] != 0:
        raise TokscaleError("a schedule by hand must give weights at sample 0")
    knot_T = np.array([start for start, _ in points], dtype=np.int64)
    weights_TD = np.array([_shares(weights, start, n_datasets) for start, weights in points])
    if policy.interpolation == "step":
        return knot_T, weights_TD
    cut_T = [np.linspace(a, b, policy.n_stages, endpoint=False) for a, b in pairwise(knot_T)]
    start_T = np.unique(np.concatenate([*cut_T, knot_T[-1:]]).astype(np.int64))
    middle_T = np.append((start_T[1:] + start_T[:-1]) / 2, start_T[-1])
    rows = [np.interp(middle_T, knot_T, weights_T) for weights_T in weights_TD.T]
    return start_T, np.stack(rows, axis=1)


def _shares(weights: Sequence[float], start: int, n_datasets: int) -> Floats:
    if len(weights) != n_datasets:
        raise TokscaleError(
            f"the schedule has {len(weights)} weights at sample {start} for {n_datasets} datasets"
        )
    weights_D = np.array(weights, dtype=np.float64)
    if not np.isfinite(weights_D).all() or (weights_D < 0).any() or not weights_D.sum() > 0:
        raise TokscaleError(
            f"the weights {list(weights)} at sample {start} must be 0 or more and not all 0"
        )
    return weights_D / weights_D.sum()


def _by_spectrum(policy: BySpectrum, base_D: Floats, train_samples: int) -> Schedule:
    first = policy.first if policy.first is not None else max(train_samples // 50, 1)
    if not 0 < first < train_samples:
        raise TokscaleError(
            f"the first stage of {first} samples does not fit a training of {train_samples}"
        )
    later_T = np.geomspace(first, train_samples, policy.n_stages)[:-1].round().astype(np.int64)
    start_T = np.unique(np.concatenate([[0], later_T]))
    rows = [base_D]
    for start in start_T[1:]:
        learnability_D = _learnability_ahead(policy, int(start))
        rows.append(rows[-1] if learnability_D is None else _tilt(policy, base_D, learnability_D))
    return start_T, np.stack(rows)


def _learnability_ahead(policy: BySpectrum, start: int) -> Floats | None:
    """Learnability per dataset at `start`; None where the reference run does not reach."""
    spectra = policy.spectra
    stop = min(start * policy.window, spectra.n_samples)
    if stop < start * policy.window**_SEEN:
        return None
    learnability_D = spectra.learnability_D(start, stop)
    if policy.shuffle_seed is None:
        return learnability_D
    return learnability_D[_other(len(learnability_D), policy.shuffle_seed)]


def _tilt(policy: BySpectrum, base_D: Floats, learnability_D: Floats) -> Floats:
    mean = float(base_D @ learnability_D)
    if mean <= 0:
        return base_D
    tilted_D = base_D * (learnability_D / mean) ** policy.strength
    return np.asarray(tilted_D / tilted_D.sum())


def _other(n_datasets: int, seed: int) -> NDArray[np.int64]:
    """A random cycle through all datasets: nobody keeps its own."""
    cycle = np.random.default_rng(seed).permutation(n_datasets)
    other_D = np.empty_like(cycle)
    other_D[cycle] = np.roll(cycle, 1)
    return other_D
