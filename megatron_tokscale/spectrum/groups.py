"""Groups of tokens, and predictors of a token's learning time that need no training.

Shapes: N tokens, V ids of tokens, B sequences, S positions.
"""

from dataclasses import dataclass

import numpy as np

from megatron_tokscale.core.arrays import Floats, Integers
from megatron_tokscale.probe import ProbeSet
from megatron_tokscale.store import WatchedTokens


@dataclass(frozen=True)
class Groups:
    """A division of the tokens into groups.

    Attributes:
        group_N: index of each token's group in `names`.
        names: names of the groups.
    """

    group_N: Integers
    names: tuple[str, ...]

    def rows(self, index_N: Integers) -> "Groups":
        """Return the groups of the tokens in `index_N`."""
        return Groups(self.group_N[index_N], self.names)


def log_frequency(tokens: WatchedTokens) -> Floats | None:
    """Return the logarithm of the count of each token's id among all labels of the probe set.

    The probe set is a small sample of held-out text, so the frequency of a rare token has a large
    error. An imported run without labels has no frequencies: None.
    """
    count_V = tokens.label_count_V
    if tokens.label_N is None or count_V is None:
        return None
    return np.asarray(np.log(count_V[tokens.label_N]))


def baseline_predictors(tokens: WatchedTokens) -> dict[str, Floats]:
    """Return predictors of the learning order that need no training, by name.

    Returns:
        unigram, bigram: logarithm of the count of the token, or of it and the token before it.
        position: logarithm of the number of tokens that it is predicted from.
        Of an imported run, those that are known: the bigram needs text.
    """
    found = {}
    if (log_count_N := log_frequency(tokens)) is not None:
        found["unigram"] = log_count_N
    if tokens.probe_set is not None:
        found["bigram"] = _log_pair_frequency(tokens.probe_set)
    if tokens.context_N is not None:
        found["position"] = np.log(tokens.context_N)
    return found


def _log_pair_frequency(tokens: ProbeSet) -> Floats:
    """Return the logarithm of the count of each token and the token before it."""
    pair_BS = tokens.tokens_BS.astype(np.int64) * tokens.vocab_size + tokens.labels_BS
    pairs, pair_count = np.unique(pair_BS, return_counts=True)
    return np.asarray(np.log(pair_count[np.searchsorted(pairs, pair_BS[tokens.mask_BS])]))


def groupings(tokens: WatchedTokens, time_N: Floats | None = None) -> dict[str, Groups]:
    """Return groupings by dataset (if there are several), and by deciles of frequency and position.

    Of an imported run, a grouping by a column that is not known is left out. If `time_N` has
    learning times, their deciles are a further grouping, in which the tokens without a learning
    time are one group.
    """
    found = {}
    if len(tokens.datasets) > 1:
        found["dataset"] = Groups(tokens.dataset_N.astype(np.int64), tokens.datasets)
    if (log_count_N := log_frequency(tokens)) is not None:
        found["frequency decile"] = deciles(log_count_N)
    if tokens.context_N is not None:
        found["position decile"] = deciles(np.log(tokens.context_N))
    if time_N is not None and np.isfinite(time_N).any():
        found["learning-time decile"] = deciles(time_N)
    return found


def deciles(value_N: Floats) -> Groups:
    """Return ten groups of about equal size by ascending value; equal values stay together.

    Tokens without a value (NaN) are a group of their own, "none".
    """
    known_N = np.isfinite(value_N)
    edges = np.unique(np.quantile(value_N[known_N], np.linspace(0, 1, 11)[1:-1]))
    group_N = np.searchsorted(edges, value_N, side="left")
    names = [str(number) for number in range(1, len(edges) + 2)]
    if not known_N.all():
        group_N[~known_N] = len(names)
        names.append("none")
    return Groups(group_N, tuple(names))
