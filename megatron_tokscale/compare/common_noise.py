"""The noise that all tokens of a checkpoint share, as far as the fitter leaves it in the losses.

Resamples of documents do not have it: a checkpoint at which A is a little lucky is so in all
documents. It moves the mean losses of both runs, and with them the time at which one reaches a loss
of the other. So each resample gets a draw of it too.

Shapes: N compared tokens, K probe steps, D datasets, G groups, B draws, R resamples (the first is
the data as they are).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Self

import numpy as np

from megatron_tokscale.core.arrays import Floats
from megatron_tokscale.fit.common_shifts import draw_left_over
from megatron_tokscale.fit.summary import DatasetShifts
from megatron_tokscale.spectrum.groups import Groups

_DRAWS: Final = 12
"""Draws that are fitted again, 8 ms each at 60 probes (our choice); the noise of a resample is a
random sum of them, and has their covariance."""


@dataclass(frozen=True)
class LeftOver:
    """Common noise that is left in the losses of one run.

    Attributes:
        datasets: the compared tokens by dataset.
        left_RDK: nats by resample, dataset and probe; 0 in the first row.
    """

    datasets: Groups
    left_RDK: Floats

    @classmethod
    def draw(
        cls,
        datasets: Groups,
        x_K: Floats,
        mean_DK: Floats,
        shifts: Sequence[DatasetShifts] | None,
        n_resamples: int,
        rng: np.random.Generator,
    ) -> Self:
        """Draw it for a run.

        Args:
            datasets: the compared tokens by dataset.
            x_K: x of the run's probes in its fit.
            mean_DK: mean losses without the shifts; NaN for a dataset without tokens.
            shifts: the shifts of each dataset in the fit; None if it knows none.
            n_resamples: resamples beside the data as they are.
            rng: source of the noise.
        """
        left_RDK = np.zeros((1 + n_resamples, *mean_DK.shape))
        if shifts is not None and any(each.shared for each in shifts):
            left_BDK = draw_left_over(x_K, np.nan_to_num(mean_DK), shifts, _DRAWS, rng)
            weight_RDB = rng.standard_normal((n_resamples, len(mean_DK), _DRAWS))
            left_RDK[1:] = np.einsum("rdb,bdk->rdk", weight_RDB, left_BDK) / np.sqrt(_DRAWS)
        return cls(datasets, left_RDK)

    def of_groups(self, groups: Groups) -> Floats:
        """Return the noise in the mean losses of groups, (R, G, K)."""
        shape = (len(groups.names), len(self.datasets.names))
        cell_N = groups.group_N.astype(np.int64) * shape[1] + self.datasets.group_N
        tokens_GD = np.bincount(cell_N, minlength=shape[0] * shape[1]).reshape(shape)
        share_GD = tokens_GD / np.maximum(tokens_GD.sum(axis=1, keepdims=True), 1)
        return np.asarray(share_GD @ self.left_RDK)
