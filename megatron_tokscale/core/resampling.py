"""The bootstrap over documents: which tokens are drawn together, how often, and what follows.

Tokens of one document share its subject, its author and its mistakes; so whole documents are
resampled. Every document gets a Poisson(1) weight in every resample, which needs one pass over the
tokens and a matrix product (Chamandy et al. 2012, the Poisson bootstrap).

Shapes: N tokens, U units, R resamples (the first is the data as they are).
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from megatron_tokscale.core.arrays import Floats, Integers, Integers32, Mask

MOST_UNITS = 1024


@dataclass(frozen=True)
class Units:
    """What is resampled: documents, or where there are many, fixed handfuls of them.

    With more than 1,024 documents these are dealt into 1,024 units at random and whole units are
    drawn: the intervals are those of the documents, and every sum fits into a small table.

    Attributes:
        unit_N: unit of each token.
        dataset_U: dataset of each unit; no unit has documents of two.
        documents: number of documents.
    """

    unit_N: Integers32
    dataset_U: NDArray[np.int16]
    documents: int

    def __len__(self) -> int:
        return len(self.dataset_U)

    @staticmethod
    def from_documents(
        dataset_N: ArrayLike, document_N: ArrayLike, seed: int = 0, most: int = MOST_UNITS
    ) -> "Units":
        """Deal documents, which are numbered within their dataset, into at most `most` units.

        There is at least one unit per dataset.
        """
        dataset_N, document_N = np.asarray(dataset_N), np.asarray(document_N)
        key_N = dataset_N.astype(np.int64) << 32 | document_N.astype(np.int64)
        starts = np.flatnonzero(np.diff(key_N, prepend=-1))
        lengths = np.diff(starts, append=len(key_N))
        keys, document_of_run = np.unique(key_N[starts], return_inverse=True)
        dataset = (keys >> 32).astype(np.int16)
        unit, dataset_U = _deal(dataset, seed, most)
        unit_N = np.repeat(unit[document_of_run].astype(np.int32), lengths)
        return Units(unit_N, dataset_U, len(keys))

    def weights(self, n_resamples: int, seed: int = 0) -> Floats:
        """weight_RU: a row of ones, then `n_resamples` rows of Poisson(1) weights, none all zero.

        Of a single unit nothing can be resampled: its rows are NaN, and so are all intervals.
        """
        if len(self) < 2:
            return np.concatenate([np.ones((1, 1)), np.full((n_resamples, 1), np.nan)])
        rng = np.random.default_rng(seed)
        drawn_RU = rng.poisson(1.0, (n_resamples, len(self)))
        while (empty_R := ~drawn_RU.any(axis=1)).any():
            drawn_RU[empty_R] = rng.poisson(1.0, (int(empty_R.sum()), len(self)))
        return np.concatenate([np.ones((1, len(self))), drawn_RU])

    def half(self, seed: int = 0) -> Mask:
        """A random half of the units of each dataset, as a mask over units."""
        rank_U = np.random.default_rng([seed, 1]).permutation(len(self))
        half_U = np.zeros(len(self), bool)
        for dataset in np.unique(self.dataset_U):
            of_dataset = np.flatnonzero(self.dataset_U == dataset)
            order = of_dataset[np.argsort(rank_U[of_dataset])]
            half_U[order[::2]] = True
        return half_U


def _deal(dataset_J: NDArray[np.int16], seed: int, most: int) -> tuple[Integers, NDArray[np.int16]]:
    """Unit of every document (J), and the dataset of every unit."""
    if len(dataset_J) <= most:
        return np.arange(len(dataset_J)), dataset_J
    rng = np.random.default_rng([seed, 2])
    unit_J = np.empty(len(dataset_J), np.int64)
    dataset_U: list[int] = []
    for dataset in np.unique(dataset_J):
        of_dataset = np.flatnonzero(dataset_J == dataset)
        share = round(most * len(of_dataset) / len(dataset_J))
        count = min(max(share, 1), len(of_dataset))
        unit_J[of_dataset] = rng.permutation(len(of_dataset)) % count + len(dataset_U)
        dataset_U += [dataset] * count
    return unit_J, np.array(dataset_U, np.int16)


def percentile_interval(value: float, value_R: ArrayLike) -> tuple[float, float]:
    """Return the 95% percentiles of a number's resamples; NaN if these do not surround the number.

    Resamples that all lie on one side of the number they are of tell of a bias, not of an error.
    """
    low, high = np.quantile(np.asarray(value_R, dtype=np.float64), [0.025, 0.975]).tolist()
    return (low, high) if low <= value <= high else (float("nan"), float("nan"))
