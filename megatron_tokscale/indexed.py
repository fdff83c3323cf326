"""Reading Megatron's .bin/.idx files without Megatron.

The format is that of megatron/core/datasets/indexed_dataset.py (header "MMIDIDX", version 1). A
*sequence* of such a file is what Megatron's GPT dataset shuffles as a "document".
"""

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_tokscale.errors import TokscaleError

PARTS = ("train", "valid", "test")
_HEADER = b"MMIDIDX\x00\x00"
_DTYPES: dict[int, type[np.generic]] = {
    1: np.uint8,
    2: np.int8,
    3: np.int16,
    4: np.int32,
    5: np.int64,
    6: np.float64,
    7: np.float32,
    8: np.uint16,
}


@dataclass(frozen=True)
class IndexedTokens:
    """The tokens of one PREFIX.bin/.idx pair, memory-mapped.

    Attributes:
        prefix: path without .bin/.idx.
        lengths: int32 tokens per sequence.
        offsets: int64 byte offset of each sequence in the .bin file.
        dtype: type of a token id on disk.
    """

    prefix: str
    lengths: NDArray[np.int32]
    offsets: NDArray[np.int64]
    dtype: type[np.generic]

    @staticmethod
    def open(prefix: str) -> "IndexedTokens":
        """Open `prefix`.bin and `prefix`.idx.

        Raises:
            TokscaleError: a file is missing, truncated, or not of this format.
        """
        index_path, data_path = Path(prefix + ".idx"), Path(prefix + ".bin")
        for path in (index_path, data_path):
            if not path.is_file():
                raise TokscaleError(f"{path} is not there; --data-path takes prefixes of .bin/.idx")
        raw = np.memmap(index_path, dtype=np.uint8, mode="r")
        n_header = len(_HEADER) + struct.calcsize("<QBQQ")
        header = raw[:n_header].tobytes()
        if len(header) < n_header or not header.startswith(_HEADER):
            raise TokscaleError(f"{index_path} is not a Megatron index file")
        version, code, n_sequences, _ = struct.unpack("<QBQQ", header[len(_HEADER) :])
        if version != 1 or code not in _DTYPES:
            raise TokscaleError(f"{index_path} has an unknown version {version} or type {code}")
        if raw.size < n_header + 12 * n_sequences:
            raise TokscaleError(f"{index_path} is truncated; make the dataset again")
        lengths = np.frombuffer(raw, np.int32, n_sequences, n_header)
        offsets = np.frombuffer(raw, np.int64, n_sequences, n_header + lengths.nbytes)
        tokens = IndexedTokens(prefix, lengths, offsets, _DTYPES[code])
        if data_path.stat().st_size < tokens.n_tokens * np.dtype(tokens.dtype).itemsize:
            raise TokscaleError(f"{data_path} is shorter than its index says; make it again")
        return tokens

    @property
    def name(self) -> str:
        """The last part of the prefix, by which plans and probe sets know the dataset."""
        return Path(self.prefix).name

    @property
    def n_sequences(self) -> int:
        """Number of sequences."""
        return int(self.lengths.size)

    @cached_property
    def n_tokens(self) -> int:
        """Number of tokens."""
        return int(self.lengths.sum(dtype=np.int64))

    @cached_property
    def _data(self) -> NDArray[np.generic]:
        return np.memmap(self.prefix + ".bin", dtype=self.dtype, mode="r")

    def sequence(self, index: int) -> NDArray[np.generic]:
        """The token ids of one sequence."""
        start = int(self.offsets[index]) // np.dtype(self.dtype).itemsize
        return self._data[start : start + int(self.lengths[index])]


def parse_data_path(words: Sequence[str]) -> tuple[list[str], list[float] | None]:
    """Read Megatron's --data-path: `PREFIX ...` or `WEIGHT PREFIX WEIGHT PREFIX ...`.

    Returns:
        Prefixes, and their weights, summing to 1. No weights (None) mean to Megatron that every
        dataset is read once per epoch, that is, in proportion to its size.

    Raises:
        TokscaleError: a weight is negative, or they sum to nothing.
    """
    if len(words) % 2 == 1 or not all(_is_number(word) for word in words[::2]):
        return list(words), None
    weights = [float(word) for word in words[::2]]
    if min(weights) < 0 or not 0 < sum(weights) < math.inf:
        raise TokscaleError(f"--data-path {' '.join(words)}: weights must be positive numbers")
    return list(words[1::2]), [weight / sum(weights) for weight in weights]


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def split_range(split: str, part: str, n_sequences: int) -> range:
    """Sequences of the `part` (train, valid or test) under Megatron's --split, e.g. "969,30,1".

    Raises:
        TokscaleError: the split cannot be read.
    """
    try:
        shares = [float(share) for share in split.replace("/", ",").split(",")]
    except ValueError as error:
        raise TokscaleError(f"--split {split}: give up to three numbers like 969,30,1") from error
    shares += [0.0] * (3 - len(shares))
    if len(shares) != 3 or min(shares) < 0 or sum(shares) <= 0:
        raise TokscaleError(f"--split {split}: give up to three numbers like 969,30,1")
    bounds = list(accumulate((share / sum(shares) for share in shares), initial=0.0))
    index = PARTS.index(part)
    return range(round(bounds[index] * n_sequences), round(bounds[index + 1] * n_sequences))
