"""Groups of tokens, and what is known of a token without having trained on it.

Shapes: N tokens.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_tokscale.fit import FitStatus, SigmoidFits, TokenClass
from megatron_tokscale.probe import ProbeSet
from megatron_tokscale.spectrum.density import Array

_DECILES = 10


@dataclass(frozen=True)
class Groups:
    """A division of the tokens: `group_N` is an index into `names`."""

    group_N: NDArray[np.int64]
    names: tuple[str, ...]

    def rows(self, index_N: NDArray[np.int64]) -> "Groups":
        """The groups of some of the tokens."""
        return Groups(self.group_N[index_N], self.names)


def plain_predictors(tokens: ProbeSet) -> dict[str, Array]:
    """What might order tokens without any learning time: logarithms of frequencies, position.

    Frequencies are counted in the probe set's own sequences: held-out text of the same kind as the
    training data, but little of it, so a rare token's frequency is known badly.

    Returns:
        unigram and bigram: ln of how often the token, or it and the one before it, are there.
        position: ln of the number of tokens that it is predicted from.
    """
    before_N = tokens.tokens_BS[tokens.mask_BS].astype(np.int64)
    label_N = tokens.label_N.astype(np.int64)
    all_before, all_labels = (
        ids.ravel().astype(np.int64) for ids in (tokens.tokens_BS, tokens.labels_BS)
    )
    count = np.bincount(all_labels, minlength=tokens.vocab_size)
    pairs, pair_count = np.unique(all_before * tokens.vocab_size + all_labels, return_counts=True)
    pair_N = np.searchsorted(pairs, before_N * tokens.vocab_size + label_N)
    return {
        "unigram": np.log(count[label_N]),
        "bigram": np.log(pair_count[pair_N]),
        "position": np.log(tokens.context_N),
    }


def learning_times(fits: SigmoidFits) -> Array:
    """One learning time per token that falls: the midpoint of its one sigmoid, in x; else NaN.

    For two-step tokens too: it is when half of the fall is done. Their single steps are learning
    events of the spectrum, but the smaller of them is often noise: on the demo's runs the order of
    the one sigmoids agrees between seeds with a rank correlation of 0.94, that of the drop-weighted
    mean of the events with 0.87.
    """
    falls = fits.is_class(TokenClass.FALLING, TokenClass.TWO_STEP) & (fits.drop_N > 0)
    trusted = np.isin(fits.status_N, (FitStatus.CONVERGED, FitStatus.TOO_FEW_POINTS))
    return np.where(falls & trusted & fits.complete_N, fits.midpoint_N.astype(np.float64), np.nan)


def groupings(tokens: ProbeSet, time_N: Array | None = None) -> dict[str, Groups]:
    """The tokens by dataset (if there are several), by decile of frequency and of position.

    `time_N` adds deciles of these learning times, and a group of the tokens that have none.
    """
    plain = plain_predictors(tokens)
    found = {
        "frequency decile": deciles(plain["unigram"]),
        "position decile": deciles(plain["position"]),
    }
    if len(tokens.domains) > 1:
        domains = Groups(tokens.domain_N.astype(np.int64), tokens.domains)
        found = {"dataset": domains} | found
    if time_N is not None:
        found["learning-time decile"] = deciles(time_N)
    return found


def deciles(value_N: Array) -> Groups:
    """Ten groups of about as many tokens by ascending value; equal values stay together."""
    known_N = np.isfinite(value_N)
    edges = np.unique(np.quantile(value_N[known_N], np.linspace(0, 1, _DECILES + 1)[1:-1]))
    group_N = np.searchsorted(edges, value_N, side="left")
    names = [str(number) for number in range(1, len(edges) + 2)]
    if not known_N.all():
        group_N[~known_N] = len(names)
        names.append("none")
    return Groups(group_N, tuple(names))
