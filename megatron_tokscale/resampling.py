"""The bootstrap over documents: which tokens are drawn together, how often, and what follows.

Tokens of one document share its subject, its author and its mistakes; so whole documents are
resampled. Every document gets a Poisson(1) weight in every resample, which needs one pass over the
tokens and a matrix product (Chamandy et al. 2012, the Poisson bootstrap).

Shapes: N tokens, U units, R resamples (the first is the data as they are).
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]
MOST_UNITS = 1024


@dataclass(frozen=True)
class Units:
    """What is resampled: documents, or where there are many, fixed handfuls of them.

    With more than 1,024 documents these are dealt into 1,024 units at random and whole units are
    drawn: the intervals are those of the documents, and every sum fits into a small table.

    Attributes:
        unit_N: unit of each token.
        domain_U: dataset of each unit; no unit has documents of two.
        documents: number of documents.
    """

    unit_N: NDArray[np.int32]
    domain_U: NDArray[np.int16]
    documents: int

    def __len__(self) -> int:
        return len(self.domain_U)

    @staticmethod
    def of(
        domain_N: ArrayLike, document_N: ArrayLike, seed: int = 0, most: int = MOST_UNITS
    ) -> "Units":
        """Deal documents, which are numbered within their dataset, into at most `most` units.

        There is at least one unit per dataset.
        """
        domain_N, document_N = np.asarray(domain_N), np.asarray(document_N)
        key_N = domain_N.astype(np.int64) << 32 | document_N.astype(np.int64)
        starts = np.flatnonzero(np.diff(key_N, prepend=-1))
        lengths = np.diff(starts, append=len(key_N))
        keys, document_of_run = np.unique(key_N[starts], return_inverse=True)
        domain = (keys >> 32).astype(np.int16)
        unit, domain_U = _deal(domain, seed, most)
        unit_N = np.repeat(unit[document_of_run].astype(np.int32), lengths)
        return Units(unit_N, domain_U, len(keys))

    def weights(self, n_resamples: int, seed: int = 0) -> Array:
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

    def half(self, seed: int = 0) -> NDArray[np.bool_]:
        """A random half of the units of each dataset, as a mask over units."""
        rank_U = np.random.default_rng([seed, 1]).permutation(len(self))
        half_U = np.zeros(len(self), bool)
        for domain in np.unique(self.domain_U):
            of_domain = np.flatnonzero(self.domain_U == domain)
            order = of_domain[np.argsort(rank_U[of_domain])]
            half_U[order[::2]] = True
        return half_U


def _deal(
    domain_J: NDArray[np.int16], seed: int, most: int
) -> tuple[NDArray[np.int64], NDArray[np.int16]]:
    """Unit of every document (J), and the dataset of every unit."""
    if len(domain_J) <= most:
        return np.arange(len(domain_J)), domain_J
    rng = np.random.default_rng([seed, 2])
    unit_J = np.empty(len(domain_J), np.int64)
    domain_U: list[int] = []
    for domain in np.unique(domain_J):
        of_domain = np.flatnonzero(domain_J == domain)
        share = round(most * len(of_domain) / len(domain_J))
        count = min(max(share, 1), len(of_domain))
        unit_J[of_domain] = rng.permutation(len(of_domain)) % count + len(domain_U)
        domain_U += [domain] * count
    return unit_J, np.array(domain_U, np.int16)


@dataclass(frozen=True)
class Estimate:
    """A number and its 95% interval over documents; NaN where it is not defined."""

    value: float
    low: float
    high: float

    @staticmethod
    def of(value_R: ArrayLike) -> "Estimate":
        """The first value, and the percentiles of the others, moved by twice their bias.

        A score such as R^2 is worse on few documents than on many, for the noise in what it is held
        against; resamples are worse by as much again, which tells the bias: value less median.
        Percentiles alone would move with it, the wrong way. The interval is for what many documents
        would give and need not hold the value (our choice; measured coverage:
        benchmarks/results/evidence.md).
        """
        value, *drawn = np.asarray(value_R, dtype=np.float64)
        drawn_R = np.array(drawn)[np.isfinite(drawn)]
        if not np.isfinite(value) or len(drawn_R) < max(len(drawn) // 2, 2):
            return Estimate(float(value), float("nan"), float("nan"))
        shift = 2 * (value - np.median(drawn_R))
        low, high = np.quantile(drawn_R, [0.025, 0.975], method="weibull") + shift
        return Estimate(float(value), float(low), float(high))

    def at_most(self, most: float) -> "Estimate":
        """The same with an interval cut at what is possible."""
        return Estimate(self.value, self.low, min(self.high, most))

    def entry(self, name: str) -> dict[str, float | list[float] | None]:
        """As JSON: NAME and NAME_interval, null where not defined."""
        known = np.isfinite([self.value, self.low, self.high])
        return {
            name: self.value if known[0] else None,
            f"{name}_interval": [self.low, self.high] if known[1:].all() else None,
        }
