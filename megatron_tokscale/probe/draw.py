"""The draw of the windows of documents that are watched, at random with a fixed seed.

Shapes: D documents of a part, W windows.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal, Self

import numpy as np

from megatron_tokscale.core.arrays import Integers, Integers32, Mask
from megatron_tokscale.corpus.bin_idx import Portion

Unit = Literal["tokens", "sequences"]


@dataclass(frozen=True)
class Windows:
    """Stretches of documents, each to become a sequence of the probe set.

    Attributes:
        dataset_W: int64 index of the dataset.
        document_W: int64 index of the document in its dataset.
        start_W: int64 first token, a multiple of the sequence length.
        n_labels_W: int64 number of tokens to predict: all but the first, at most a sequence.
    """

    dataset_W: Integers
    document_W: Integers
    start_W: Integers
    n_labels_W: Integers

    def __len__(self) -> int:
        return self.dataset_W.size

    def __getitem__(self, chosen: slice | Mask | Integers) -> "Windows":
        return Windows(*(getattr(self, field.name)[chosen] for field in fields(self)))

    @classmethod
    def concatenate(cls, parts: Sequence["Windows"]) -> Self:
        """Join the windows of all parts, in order."""
        names = [field.name for field in fields(cls)]
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))

    def file_order(self) -> Integers:
        """Return the indices that sort the windows by dataset, document and start."""
        return np.lexsort((self.start_W, self.document_W, self.dataset_W))

    def size_W(self, unit: Unit) -> Integers:
        """Return the size of each window in `unit`: its number of labels, or 1."""
        return self.n_labels_W if unit == "tokens" else np.ones(len(self), np.int64)


def available(portion: Portion, seq_length: int, unit: Unit) -> int:
    """Return the number of labels or windows in a part of a dataset."""
    if unit == "tokens":
        return int(np.maximum(portion.lengths.astype(np.int64) - 1, 0).sum())
    return int(_n_windows(portion.lengths, seq_length).sum())


def draw(
    portion: Portion, dataset: int, seq_length: int, quota: int, unit: Unit, seed: int
) -> Windows:
    """Draw windows of a part of a dataset at random, until they hold `quota` or all are drawn.

    Documents are cut at multiples of the sequence length, so a window is the same whatever else is
    drawn, and the order is the same whatever the quota. Memory: 8 bytes a document and 8 a window.
    """
    lengths_D = portion.lengths
    end_D = np.cumsum(_n_windows(lengths_D, seq_length))
    n_windows = int(end_D[-1]) if end_D.size else 0
    order = np.random.default_rng([seed, dataset]).permutation(n_windows)
    window_W = order[:quota]  # each window holds at least one label
    index_W = np.searchsorted(end_D, window_W, side="right")
    length_W = lengths_D[index_W].astype(np.int64)
    start_W = (window_W - end_D[index_W] + _n_windows(length_W, seq_length)) * seq_length
    windows = Windows(
        np.full(window_W.size, dataset),
        portion.numbers(index_W),
        start_W,
        np.minimum(seq_length, length_W - 1 - start_W),
    )
    return windows[: count_until(windows.size_W(unit), quota)]


def count_until(size_W: Integers, quota: int) -> int:
    """Return the number of windows that hold `quota`; one more than all if all hold less."""
    return int(np.searchsorted(np.cumsum(size_W), quota)) + 1


def _n_windows(lengths: Integers32 | Integers, seq_length: int) -> Integers:
    """Return the windows per document: sequences of its tokens except the first."""
    counts: Integers = -(-(lengths.astype(np.int64) - 1) // seq_length)
    return np.maximum(counts, 0, out=counts)


def quotas(total: int, shares: Sequence[float]) -> list[int]:
    """Divide `total` in proportion to `shares`, into whole numbers that sum to it."""
    bounds = np.rint(total * np.cumsum([0.0, *shares]) / sum(shares)).astype(np.int64)
    return [int(quota) for quota in np.diff(bounds)]
