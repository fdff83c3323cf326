"""The plan's format, and the order of samples that follows from it. No Megatron, no analysis code.

The dataset itself is `megatron_tokscale.data.dataset.PlannedDataset`: it needs torch, so it is
imported on its own; everything here loads without it.
"""

from megatron_tokscale.data.history import followed_plan, with_decisions
from megatron_tokscale.data.index import (
    PlanIndex,
    RealisedShares,
    build_index,
    load_or_build_index,
)
from megatron_tokscale.data.match import match_datasets
from megatron_tokscale.data.permutation import Permutation, epoch_permutation, stratum_key
from megatron_tokscale.data.plan import Plan
from megatron_tokscale.data.plan_parts import (
    Acceptance,
    Cut,
    DatasetIdentity,
    Decision,
    PlanProvenance,
    PlanSources,
    Replanning,
    Segment,
    Skip,
    Stage,
    Stratum,
    dataset_names,
)
from megatron_tokscale.data.scores import DocumentScores, Reliability, ScoreDetails

__all__ = [
    "Acceptance",
    "Cut",
    "DatasetIdentity",
    "Decision",
    "DocumentScores",
    "Permutation",
    "Plan",
    "PlanIndex",
    "PlanProvenance",
    "PlanSources",
    "RealisedShares",
    "Reliability",
    "Replanning",
    "ScoreDetails",
    "Segment",
    "Skip",
    "Stage",
    "Stratum",
    "build_index",
    "dataset_names",
    "epoch_permutation",
    "followed_plan",
    "load_or_build_index",
    "match_datasets",
    "stratum_key",
    "with_decisions",
]
