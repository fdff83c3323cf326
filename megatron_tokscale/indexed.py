"""Reading Megatron's .bin/.idx files without Megatron.

The format is that of megatron/core/datasets/indexed_dataset.py (header "MMIDIDX", version 1). A
*sequence* of such a file is what Megatron's GPT dataset shuffles as a "document".
"""

import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_tokscale.errors import TokscaleError
from megatron_tokscale.files import read_json

PARTS = ("train", "valid", "test")
type DataPath = Sequence[str] | Mapping[str, Sequence[str]]
"""Megatron's --data-path words, or, of per-split arguments, those of each part that has any."""

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

    def stream(self, sequences: range) -> NDArray[np.generic]:
        """The token ids of neighbouring sequences, which the format stores end to end."""
        if not sequences:
            return np.empty(0, self.dtype)
        start = int(self.offsets[sequences[0]]) // np.dtype(self.dtype).itemsize
        n_tokens = int(self.lengths[sequences.start : sequences.stop].sum(dtype=np.int64))
        return self._data[start : start + n_tokens]


@dataclass(frozen=True)
class Portion:
    """What one dataset gives to one part (train, valid or test) of a job's data.

    Attributes:
        tokens: the dataset.
        sequences: which of its sequences belong to the part.
        weight: share of the part's samples that Megatron draws from here; these sum to 1.
    """

    tokens: IndexedTokens
    sequences: range
    weight: float

    @property
    def lengths(self) -> NDArray[np.int32]:
        """Tokens per sequence of the part."""
        return self.tokens.lengths[self.sequences.start : self.sequences.stop]

    @property
    def n_tokens(self) -> int:
        """Tokens of the part."""
        return int(self.lengths.sum(dtype=np.int64))


def open_part(data_path: DataPath, split: str | None, part: str) -> list[Portion]:
    """Open what a job takes for one part of its data, dataset by dataset.

    Args:
        data_path: --data-path words, or those of each part (per-split arguments).
        split: Megatron's --split; None with per-split arguments, where a part is the whole of its
            own datasets.
        part: train, valid or test.

    Raises:
        TokscaleError: a file is missing or damaged, the part has no datasets, or the words and
            the split cannot be read or do not go together.
    """
    per_split = isinstance(data_path, Mapping)
    if per_split == (split is not None):
        raise TokscaleError(
            "--data-path needs the job's --split; per-split data have none, as each part is the "
            "whole of its own datasets"
        )
    words = data_path.get(part) if isinstance(data_path, Mapping) else data_path
    if not words:
        flag = f"--{part}-data-path" if per_split else "--data-path"
        raise TokscaleError(f"the job has no data for its {part} part; give {flag}")
    prefixes, weights = parse_data_path(words)
    files = [IndexedTokens.open(prefix) for prefix in prefixes]
    ranges = [
        range(file.n_sequences) if split is None else split_range(split, part, file.n_sequences)
        for file in files
    ]
    if weights is None:
        sizes = [Portion(*pair, 0.0).n_tokens for pair in zip(files, ranges, strict=True)]
        weights = [size / max(sum(sizes), 1) for size in sizes]
    return [Portion(*triple) for triple in zip(files, ranges, weights, strict=True)]


def read_data_args(path: Path) -> list[str]:
    """The --data-path words in the file of Megatron's --data-args-path.

    Raises:
        TokscaleError: the file cannot be read, or is empty.
    """
    try:
        words = path.read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        raise TokscaleError(f"--data-args-path: cannot read {path}: {error}") from error
    if not words:
        raise TokscaleError(f"--data-args-path: {path} is empty; it holds --data-path words")
    return words


def read_per_split_data_args(path: Path) -> dict[str, list[str]]:
    """The --data-path words of each part in the file of Megatron's --per-split-data-args-path.

    The file is a JSON object with "train", "valid" and "test", each a list of words or one string
    of them, or null for a part without data.

    Raises:
        TokscaleError: the file cannot be read, or is not of this form.
    """
    content = read_json(path)
    words: dict[str, list[str]] = {}
    for part in PARTS:
        value = content.get(part, 0)
        if not isinstance(value, str | list | None):
            raise TokscaleError(
                f"--per-split-data-args-path: {path} must give a list of words, a string of them "
                f'or null as "{part}"'
            )
        items = value.split() if isinstance(value, str) else value or []
        words[part] = [str(item).strip() for item in items]
    return words


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
