"""Policies: what weight each dataset or stratum should have, when. The guards come after.

Shapes: T stages, D datasets, Z strata. The weights of a stage sum to one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final, Literal

import numpy as np

from megatron_tokscale.core.arrays import Floats, Integers, Mask
from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.reweight.cutting import CutDataset
from megatron_tokscale.reweight.learnability import Spectra
from megatron_tokscale.reweight.time_map import Clock

type WeightSchedule = tuple[Integers, Floats]  # start_T in consumed samples, weights_TD

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
    """

    spectra: Spectra
    window: float = 4.0
    strength: float = 1.0
    n_stages: int = 24
    first: int | None = None

    def __post_init__(self) -> None:
        _check_window(self.window, self.strength, self.n_stages)


@dataclass(frozen=True)
class Frontier:
    """Favour in each dataset the strata that a reference run was about to learn at this point.

    A stratum's learnability at consumed tokens t is the drop, in nats per token, whose learning
    time lies between t and `window` * t on the clock of the reference run: the mean over samples of
    drop * (Phi((x1 - c) / s) - Phi((x0 - c) / s)), c and s the sample's learning time and spread in
    x = ln(tokens). So what is known already and what is out of reach do not count. Its weight in
    its dataset is its share times (learnability / mean learnability) ** `strength`; the mean is
    over shares. Before `first`, and in a dataset where nothing is to be learned, the shares hold;
    where the clock ends before half of the window (in log time), the weights before it hold. All
    of this is our choice.

    Attributes:
        datasets: of the plan, cut into strata.
        clock: when the training is where on the axis of the reference run.
        seq_length: sequence length in tokens.
        window: how far ahead to look, as a factor of training time.
        strength: 0 keeps the shares, 1 is proportional.
        n_stages: number of stages, evenly spaced in the logarithm of consumed samples.
        first: consumed samples before the second stage; by default a fiftieth of training.
        move_shares: tilt also the datasets, each by the mean learnability of its strata.
    """

    datasets: Sequence[CutDataset]
    clock: Clock
    seq_length: int
    window: float = 4.0
    strength: float = 1.0
    n_stages: int = 24
    first: int | None = None
    move_shares: bool = False

    def __post_init__(self) -> None:
        _check_window(self.window, self.strength, self.n_stages)


@dataclass(frozen=True)
class EasyFirst:
    """Control: a curriculum in the order of learning time, whatever the training has learned.

    At the fraction u of training the samples that are learned first are drawn from, a part
    c(u) = sqrt(u (1 - c0^2) + c0^2) of each dataset: the competence of Platanios et al.,
    "Competence-based curriculum learning" (2019), eq. 7. Those never learned come last.

    Attributes:
        datasets: of the plan, cut into strata.
        competence: c0, the part at the start; our choice.
        n_stages: as of `Frontier`, and at the same samples; so is first.
    """

    datasets: Sequence[CutDataset]
    competence: float = 0.1
    n_stages: int = 24
    first: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.competence <= 1:
            raise TokscaleError(
                f"the competence {self.competence} at the start is not above 0 and at most 1"
            )


type Policy = Uniform | Manual | BySpectrum | Frontier | EasyFirst


def schedule(policy: Policy, base_Z: Floats, train_samples: int) -> WeightSchedule:
    """Stages of a policy for a training of `train_samples`, before any guard.

    Args:
        base_Z: base weights of what it weighs: of the strata, which are the datasets themselves
            where these are not cut.
        train_samples: length of the training.

    Raises:
        TokscaleError: the policy does not fit the datasets or the length of the training.
    """
    match policy:
        case Uniform():
            return np.zeros(1, dtype=np.int64), base_Z[None]
        case Manual():
            return _by_hand(policy, len(base_Z))
        case BySpectrum():
            return _by_spectrum(policy, base_Z, train_samples)
        case Frontier():
            return _frontier(policy, base_Z, train_samples)
        case EasyFirst():
            return _easy_first(policy, base_Z, train_samples)


def _check_window(window: float, strength: float, n_stages: int) -> None:
    if not window > 1:
        raise TokscaleError(f"the window {window} must be a factor above 1")
    if not 0 <= strength < np.inf:
        raise TokscaleError(f"the strength {strength} must be 0 or more")
    if n_stages < 2:
        raise TokscaleError(f"{n_stages} stages cannot follow what is learned; take 2 or more")


def _by_hand(policy: Manual, n_datasets: int) -> WeightSchedule:
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


