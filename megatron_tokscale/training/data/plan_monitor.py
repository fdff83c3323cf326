"""What the plan meant to draw and what was drawn, logged beside Megatron's own lines.

Shapes: D datasets, Z strata.
"""

from argparse import Namespace
from typing import Final

import numpy as np
import torch
from megatron.training import print_rank_last

from megatron_tokscale.data import RealisedShares, dataset_names
from megatron_tokscale.data.index import count_strata
from megatron_tokscale.training.data.provider import Follower
from megatron_tokscale.training.ranks import sum_over_ranks
from megatron_tokscale.training.scalars import log_scalars

# With more strata than this only the datasets have scalars of their own.
_MOST_STRATA: Final = 64


class PlanMonitor:
    """Counts on rank 0, which holds data, and logs on the last rank. All ranks hold one."""

    def __init__(self, follower: Follower, args: Namespace) -> None:
        self._follower, self._args = follower, args
        self._counted = 0
        self._count_Z = np.zeros(follower.plan.n_strata, np.int64)

    def on_step(self, step: int) -> None:
        """Log, where Megatron logs."""
        if step % self._args.log_interval:
            return
        n_strata = self._follower.plan.n_strata
        values = self._count() if torch.distributed.get_rank() == 0 else [0.0] * (2 * n_strata)
        count_Z, size_Z = np.array(sum_over_ranks(*values)).reshape(2, n_strata)
        shares = RealisedShares(
            self._follower.plan,
            int(self._args.consumed_train_samples),
            count_Z.astype(np.int64),
            size_Z.astype(np.int64),
        )
        # A dataset that the job no longer has is of unknown size.
        epochs_Z = np.where(shares.size_Z > 0, shares.epochs_Z, 0.0)
        worst = int(np.argmax(epochs_Z))
        off_D = shares.by_dataset(shares.count_Z - shares.target_Z)
        print_rank_last(
            f" tokscale plan at step {step} | samples off the plan by dataset: "
            f"{np.abs(off_D).max():.2f} at most | epochs: {epochs_Z[worst]:.3f} at most "
            f"({shares.plan.strata[worst].name})"
        )
        log_scalars(_named(shares), step, self._args)

    def _count(self) -> list[float]:
        """Samples drawn from each stratum so far, and samples of each in one epoch."""
        index, strata = self._follower.index, self._follower.strata
        assert index is not None and strata is not None, "rank 0 holds the training data"
        consumed = int(self._args.consumed_train_samples)
        if len(self._count_Z) != self._follower.plan.n_strata:
            self._counted, self._count_Z = 0, np.zeros(self._follower.plan.n_strata, np.int64)
        new_N = index.stratum_N[self._counted : consumed]
        self._count_Z += count_strata(new_N, len(self._count_Z))
        self._counted = consumed
        return [*self._count_Z.tolist(), *strata.size_Z.tolist()]


def _named(shares: RealisedShares) -> dict[str, float]:
    plan = shares.plan
    rows = {name: d == plan.dataset_Z for d, name in enumerate(dataset_names(plan.datasets))}
    if plan.n_strata <= _MOST_STRATA:
        rows |= {
            stratum.name: np.arange(plan.n_strata) == z for z, stratum in enumerate(plan.strata)
        }
    values: dict[str, float] = {}
    for name, mask_Z in rows.items():
        values[f"plan share {name}"] = float(shares.target_share_Z[mask_Z].sum())
        values[f"drawn share {name}"] = float(shares.share_Z[mask_Z].sum())
        if size := int(shares.size_Z[mask_Z].sum()):
            values[f"epochs {name}"] = float(shares.count_Z[mask_Z].sum()) / size
    return values
