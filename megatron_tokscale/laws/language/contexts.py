"""Mean losses by length of context: the number of tokens that a token is predicted from.

Shapes: N tokens, M of them in a bin, S bins, C clusters, R bootstrap resamples.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Self

import numpy as np
from numpy.typing import ArrayLike
from scipy.sparse import csr_array

from megatron_tokscale.core.arrays import Floats, Integers, Mask
from megatron_tokscale.core.errors import UndefinedError
from megatron_tokscale.core.resampling import random_weights

EDGES = tuple(np.unique(np.geomspace(1, 65, 16).round()).tolist())
"""Default edges of the bins, from 1 to 64 tokens evenly in logarithm; our choice: losses of longer
contexts converge late."""


@dataclass(frozen=True)
class ContextBins:
    """Bins of tokens by length of context.

    Attributes:
        context_S: geometric mean of the context lengths in each bin.
        bin_N: bin of each token; -1 for a token outside of all bins.
    """

    context_S: Floats
    bin_N: Integers

    @classmethod
    def from_contexts(cls, context_N: ArrayLike, *, edges: ArrayLike | None = None) -> Self:
        """Return the bins of tokens; a bin contains its lower edge.

        Args:
            context_N: context length of each token; 0 leaves a token out.
            edges: ascending edges of the bins; `EDGES` by default.

        Raises:
            UndefinedError: no token has a context in the bins.
        """
        context = np.asarray(context_N, dtype=np.float64)
        edge = np.asarray(EDGES if edges is None else edges, dtype=np.float64)
        bin_N = np.searchsorted(edge, context, side="right") - 1
        bin_N[(bin_N == len(edge) - 1) | (context < 1)] = -1
        used, compact_M = np.unique(bin_N[bin_N >= 0], return_inverse=True)
        if not len(used):
            raise UndefinedError(
                f"no token is predicted from {edge[0]:g} to {edge[-1]:g} tokens; give other edges"
            )
        log_context_M = np.log(context[bin_N >= 0])
        bin_N[bin_N >= 0] = compact_M
        return cls(np.exp(np.bincount(compact_M, log_context_M) / np.bincount(compact_M)), bin_N)

    @cached_property
    def _kept_N(self) -> Mask:
        return self.bin_N >= 0

    def mean(self, loss_N: ArrayLike) -> Floats:
        """Return the mean loss of each bin, in nats."""
        bin_M = self.bin_N[self._kept_N]
        total_S = np.bincount(bin_M, np.asarray(loss_N, dtype=np.float64)[self._kept_N])
        return np.asarray(total_S / np.bincount(bin_M))

    def resample(
        self,
        loss_N: ArrayLike,
        *,
        cluster_N: ArrayLike | None = None,
        n_resamples: int,
        seed: int,
    ) -> Floats:
        """Return mean losses loss_RS of bootstrap resamples of clusters, by default of tokens.

        Random weights with mean one replace drawing with replacement (`core.resampling`). If a
        resample has no token in a bin, the mean loss of the bin is NaN; a single cluster cannot be
        resampled, and all its means are NaN.

        Args:
            loss_N: losses in nats.
            cluster_N: resampling cluster of each token: its sample or document.
            n_resamples: number of resamples R.
            seed: seed of the resampling.
        """
        bin_M = self.bin_N[self._kept_N]
        loss_M = np.asarray(loss_N, dtype=np.float64)[self._kept_N]
        cluster = np.arange(len(self.bin_N)) if cluster_N is None else np.asarray(cluster_N)
        names, cluster_M = np.unique(cluster[self._kept_N], return_inverse=True)
        shape = (len(names), len(self.context_S))
        total_CS = csr_array((loss_M, (cluster_M, bin_M)), shape=shape)
        count_CS = csr_array((np.ones(len(loss_M)), (cluster_M, bin_M)), shape=shape)
        if len(names) < 2:
            return np.full((n_resamples, len(self.context_S)), np.nan)
        rng = np.random.default_rng(seed)
        rows = []
        for _ in range(n_resamples):
            weight_C = random_weights(len(names), 1, rng)[0]
            with np.errstate(invalid="ignore"):
                rows.append((weight_C @ total_CS) / (weight_C @ count_CS))
        return np.stack(rows)
