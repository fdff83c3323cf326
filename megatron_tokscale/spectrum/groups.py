"""Groups of tokens, and what is known of a token without having trained on it.

Shapes: N tokens.
"""

from dataclasses import dataclass

import numpy as np

from megatron_tokscale.core.arrays import Floats, Integers
from megatron_tokscale.fit import SigmoidFits, TokenClass
from megatron_tokscale.probe import ProbeSet

_DECILES = 10


@dataclass(frozen=True)
class Groups:
    """A division of the tokens: `group_N` is an index into `names`."""

    group_N: Integers
    names: tuple[str, ...]

    def rows(self, index_N: Integers) -> "Groups":
        """The groups of some of the tokens."""
        return Groups(self.group_N[index_N], self.names)


def log_frequency(tokens: ProbeSet) -> Floats:
    """ln of how often each token's id is among all labels of the probe set.

    That is held-out text of the same kind as the training data, but little of it: a rare token's
    frequency is known badly.
    """
    count = np.bincount(tokens.labels_BS.ravel(), minlength=tokens.vocab_size)
    return np.asarray(np.log(count[tokens.label_N]))


def plain_predictors(tokens: ProbeSet) -> dict[str, Floats]:
    """What might order tokens without any learning time: logarithms of frequencies, position.

    Returns:
        unigram and bigram: ln of how often the token, or it and the one before it, are there.
        position: ln of the number of tokens that it is predicted from.
    """
    pair_BS = tokens.tokens_BS.astype(np.int64) * tokens.vocab_size + tokens.labels_BS
    pairs, pair_count = np.unique(pair_BS, return_counts=True)
    pair_N = np.searchsorted(pairs, pair_BS[tokens.mask_BS])
    return {
        "unigram": log_frequency(tokens),
        "bigram": np.log(pair_count[pair_N]),
        "position": np.log(tokens.context_N),
    }


def learning_times(fits: SigmoidFits) -> Floats:
    """One learning time per token that falls: the midpoint of its one sigmoid, in x; else NaN.

    For two-step tokens too: it is when half of the fall is done. Their single steps are learning
    events of the spectrum, but the smaller of them is often noise: on the demo's runs the order of
    the one sigmoids agrees between seeds with a rank correlation of 0.94, that of the drop-weighted
    mean of the events with 0.87.
    """
    falls = fits.is_class(TokenClass.FALLING, TokenClass.TWO_STEP) & (fits.drop_N > 0)
    known_N = falls & fits.trusted_N & fits.complete_N
    return np.where(known_N, fits.midpoint_N.astype(np.float64), np.nan)


def groupings(tokens: ProbeSet, time_N: Floats | None = None) -> dict[str, Groups]:
    """The tokens by dataset (if there are several), by decile of frequency and of position.

    `time_N` adds deciles of these learning times, if there are any, and a group of the tokens that
    have none.
    """
    found = {
        "frequency decile": deciles(log_frequency(tokens)),
        "position decile": deciles(np.log(tokens.context_N)),
    }
    if len(tokens.datasets) > 1:
        datasets = Groups(tokens.dataset_N.astype(np.int64), tokens.datasets)
        found = {"dataset": datasets} | found
    if time_N is not None and np.isfinite(time_N).any():
        found["learning-time decile"] = deciles(time_N)
    return found


def deciles(value_N: Floats) -> Groups:
    """Ten groups of about as many tokens by ascending value; equal values stay together."""
    known_N = np.isfinite(value_N)
    edges = np.unique(np.quantile(value_N[known_N], np.linspace(0, 1, _DECILES + 1)[1:-1]))
    group_N = np.searchsorted(edges, value_N, side="left")
    names = [str(number) for number in range(1, len(edges) + 2)]
    if not known_N.all():
        group_N[~known_N] = len(names)
        names.append("none")
    return Groups(group_N, tuple(names))
