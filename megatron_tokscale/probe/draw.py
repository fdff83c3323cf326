"""Which windows of which documents are watched: drawn at random, with a fixed seed.

Shapes: D documents of a part, W windows.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from megatron_tokscale.corpus.bin_idx import Portion

Unit = Literal["tokens", "sequences"]


@dataclass(frozen=True)
class Windows:
    """Stretches of documents, each to become a sequence of the probe set.

    Attributes:
        dataset_W: int64 index of the dataset.
        document_W: int64 index of the document in its dataset.
        start_W: int64 first token, a multiple of the sequence length.
        n_labels_W: int64 number of tokens to predict: those behind the first, at most a sequence.
    """

    dataset_W: NDArray[np.int64]
    document_W: NDArray[np.int64]
    start_W: NDArray[np.int64]
    n_labels_W: NDArray[np.int64]

    def __len__(self) -> int:
        return self.dataset_W.size

    def __getitem__(self, chosen: slice | NDArray[np.bool_] | NDArray[np.int64]) -> "Windows":
        return Windows(*(getattr(self, field.name)[chosen] for field in fields(self)))

    @staticmethod
    def concatenate(parts: Sequence["Windows"]) -> "Windows":
        """One after the other."""
        names = [field.name for field in fields(Windows)]
        return Windows(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))

    def file_order(self) -> NDArray[np.int64]:
        """The indices of the windows by dataset, document and start."""
        return np.lexsort((self.start_W, self.document_W, self.dataset_W))

    def size_W(self, unit: Unit) -> NDArray[np.int64]:
        """What each window counts for: its labels, or 1."""
        return self.n_labels_W if unit == "tokens" else np.ones(len(self), np.int64)


def available(portion: Portion, seq_length: int, unit: Unit) -> int:
    """Labels or windows that a part of a dataset has."""
    if unit == "tokens":
        return int(np.maximum(portion.lengths.astype(np.int64) - 1, 0).sum())
    return int(_n_windows(portion.lengths, seq_length).sum())


def draw(
    portion: Portion, dataset: int, seq_length: int, quota: int, unit: Unit, seed: int
) -> Windows:
    """Windows of a part of a dataset at random, until they hold `quota` or there are no more.

    Documents are cut at multiples of the sequence length, so a window is the same whatever else is
    drawn, and the order is the same whatever the quota. Memory: 8 bytes a document and 8 a window.
    """
    lengths_D = portion.lengths
    end_D = np.cumsum(_n_windows(lengths_D, seq_length))
    n_windows = int(end_D[-1]) if end_D.size else 0
    order = np.random.default_rng([seed, dataset]).permutation(n_windows)
    window_W = order[:quota]  # each holds a label at least
    index_W = np.searchsorted(end_D, window_W, side="right")
    length_W = lengths_D[index_W].astype(np.int64)
    start_W = (window_W - end_D[index_W] + _n_windows(length_W, seq_length)) * seq_length
    windows = Windows(
        np.full(window_W.size, dataset),
        portion.sequences.start + index_W,
        start_W,
        np.minimum(seq_length, length_W - 1 - start_W),
    )
    return windows[: until(windows.size_W(unit), quota)]


def until(size_W: NDArray[np.int64], quota: int) -> int:
    """How many windows it takes until they hold `quota`, or more than there are."""
    return int(np.searchsorted(np.cumsum(size_W), quota)) + 1


def _n_windows(
    lengths: NDArray[np.int32] | NDArray[np.int64], seq_length: int
) -> NDArray[np.int64]:
    """Windows per document: its tokens but the first, by sequences, the last one not full."""
    counts: NDArray[np.int64] = -(-(lengths.astype(np.int64) - 1) // seq_length)
    return np.maximum(counts, 0, out=counts)


def quotas(total: int, shares: Sequence[float]) -> list[int]:
    """Divide `total` in proportion to `shares`: whole numbers that sum to it."""
    bounds = np.rint(total * np.cumsum([0.0, *shares]) / sum(shares)).astype(np.int64)
    return [int(quota) for quota in np.diff(bounds)]