def _stage_starts(n_stages: int, first: int | None, train_samples: int) -> Integers:
    first = first if first is not None else max(train_samples // 50, 1)
    if not 0 < first < train_samples:
        raise TokscaleError(
            f"the first stage of {first} samples does not fit a training of {train_samples}"
        )
    later_T = np.geomspace(first, train_samples, n_stages)[:-1].round().astype(np.int64)
    return np.unique(np.concatenate([[0], later_T]))


def _by_spectrum(policy: BySpectrum, base_D: Floats, train_samples: int) -> WeightSchedule:
    start_T = _stage_starts(policy.n_stages, policy.first, train_samples)
    rows = [base_D]
    for start in start_T[1:]:
        learnability_D = _learnability_ahead(policy, int(start))
        rows.append(
            rows[-1] if learnability_D is None else _tilt(policy.strength, base_D, learnability_D)
        )
    return start_T, np.stack(rows)


def _learnability_ahead(policy: BySpectrum, start: int) -> Floats | None:
    """Learnability per dataset at `start`; None where the reference run does not reach."""
    spectra = policy.spectra
    stop = min(start * policy.window, spectra.n_samples)
    if stop < start * policy.window**_SEEN:
        return None
    return spectra.learnability_D(start, stop)


def _tilt(strength: float, base: Floats, learnability: Floats) -> Floats:
    """Base weights times a power of learnability, with the sum of the base weights."""
    mean = float(base @ learnability) / base.sum()
    if mean <= 0:
        return base
    tilted = base * (learnability / mean) ** strength
    return np.asarray(tilted * (base.sum() / tilted.sum()))


def _frontier(policy: Frontier, base_Z: Floats, train_samples: int) -> WeightSchedule:
    start_T = _stage_starts(policy.n_stages, policy.first, train_samples)
    seen_T, learnability_TZ = _learnability_of_strata(policy, start_T[1:])
    rows = [base_Z]
    for seen, learnability_Z in zip(seen_T, learnability_TZ, strict=True):
        rows.append(_tilt_strata(policy, base_Z, learnability_Z) if seen else rows[-1])
    return start_T, np.stack(rows)


def _learnability_of_strata(policy: Frontier, start_T: Integers) -> tuple[Mask, Floats]:
    """Which stages the clock tells of, and the learnability of each stratum in nats per token."""
    now_T = np.log(start_T * float(policy.seq_length))
    ahead = float(np.log(policy.window))
    stop_T = np.minimum(now_T + ahead, policy.clock.end)
    x_T, until_T = policy.clock.x(now_T), policy.clock.x(stop_T)
    learned_TZ, by_then_TZ = (
        np.concatenate([dataset.learned_by(x_E) for dataset in policy.datasets], axis=1)
        for x_E in (x_T, until_T)
    )
    return stop_T >= now_T + _SEEN * ahead, np.maximum(by_then_TZ - learned_TZ, 0.0)


def _tilt_strata(policy: Frontier, base_Z: Floats, learnability_Z: Floats) -> Floats:
    tilted_Z = np.empty_like(base_Z)
    strata = strata_slices(policy.datasets)
    for part in strata:
        tilted_Z[part] = _tilt(policy.strength, base_Z[part], learnability_Z[part])
    if not policy.move_shares:
        return tilted_Z
    base_D = np.array([base_Z[part].sum() for part in strata])
    mean_D = np.array([base_Z[part] @ learnability_Z[part] for part in strata]) / base_D
    moved_D = _tilt(policy.strength, base_D, mean_D)
    for d, part in enumerate(strata):
        tilted_Z[part] *= moved_D[d] / base_D[d]
    return tilted_Z


def _easy_first(policy: EasyFirst, base_Z: Floats, train_samples: int) -> WeightSchedule:
    start_T = _stage_starts(policy.n_stages, policy.first, train_samples)
    start = policy.competence**2
    competence_T = np.sqrt(start + start_T / train_samples * (1 - start))
    weights_TZ = np.empty((len(start_T), len(base_Z)))
    for dataset, part in zip(policy.datasets, strata_slices(policy.datasets), strict=True):
        low_Z, high_Z = dataset.bounds[:-1], dataset.bounds[1:]
        within_TZ = np.clip(competence_T[:, None], low_Z, high_Z) - low_Z
        total_T = within_TZ.sum(axis=1, keepdims=True)
        weights_TZ[:, part] = base_Z[part].sum() * within_TZ / total_T
    return start_T, weights_TZ


def strata_slices(datasets: Sequence[CutDataset]) -> list[slice]:
    """Where the strata of each dataset are among those of all."""
    stops = np.cumsum([len(dataset.names) for dataset in datasets]).tolist()
    return [slice(a, b) for a, b in pairwise([0, *stops])]
