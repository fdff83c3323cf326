"""The plan's format, and the order of samples that follows from it. No Megatron, no analysis code.

The dataset itself is `megatron_tokscale.data.dataset.PlannedDataset`: it needs torch, so it is
imported on its own; everything here loads without it.
"""

from megatron_tokscale.data.index import Blend, Index, build_index, load_or_build_index
from megatron_tokscale.data.match import match_datasets
from megatron_tokscale.data.permutation import Permutation, epoch_permutation, stratum_key
from megatron_tokscale.data.plan import DatasetIdentity, Plan, Stage, Stratum
from megatron_tokscale.data.shares import RealisedShares, realised_shares

__all__ = [
    "Blend",
    "DatasetIdentity",
    "Index",
    "Permutation",
    "Plan",
    "RealisedShares",
    "Stage",
    "Stratum",
    "build_index",
    "epoch_permutation",
    "load_or_build_index",
    "match_datasets",
    "realised_shares",
    "stratum_key",
]
