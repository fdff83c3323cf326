"""The metrics of a probe for the log: mean losses, bits per byte, what fell, states of tokens.

Shapes: N watched tokens, D datasets of the probe set, V values of one probe.
"""

import math
from collections.abc import Sequence
from typing import Final, Protocol

import numpy as np

from megatron_tokscale.core.arrays import Floats, Floats32
from megatron_tokscale.probe import ProbeSet
from megatron_tokscale.store.progress import Progress, by_group
from megatron_tokscale.store.token_state import TokenState

_LOGGED_STATES: Final = (TokenState.UNDER_WAY, TokenState.FORGOTTEN)


class Detokenizer(Protocol):
    """The part of Megatron's tokenizers that turns ids into text."""

    def detokenize(self, ids: list[int], /) -> str:
        """Return the text of token ids."""


class Metrics:
    """Computes a probe's metrics on the rank that has its losses, and names them on every rank.

    The metrics are V values in one array: the mean loss (nats) over all tokens and per dataset, the
    same in bits per byte of text, the share of tokens that fell by more than a threshold since the
    last probe, the fall of the mean loss in the last octave (nats) over all tokens and per dataset,
    the shares of tokens that are under way and forgotten (`store.progress`), and the number of
    tokens without a finite loss, in all and per dataset. Means are over the tokens whose loss is
    finite, shares and falls over those whose losses are finite at all probes that they compare.
    Bits per byte are unknown where a token's loss is not finite, as its bytes are unknown too. An
    unknown value is NaN and is not logged; nor is a count of 0 tokens.
    """

    def __init__(
        self,
        probe_set: ProbeSet,
        fall_threshold: float,
        tokenizer: Detokenizer | None = None,
        names: Sequence[str] | None = None,
    ):
        """Count the bytes of the tokens' text.

        Args:
            probe_set: the watched tokens.
            fall_threshold: least fall that is counted, in nats.
            tokenizer: turns ids into text (Megatron's `detokenize`), if there is a text.
            names: names of the D datasets; by default the probe set's names.
        """
        self._probe_set = probe_set
        self._threshold = fall_threshold
        self._bytes_D = bytes_per_dataset(probe_set, tokenizer)
        datasets = [""] + [f"/{name}" for name in names or probe_set.datasets]
        self._names = [
            *(f"probe loss{dataset}" for dataset in datasets),
            *(f"probe bits per byte{dataset}" for dataset in datasets),
            f"share of tokens fallen by {fall_threshold:g} nats",
            *(f"nats learned in the last octave{dataset}" for dataset in datasets),
            *(f"share of tokens {state.label}" for state in _LOGGED_STATES),
        ]
        self._count_names = [f"tokens without finite loss{dataset}" for dataset in datasets]

    @property
    def n_values(self) -> int:
        """Number of values V."""
        return len(self._names) + len(self._count_names)

    def measure(
        self, loss_N: Floats32, previous_N: Floats32 | None, progress: Progress | None = None
    ) -> Floats:
        """Return the V values of a probe.

        Args:
            loss_N: its losses in nats.
            previous_N: losses of the previous probe; None without one.
            progress: states of the tokens at the probe; None before they can be told.
        """
        dataset_N = self._probe_set.dataset_N
        n_datasets = len(self._probe_set.datasets)
        finite_N = np.isfinite(loss_N)
        nats_D = np.bincount(
            dataset_N, np.where(finite_N, loss_N, 0).astype(np.float64), n_datasets
        )
        count_D = np.bincount(dataset_N[finite_N], minlength=n_datasets)
        lost_D = np.bincount(dataset_N[~finite_N], minlength=n_datasets)
        nats = np.array([nats_D.sum(), *nats_D])
        count = np.array([count_D.sum(), *count_D])
        lost = np.array([lost_D.sum(), *lost_D])
        n_bytes = np.array([self._bytes_D.sum(), *self._bytes_D])
        n_bytes[lost > 0] = math.nan
        fallen = math.nan
        if previous_N is not None:
            both_N = finite_N & np.isfinite(previous_N)
            n_fallen = np.count_nonzero((previous_N[both_N] - loss_N[both_N]) > self._threshold)
            fallen = n_fallen / both_N.sum() if both_N.any() else math.nan
        with np.errstate(divide="ignore", invalid="ignore"):
            means = [*(nats / count), *(nats / math.log(2) / n_bytes)]
        return np.array([*means, fallen, *self._of_progress(progress), *lost])

    def _of_progress(self, progress: Progress | None) -> list[float]:
        """Return the falls in the last octave, in all and per dataset, and the shares of states."""
        n_datasets = len(self._probe_set.datasets)
        if progress is None:
            return [math.nan] * (1 + n_datasets + len(_LOGGED_STATES))
        groups = by_group(progress, self._probe_set.dataset_N, n_datasets)
        shares = [groups[0].share.get(state, math.nan) for state in _LOGGED_STATES]
        return [*(group.fall for group in groups), *shares]

    def named(self, values_V: Floats) -> dict[str, float]:
        """Return the known values by name."""
        known = zip(self._names, values_V.tolist(), strict=False)
        counts = zip(self._count_names, values_V[len(self._names) :].tolist(), strict=True)
        return {name: value for name, value in known if not math.isnan(value)} | {
            name: value for name, value in counts if value > 0
        }


def bytes_per_dataset(probe_set: ProbeSet, tokenizer: Detokenizer | None) -> Floats:
    """Return the UTF-8 bytes of the watched tokens' text, by dataset; NaN if there is no text.

    Each sequence is taken with the token before it, less that token's own text, so that a space
    stripped at the start of a text does not count. Characters cut by the ends of a sequence make
    it exact to some bytes per sequence.
    """
    n_bytes_D = np.zeros(len(probe_set.datasets))
    for row in range(probe_set.n_sequences):
        context = [int(probe_set.tokens_BS[row, 0])]
        watched = probe_set.labels_BS[row][probe_set.mask_BS[row]].tolist()
        n_bytes = _text_bytes(tokenizer, context + watched) - _text_bytes(tokenizer, context)
        if math.isnan(n_bytes):
            return np.full_like(n_bytes_D, np.nan)
        n_bytes_D[probe_set.dataset_BS[row, 0]] += n_bytes
    return n_bytes_D


def _text_bytes(tokenizer: Detokenizer | None, ids: list[int]) -> float:
    """Return the UTF-8 bytes of a text; NaN where the tokenizer gives none."""
    if tokenizer is None:
        return math.nan
    try:
        text = tokenizer.detokenize(ids)
    except Exception:  # a tokenizer may raise any error, and a metric must not stop a training job
        return math.nan
    return len(text.encode("utf-8", errors="replace")) if isinstance(text, str) else math.nan
