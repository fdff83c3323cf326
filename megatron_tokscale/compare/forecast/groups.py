"""Classes of context, in which the nats to come are counted.

Shapes: N watched tokens, B sequences, S positions.
"""

import numpy as np

from megatron_tokscale.core.arrays import Mask
from megatron_tokscale.probe import ProbeSet
from megatron_tokscale.spectrum.groups import Groups, groupings
from megatron_tokscale.store import WatchedTokens


def context_classes(tokens: WatchedTokens) -> dict[str, Groups]:
    """Return the groupings of the watched tokens whose columns are known, by name.

    Returns:
        those of `groupings`, with the dataset even if there is only one; and with text "label
        before": the label occurred before in its context, or it did not.
    """
    found = {"dataset": Groups(tokens.dataset_N.astype(np.int64), tokens.datasets)}
    found |= groupings(tokens)
    if tokens.probe_set is not None:
        seen_N = label_before(tokens.probe_set)
        found["label before"] = Groups(seen_N.astype(np.int64), ("no", "yes"))
    return found


def label_before(tokens: ProbeSet) -> Mask:
    """Return a mask of the watched tokens whose label is among the tokens of their context, (N,).

    The context of a label is its sequence up to it, as far as `context_N` counts.
    """
    rows = zip(tokens.tokens_BS, tokens.labels_BS, strict=True)
    first_BS = np.stack([_first_places(token_S, label_S) for token_S, label_S in rows])
    seen_BS = first_BS <= np.arange(first_BS.shape[1])
    return np.asarray(seen_BS[tokens.mask_BS])


def _first_places(token_S: np.ndarray, label_S: np.ndarray) -> np.ndarray:
    """Return where each label first is among the tokens of its sequence; its length if nowhere."""
    ids, first = np.unique(token_S, return_index=True)
    at_S = np.minimum(np.searchsorted(ids, label_S), len(ids) - 1)
    return np.where(ids[at_S] == label_S, first[at_S], len(token_S))


def missing_columns(tokens: WatchedTokens) -> tuple[str, ...]:
    """Return a sentence for each column that is not known, on what is left out without it."""
    found = []
    if tokens.probe_set is None and tokens.datasets == ("all",):
        found.append("datasets are not known: all tokens are one dataset")
    if tokens.label_N is None:
        found.append(
            "labels are not known: no classes by frequency, and the unigram phase is not left out"
        )
    if tokens.context_N is None:
        found.append("positions are not known: no classes by position")
    if tokens.probe_set is None:
        found.append("there is no text: no classes by whether the label occurred before")
    return tuple(found)
