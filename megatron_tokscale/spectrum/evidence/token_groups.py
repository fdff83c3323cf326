"""Groups of tokens that every test of single tokens must beat: datasets, and frequencies in each.

Shapes: N tokens, D datasets.
"""

from typing import Final

import numpy as np

from megatron_tokscale.core.arrays import Floats, Integers, Integers16
from megatron_tokscale.spectrum.groups import Groups, log_frequency
from megatron_tokscale.store import WatchedTokens

_FREQUENCIES: Final = 10  # groups by frequency in a dataset
_LEAST_TOKENS: Final = 50
"""Tokens of a group on average. A token is part of its group's mean curve; in a group of 50 its own
share is 2% (our choice)."""


def token_groups(tokens: WatchedTokens) -> Groups:
    """Return the groups of `groups_by_frequency` for the watched tokens."""
    return groups_by_frequency(tokens.dataset_N, log_frequency(tokens))


def groups_by_frequency(
    dataset_N: Integers | Integers16, log_frequency_N: Floats | None = None
) -> Groups:
    """Return groups of tokens of one dataset and of about one frequency of their label.

    A world without steps can give each group a curve of its own: rare tokens are learned later. A
    test of single tokens therefore compares each token with its group.

    Args:
        dataset_N: dataset of each token.
        log_frequency_N: logarithm of the frequency of each label; None if labels are not known:
            the groups are then the datasets.

    Returns:
        Ten quantiles of frequency in each dataset; fewer in a dataset of fewer than 500 tokens.
    """
    group_N = np.zeros(len(dataset_N), np.int64)
    names: list[str] = []
    for dataset in np.unique(dataset_N):
        inside = np.flatnonzero(dataset_N == dataset)
        part_N = _quantiles(inside, log_frequency_N)
        group_N[inside] = part_N + len(names)
        names += [f"dataset {dataset}, frequency {part + 1}" for part in range(part_N.max() + 1)]
    return Groups(group_N, tuple(names))


def _quantiles(inside: Integers, log_frequency_N: Floats | None) -> Integers:
    """Return the quantile of each token of a dataset; equal frequencies stay together."""
    count = min(max(len(inside) // _LEAST_TOKENS, 1), _FREQUENCIES)
    if log_frequency_N is None or count == 1:
        return np.zeros(len(inside), np.int64)
    value_N = log_frequency_N[inside]
    edges = np.quantile(value_N, np.linspace(0, 1, count + 1)[1:-1])
    return np.unique(np.searchsorted(edges, value_N, side="left"), return_inverse=True)[1]
