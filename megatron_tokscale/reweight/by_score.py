"""Policies by a score of documents: `fall`, and `target` for a validation unlike the pool.

Both are static: the weights hold from a twentieth of the training on.

Shapes: Z strata, T stages.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from megatron_tokscale.core.arrays import Floats
from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.reweight.cutting import CutDataset
from megatron_tokscale.reweight.stages import (
    PolicyStages,
    check_stages,
    check_strength,
    stage_starts,
    tilt,
)

STRENGTH: Final = 0.8
"""Exponent of a stratum's relative fall. Where strata are learned apart and their losses fall as
n^-a, the least loss is at the exponent 1 / (1 + a), 0.75 to 0.9 for a = 0.1 to 0.3
(docs/references.md 10.2)."""

SHARE_LIMIT: Final = 2.0
"""Largest factor between a dataset's share and its base share. Our choice: what moves between
datasets is gained too, and no dataset loses more than half for the sake of a score."""

TOP: Final = 0.25
"""Share of the pool that `target` draws from. Our choice: CoLoR-Filter selects 1/tau of its pool
for tau from 2 to 64; a floor under the rest makes a larger tau cost more than it gives."""

_FIRST: Final = 20
"""The base weights hold for a twentieth of the training. Our choice: the loss there falls with what
all documents share, and the optimizer's warm-up lies there."""


@dataclass(frozen=True)
class ByFall:
    """Policy that favours the strata whose documents still fall late in a reference run.

    The weight of a stratum is its base weight times (lambda / mean lambda) ** `strength` over the
    strata of all datasets; lambda is the mean fall of its documents, not below 0.

    Attributes:
        datasets: the plan's datasets, cut into strata.
        strength: 0 keeps the base weights, 1 is proportional.
        share_limit: largest factor by which a dataset's share departs from its base share, either
            way; 1 keeps the shares.
        n_stages: stages, over which the weights move to their values within the guards.
        first: consumed samples before the second stage; by default a twentieth of training.
    """

    datasets: Sequence[CutDataset]
    strength: float = STRENGTH
    share_limit: float = SHARE_LIMIT
    n_stages: int = 24
    first: int | None = None

    def __post_init__(self) -> None:
        check_strength(self.strength)
        check_stages(self.n_stages)
        _check_share_limit(self.share_limit)

    def wanted_Z(self, base_Z: Floats) -> Floats:
        """Return the weights of the strata, before any limit.

        Raises:
            TokscaleError: the scores have no falls, or no stratum has one above 0.
        """
        fall_Z = falls(self.datasets)
        if fall_Z.max() <= 0:
            raise TokscaleError(
                f"the largest mean fall of a stratum is {fall_Z.max():.3g} nats per token; "
                "expected one above 0; score by a reference run whose losses still fall"
            )
        return tilt(self.strength, base_Z, np.maximum(fall_Z, 0.0))


@dataclass(frozen=True)
class ByTarget:
    """Policy that draws from the strata with the highest target scores.

    After CoLoR-Filter (Brandfonbrener et al., arXiv 2406.10670), which keeps the top 1/tau of its
    pool: strata are taken by descending mean score until they are `top` of the base weights, the
    last one in part. Only the rank of a stratum counts, as scores have no scale of their own. The
    floor under the rest, and the use of strata, are our choice.

    Attributes:
        datasets: the plan's datasets, cut into strata.
        top: 1/tau, the share of the pool that is drawn from.
        share_limit: as in `ByFall`; so are n_stages and first.
    """

    datasets: Sequence[CutDataset]
    top: float = TOP
    share_limit: float = SHARE_LIMIT
    n_stages: int = 24
    first: int | None = None

    def __post_init__(self) -> None:
        check_stages(self.n_stages)
        _check_share_limit(self.share_limit)
        if not 0 < self.top <= 1:
            raise TokscaleError(
                f"the share that is drawn from is {self.top:g}; expected a number above 0 and at "
                "most 1; give another --top"
            )

    def wanted_Z(self, base_Z: Floats) -> Floats:
        """Return the weights of the strata, before any limit.

        Raises:
            TokscaleError: the scores have no target scores.
        """
        order = np.argsort(-target_scores(self.datasets), kind="stable")
        before = np.cumsum(base_Z[order]) - base_Z[order]
        taken_Z = np.zeros_like(base_Z)
        taken_Z[order] = np.clip(self.top * base_Z.sum() - before, 0.0, base_Z[order])
        return np.asarray(taken_Z * (base_Z.sum() / taken_Z.sum()))


def static_stages(policy: ByFall | ByTarget, base_Z: Floats, train_samples: int) -> PolicyStages:
    """Return base weights, then the policy's weights at each stage, before any limit."""
    start_T = stage_starts(policy.n_stages, policy.first, train_samples, _FIRST)
    wanted_Z = policy.wanted_Z(base_Z)
    return PolicyStages(start_T, np.stack([base_Z, *[wanted_Z] * (len(start_T) - 1)]))


def falls(datasets: Sequence[CutDataset]) -> Floats:
    """Return the mean fall of each stratum of all datasets, in nats per token.

    Raises:
        TokscaleError: the scores of a dataset have none.
    """
    means = [dataset.fall_Z for dataset in datasets]
    return _joined(datasets, means, "falls", "a run that watched training documents")


def target_scores(datasets: Sequence[CutDataset]) -> Floats:
    """Return the mean target score of each stratum of all datasets, in nats per token.

    Raises:
        TokscaleError: the scores of a dataset have none.
    """
    means = [dataset.target_Z for dataset in datasets]
    return _joined(datasets, means, "target scores", "a tuned run (--tuned)")


def _joined(
    datasets: Sequence[CutDataset], means: Sequence[Floats | None], what: str, source: str
) -> Floats:
    """Return the means of the strata of all datasets, or the error that a dataset has none."""
    found = [mean_Z for mean_Z in means if mean_Z is not None]
    if len(found) < len(datasets):
        lacking = [
            dataset for dataset, mean_Z in zip(datasets, means, strict=True) if mean_Z is None
        ]
        raise lacking[0].missing(what, source)
    return np.concatenate(found)


def _check_share_limit(share_limit: float) -> None:
    if not 1 <= share_limit < np.inf:
        raise TokscaleError(
            f"the limit on shares is {share_limit:g}; expected a finite factor of 1 or more; give "
            "another --share-limit"
        )
