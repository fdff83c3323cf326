"""What a plan has really drawn so far, beside what it meant to.

Shapes: Z strata.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_tokscale.data.index import Index, count_strata
from megatron_tokscale.data.plan import Plan


@dataclass(frozen=True, eq=False)
class RealisedShares:
    """State of a plan after `n_samples` consumed samples.

    Attributes:
        n_samples: consumed samples.
        count_Z: samples drawn from each stratum.
        target_Z: samples due from each stratum by the plan's weights; not whole.
        epochs_Z: times each stratum was gone through.
    """

    n_samples: int
    count_Z: NDArray[np.int64]
    target_Z: NDArray[np.float64]
    epochs_Z: NDArray[np.float64]

    @property
    def share_Z(self) -> NDArray[np.float64]:
        """Realised share of each stratum; zero before the first sample."""
        return self.count_Z / max(self.n_samples, 1)


def realised_shares(
    plan: Plan, index: Index, n_samples: int, stratum_sizes: Sequence[int]
) -> RealisedShares:
    """Count the first `n_samples` of the index; `stratum_sizes` are samples per epoch."""
    count_Z = count_strata(index.stratum_N[:n_samples], plan.n_strata)
    epochs_Z = count_Z / np.maximum(np.array(stratum_sizes), 1)
    return RealisedShares(n_samples, count_Z, plan.target_Z(n_samples), epochs_Z)
