"""Planned and drawn shares of the training data, logged beside Megatron's own lines.

Shapes: D datasets, Z strata.
"""

from argparse import Namespace
from typing import Final

import numpy as np
import torch
from megatron.training import print_rank_last

from megatron_tokscale.data import RealisedShares, dataset_names
from megatron_tokscale.data.index import count_strata
from megatron_tokscale.training.data.follower import Follower
from megatron_tokscale.training.events import JobPart, TrainingState
from megatron_tokscale.training.ranks import sum_over_ranks
from megatron_tokscale.training.scalars import log_scalars

_MOST_STRATA: Final = 64
"""With more strata than this, scalars are logged for the datasets only. Our choice: nobody reads
more than three curves for each of 64 strata."""


class PlanMonitor(JobPart):
    """Counts samples on rank 0, which holds data, and logs on the last rank. All ranks hold one."""

    def __init__(self, follower: Follower, args: Namespace) -> None:
        self._follower, self._log_interval = follower, int(args.log_interval)
        self._counted = 0
        self._count_Z = np.zeros(follower.plan.n_strata, np.int64)

    def on_step(self, state: TrainingState) -> None:
        """Log the shares, at the steps at which Megatron logs."""
        step, consumed = state.step, state.consumed_samples
        if step % self._log_interval:
            return
        n_strata = self._follower.plan.n_strata
        is_first = torch.distributed.get_rank() == 0
        values = self._count(consumed) if is_first else [0.0] * (2 * n_strata)
        count_Z, size_Z = np.array(sum_over_ranks(*values)).reshape(2, n_strata)
        shares = RealisedShares(
            self._follower.plan, consumed, count_Z.astype(np.int64), size_Z.astype(np.int64)
        )
        # The size of a dataset that the job no longer has is unknown.
        epochs_Z = np.where(shares.size_Z > 0, shares.epochs_Z, 0.0)
        worst = int(np.argmax(epochs_Z))
        off_D = shares.by_dataset(shares.count_Z - shares.target_Z)
        print_rank_last(
            f" tokscale plan at step {step} | samples off the plan by dataset: "
            f"{np.abs(off_D).max():.2f} at most | epochs: {epochs_Z[worst]:.3f} at most "
            f"({shares.plan.strata[worst].name})"
        )
        log_scalars(named_shares(shares), step, consumed)

    def _count(self, consumed: int) -> list[float]:
        """Return the samples drawn so far by stratum, then the samples of one epoch."""
        planned, n_strata = self._follower.planned, self._follower.plan.n_strata
        assert planned is not None, "rank 0 holds the training data"
        if len(self._count_Z) != n_strata:
            self._counted, self._count_Z = 0, np.zeros(n_strata, np.int64)
        new_N = planned.index.stratum_N[self._counted : consumed]
        self._count_Z += count_strata(new_N, n_strata)
        self._counted = consumed
        return [*self._count_Z.tolist(), *planned.strata.size_Z.tolist()]


def named_shares(shares: RealisedShares) -> dict[str, float]:
    """Return the planned and the drawn share of each dataset and stratum, and its epochs."""
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
