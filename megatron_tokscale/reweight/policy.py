"""Policies: the weights of datasets or strata over training, before any guard.

Shapes: T stages, D datasets, Z strata. The weights of a stage sum to one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final, Literal

import numpy as np

from megatron_tokscale.core.arrays import Floats, Integers, Mask
from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.reweight.by_score import ByFall, ByTarget, static_stages
from megatron_tokscale.reweight.cutting import CutDataset, strata_slices
from megatron_tokscale.reweight.learnability import Spectra
from megatron_tokscale.reweight.stages import (
    PolicyStages,
    check_stages,
    check_strength,
    stage_starts,
    tilt,
)
from megatron_tokscale.reweight.time_map import TokenTimeMap

_SEEN: Final = 0.5
"""The share of a window, in log time, that must lie within the reference run. Our choice: with
less, the weights would depend on a forecast of learning after its end."""


@dataclass(frozen=True)
class Uniform:
    """Control: the base weights throughout.

    Attributes:
        datasets: the plan's datasets, cut into strata; empty: the datasets are the strata.
    """

    datasets: Sequence[CutDataset] = ()


@dataclass(frozen=True)
class Manual:
    """Weights by hand, at chosen numbers of consumed samples.

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
    """Policy that favours the datasets that a reference run was about to learn at this point.

    A dataset's learnability at consumed sample t is the drop, in nats per token, whose learning
    time lies between t and `window` * t: drops that are learned already, and drops after the
    window, do not count. Its weight is its base weight times (learnability / mean learnability) **
    `strength`; the mean is over base weights. Before `first`, and where no drop is ahead, the base
    weights hold; where the reference run ends before half of the window (in log time), the weights
    before it hold. All of this is our choice.

    Attributes:
        spectra: spectra of the reference run, one per dataset of the plan, in its order.
        window: horizon, as a factor of training time.
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
    """Policy that favours the strata of each dataset that a reference run was about to learn.

    A stratum's learnability at consumed tokens t is the drop, in nats per token, whose learning
    time lies between t and `window` * t under the time map: the mean over samples of
    drop * (Phi((x1 - c) / s) - Phi((x0 - c) / s)), c and s the sample's learning time and spread in
    x = ln(tokens), x0 and x1 the mapped ends of the window. So drops that are learned already, and
    drops after the window, do not count. Its weight in its dataset is its share times (learnability
    / mean learnability) ** `strength`; the mean is over shares. Before `first`, and in a dataset
    where no drop is ahead, the shares hold; where the time map ends before half of the window (in
    log time), the weights before it hold. All of this is our choice.

    Attributes:
        datasets: the plan's datasets, cut into strata.
        time_map: maps the training to the reference run.
        seq_length: sequence length in tokens.
        window: horizon, as a factor of training time.
        strength: 0 keeps the shares, 1 is proportional.
        n_stages: number of stages, evenly spaced in the logarithm of consumed samples.
        first: consumed samples before the second stage; by default a fiftieth of training.
        move_shares: whether to tilt also the datasets, by the mean learnability of their strata.
    """

    datasets: Sequence[CutDataset]
    time_map: TokenTimeMap
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

    At the fraction u of training a part c(u) = sqrt(u (1 - c0^2) + c0^2) of each dataset is drawn
    from, the samples that are learned first: the competence of Platanios et al., "Competence-based
    curriculum learning" (2019), eq. 7. Samples that are never learned come last.

    Attributes:
        datasets: the plan's datasets, cut into strata.
        competence: c0, the part of each dataset that is drawn from at the start; our choice.
        n_stages: as in `Frontier`, with the same starts; so is first.
    """

    datasets: Sequence[CutDataset]
    competence: float = 0.1
    n_stages: int = 24
    first: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.competence <= 1:
            raise TokscaleError(
                f"the competence at the start is {self.competence}; expected a number above 0 and "
                "at most 1; give another"
            )


type Policy = Uniform | Manual | BySpectrum | Frontier | EasyFirst | ByFall | ByTarget


def policy_stages(policy: Policy, base_Z: Floats, train_samples: int) -> PolicyStages:
    """Return the stages of a policy for a training of `train_samples`, before any guard.

    Args:
        policy: the policy.
        base_Z: base weights of the strata, which are the datasets themselves where these are not
            cut.
        train_samples: length of the training.

    Raises:
        TokscaleError: the policy does not fit the datasets or the length of the training.
    """
    match policy:
        case Uniform():
            return PolicyStages(np.zeros(1, dtype=np.int64), base_Z[None])
        case Manual():
            return _by_hand(policy, len(base_Z))
        case BySpectrum():
            return _by_spectrum(policy, base_Z, train_samples)
        case Frontier():
            return _frontier(policy, base_Z, train_samples)
        case EasyFirst():
            return _easy_first(policy, base_Z, train_samples)
        case ByFall() | ByTarget():
            return static_stages(policy, base_Z, train_samples)


def _check_window(window: float, strength: float, n_stages: int) -> None:
    if not window > 1:
        raise TokscaleError(
            f"the window is {window}; expected a factor above 1; give another --window"
        )
    check_strength(strength)
    check_stages(n_stages)


