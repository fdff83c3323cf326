"""What a plan has really drawn so far, beside what it meant to.

Shapes: D datasets, Z strata.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from megatron_tokscale.data.plan import Plan


@dataclass(frozen=True, eq=False)
class RealisedShares:
    """State of a plan after `n_samples` consumed samples.

    Attributes:
        n_samples: consumed samples.
        count_Z: samples drawn from each stratum.
        size_Z: samples of each stratum in one epoch.
    """

    plan: Plan
    n_samples: int
    count_Z: NDArray[np.int64]
    size_Z: NDArray[np.int64]

    @property
    def share_Z(self) -> NDArray[np.float64]:
        """Realised share of each stratum; zero before the first sample."""
        return self.count_Z / max(self.n_samples, 1)

    @cached_property
    def target_Z(self) -> NDArray[np.float64]:
        """Samples due from each stratum by the plan's weights; not whole."""
        return self.plan.target_Z(self.n_samples)

    @property
    def target_share_Z(self) -> NDArray[np.float64]:
        """The plan's share of each stratum so far; zero before the first sample."""
        return self.target_Z / max(self.n_samples, 1)

    @property
    def epochs_Z(self) -> NDArray[np.float64]:
        """Times each stratum was gone through."""
        return self.count_Z / np.maximum(self.size_Z, 1)

    def by_dataset(self, value_Z: NDArray[np.float64]) -> NDArray[np.float64]:
        """Sums over the strata of each dataset."""
        n_datasets = len(self.plan.datasets)
        return np.bincount(self.plan.dataset_Z, value_Z, minlength=n_datasets)