def _by_hand(policy: Manual, n_datasets: int) -> PolicyStages:
    points = sorted(policy.points.items())
    if not points or points[0][0] != 0:
        raise TokscaleError(
            f"the weights by hand begin at sample {points[0][0] if points else 'none'}; expected "
            "weights at sample 0; add them to --weights"
        )
    knot_T = np.array([start for start, _ in points], dtype=np.int64)
    weights_TD = np.array([_normalised(weights, start, n_datasets) for start, weights in points])
    if policy.interpolation == "step":
        return PolicyStages(knot_T, weights_TD)
    cut_T = [np.linspace(a, b, policy.n_stages, endpoint=False) for a, b in pairwise(knot_T)]
    start_T = np.unique(np.concatenate([*cut_T, knot_T[-1:]]).astype(np.int64))
    middle_T = np.append((start_T[1:] + start_T[:-1]) / 2, start_T[-1])
    rows = [np.interp(middle_T, knot_T, weights_T) for weights_T in weights_TD.T]
    return PolicyStages(start_T, np.stack(rows, axis=1))


def _normalised(weights: Sequence[float], start: int, n_datasets: int) -> Floats:
    if len(weights) != n_datasets:
        raise TokscaleError(
            f"--weights has {len(weights)} weights at sample {start} for {n_datasets} datasets; "
            "expected one for each"
        )
    weights_D = np.array(weights, dtype=np.float64)
    with np.errstate(over="ignore"):
        total = weights_D.sum()
    if (weights_D < 0).any() or not 0 < total < np.inf:
        raise TokscaleError(
            f"the weights at sample {start} are {list(weights)}; expected finite ones of 0 or more "
            "that are not all 0; give others in --weights"
        )
    return weights_D / total


def _by_spectrum(policy: BySpectrum, base_D: Floats, train_samples: int) -> PolicyStages:
    start_T = stage_starts(policy.n_stages, policy.first, train_samples)
    rows = [base_D]
    for start in start_T[1:]:
        learnability_D = _learnability_ahead(policy, int(start))
        rows.append(
            rows[-1] if learnability_D is None else tilt(policy.strength, base_D, learnability_D)
        )
    return PolicyStages(start_T, np.stack(rows))


def _learnability_ahead(policy: BySpectrum, start: int) -> Floats | None:
    """Return each dataset's learnability at `start`; None where the reference run has ended."""
    spectra = policy.spectra
    stop = min(start * policy.window, spectra.n_samples)
    if stop < start * policy.window**_SEEN:
        return None
    return spectra.learnability_D(start, stop)


def _frontier(policy: Frontier, base_Z: Floats, train_samples: int) -> PolicyStages:
    start_T = stage_starts(policy.n_stages, policy.first, train_samples)
    seen_T, learnability_TZ = _learnability_of_strata(policy, start_T[1:])
    rows = [base_Z]
    for seen, learnability_Z in zip(seen_T, learnability_TZ, strict=True):
        rows.append(_tilt_strata(policy, base_Z, learnability_Z) if seen else rows[-1])
    return PolicyStages(start_T, np.stack(rows))


def _learnability_of_strata(policy: Frontier, start_T: Integers) -> tuple[Mask, Floats]:
    """Return a mask of stages that the time map reaches, and strata's learnability in nats."""
    now_T = np.log(start_T * float(policy.seq_length))
    ahead = float(np.log(policy.window))
    stop_T = np.minimum(now_T + ahead, policy.time_map.end)
    x_T, until_T = policy.time_map.x(now_T), policy.time_map.x(stop_T)
    learned_TZ, by_then_TZ = (
        np.concatenate([dataset.learned_by(x_E) for dataset in policy.datasets], axis=1)
        for x_E in (x_T, until_T)
    )
    return stop_T >= now_T + _SEEN * ahead, np.maximum(by_then_TZ - learned_TZ, 0.0)


def _tilt_strata(policy: Frontier, base_Z: Floats, learnability_Z: Floats) -> Floats:
    tilted_Z = np.empty_like(base_Z)
    strata = strata_slices(policy.datasets)
    for part in strata:
        tilted_Z[part] = tilt(policy.strength, base_Z[part], learnability_Z[part])
    if not policy.move_shares:
        return tilted_Z
    base_D = np.array([base_Z[part].sum() for part in strata])
    mean_D = np.array([base_Z[part] @ learnability_Z[part] for part in strata]) / base_D
    moved_D = tilt(policy.strength, base_D, mean_D)
    for d, part in enumerate(strata):
        tilted_Z[part] *= moved_D[d] / base_D[d]
    return tilted_Z


def _easy_first(policy: EasyFirst, base_Z: Floats, train_samples: int) -> PolicyStages:
    start_T = stage_starts(policy.n_stages, policy.first, train_samples)
    start = policy.competence**2
    competence_T = np.sqrt(start + start_T / train_samples * (1 - start))
    weights_TZ = np.empty((len(start_T), len(base_Z)))
    for dataset, part in zip(policy.datasets, strata_slices(policy.datasets), strict=True):
        low_Z, high_Z = dataset.bounds[:-1], dataset.bounds[1:]
        within_TZ = np.clip(competence_T[:, None], low_Z, high_Z) - low_Z
        total_T = within_TZ.sum(axis=1, keepdims=True)
        weights_TZ[:, part] = base_Z[part].sum() * within_TZ / total_T
    return PolicyStages(start_T, weights_TZ)
