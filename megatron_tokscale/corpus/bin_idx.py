"""A reader of Megatron's .bin/.idx files that needs no Megatron.

The format is that of megatron/core/datasets/indexed_dataset.py (header "MMIDIDX", version 1). A
*sequence* of such a file is what Megatron's GPT dataset shuffles as a "document".
"""

import struct
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Final, Self

import numpy as np
from numpy.typing import NDArray

from megatron_tokscale.core.arrays import AnyArray, Integers, Integers32
from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.corpus.names import base_name

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
"""Type of a token id by its code in the index, as Megatron's `DType`."""

_BLOCK = 1 << 22  # sequences checked at a time, so that a large index takes little memory
_GATHERED = 1 << 22  # tokens copied at a time, for the same reason

_END_TO_END: Final[dict[tuple[str, object], bool]] = {}
"""`IndexedTokens.is_end_to_end` by path and state (size, time of change) of the two files, so that
a process checks each pair once."""


@dataclass(frozen=True)
class IndexedTokens:
    """The tokens of one PREFIX.bin/.idx pair, memory-mapped.

    Attributes:
        prefix: path without .bin/.idx.
        lengths: int32 tokens per sequence.
        offsets: int64 byte offset of each sequence in the .bin file.
        dtype: type of a token id on disk.
        is_end_to_end: true if each sequence begins where the one before ends, as Megatron's own
            tools write them. Megatron reads other files too.
    """

    prefix: str
    lengths: Integers32
    offsets: Integers
    dtype: type[np.generic]
    is_end_to_end: bool = True

    @classmethod
    def open(cls, prefix: str) -> Self:
        """Open `prefix`.bin and `prefix`.idx.

        Raises:
            TokscaleError: a file is missing, unreadable, truncated, or not of this format.
        """
        index_path, data_path = Path(prefix + ".idx"), Path(prefix + ".bin")
        states = tuple(_state(path) for path in (index_path, data_path))
        raw = _map(index_path)
        n_header = len(_HEADER) + struct.calcsize("<QBQQ")
        header = raw[:n_header].tobytes()
        if len(header) < n_header or not header.startswith(_HEADER):
            raise TokscaleError(
                f"{index_path} is not a Megatron index file; give the prefix of a dataset made by "
                "Megatron's tools/preprocess_data.py"
            )
        version, code, n_sequences, n_documents = struct.unpack("<QBQQ", header[len(_HEADER) :])
        if version != 1 or code not in _DTYPES:
            raise TokscaleError(
                f"{index_path} has version {version} and type {code}; expected version 1 and a "
                f"type from {min(_DTYPES)} to {max(_DTYPES)}; make the dataset again"
            )
        if raw.size < n_header + 12 * n_sequences + 8 * n_documents:
            raise TokscaleError(f"{index_path} is truncated; make the dataset again")
        lengths = np.frombuffer(raw, np.int32, n_sequences, n_header)
        offsets = np.frombuffer(raw, np.int64, n_sequences, n_header + lengths.nbytes)
        last = np.frombuffer(raw, np.int64, n_documents, n_header + 12 * n_sequences)[-1:]
        if last.tolist() != [n_sequences]:
            raise TokscaleError(
                f"{index_path} has {n_sequences} sequences, its document indices end at "
                f"{last.tolist()}; Megatron refuses that; make the dataset again"
            )
        tokens = cls(prefix, lengths, offsets, _DTYPES[code])
        key = (str(index_path.absolute()), states)
        if key not in _END_TO_END:
            _END_TO_END[key] = _check(tokens, n_bytes=states[1][0])
        return replace(tokens, is_end_to_end=_END_TO_END[key])

    @property
    def name(self) -> str:
        """The last part of the prefix, for display."""
        return base_name(self.prefix)

    @property
    def n_sequences(self) -> int:
        """Number of sequences."""
        return int(self.lengths.size)

    @cached_property
    def n_tokens(self) -> int:
        """Number of tokens."""
        return int(self.lengths.sum(dtype=np.int64))

    @cached_property
    def _data(self) -> AnyArray:
        raw = _map(Path(self.prefix + ".bin"))
        size = np.dtype(self.dtype).itemsize
        return raw[: raw.size // size * size].view(self.dtype)

    def sequence(self, index: int) -> AnyArray:
        """Return the token ids of one sequence."""
        start = int(self.offsets[index]) // np.dtype(self.dtype).itemsize
        return self._data[start : start + int(self.lengths[index])]

    def stream(self, sequences: range) -> AnyArray:
        """Return the token ids of neighbouring sequences, one after the other.

        They are memory-mapped if the sequences lie end to end in the file, and copied if not.
        """
        if not sequences:
            return np.empty(0, self.dtype)
        itemsize = np.dtype(self.dtype).itemsize
        if not self.is_end_to_end:
            length_Q = self.lengths[sequences.start : sequences.stop].astype(np.int64)
            return self._gathered(sequences, length_Q)
        first, last = sequences[0], sequences[-1]
        stop = int(self.offsets[last]) // itemsize + int(self.lengths[last])
        return self._data[int(self.offsets[first]) // itemsize : stop]

    def _gathered(self, sequences: range, length_Q: Integers) -> AnyArray:
        end_Q = np.cumsum(length_Q)
        start_Q = self.offsets[sequences.start : sequences.stop] // np.dtype(self.dtype).itemsize
        shift_Q = start_Q - (end_Q - length_Q)  # place in the file minus place in the stream
        ids = np.empty(int(end_Q[-1]), self.dtype)
        for first in range(0, ids.size, _GATHERED):
            place = np.arange(first, min(first + _GATHERED, ids.size))
            ids[place] = self._data[place + shift_Q[np.searchsorted(end_Q, place, side="right")]]
        return ids


def _state(path: Path) -> tuple[int, int]:
    try:
        found = path.stat()
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        if isinstance(error, FileNotFoundError | NotADirectoryError):
            raise TokscaleError(
                f"{path} is not there; --data-path takes prefixes of .bin/.idx"
            ) from error
        raise _unreadable(path, error) from error
    if not path.is_file():
        raise TokscaleError(f"{path} is not a file; --data-path takes prefixes of .bin/.idx")
    if not found.st_size:
        raise TokscaleError(f"{path} is empty; make the dataset again, or leave it out")
    return found.st_size, found.st_mtime_ns


def _map(path: Path) -> NDArray[np.uint8]:
    try:
        return np.memmap(path, dtype=np.uint8, mode="r")
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> TokscaleError:
    reason = error.strerror if isinstance(error, OSError) else error
    return TokscaleError(f"{path} cannot be read: {reason}; get permission, or restore it")


def _check(tokens: IndexedTokens, n_bytes: int) -> bool:
    """Check the place of each sequence in the .bin file; return whether they lie end to end.

    Raises:
        TokscaleError: a sequence lies outside of the file, or begins between two token ids.
    """
    itemsize, is_end_to_end, end = np.dtype(tokens.dtype).itemsize, True, None
    for first in range(0, tokens.n_sequences, _BLOCK):
        length_B = tokens.lengths[first : first + _BLOCK]
        offset_B = tokens.offsets[first : first + _BLOCK]
        end_B = offset_B + length_B.astype(np.int64) * itemsize
        is_joined = end is None or int(offset_B[0]) == end
        is_joined = is_joined and bool((offset_B[1:] == end_B[:-1]).all())
        # If all lie end to end, the start of the first and the end of the last suffice.
        may_begin = offset_B[0] >= 0 and offset_B[0] % itemsize == 0
        if not (is_joined and may_begin and end_B[-1] <= n_bytes and length_B.min() >= 0):
            _refuse_place(tokens, first, end_B, n_bytes)
        is_end_to_end, end = is_end_to_end and is_joined, int(end_B[-1])
    return is_end_to_end


def _refuse_place(tokens: IndexedTokens, first: int, end_B: Integers, n_bytes: int) -> None:
    """Refuse a block of sequences, from `first` on, if one lies in an impossible place."""
    itemsize = np.dtype(tokens.dtype).itemsize
    length_B = tokens.lengths[first : first + end_B.size]
    offset_B = tokens.offsets[first : first + end_B.size]
    for is_wrong_B, what in (
        (length_B < 0, "has a negative length"),
        (offset_B < 0, "begins before the file"),
        ((end_B > n_bytes) | (end_B < offset_B), f"ends behind its {n_bytes} bytes"),
        (offset_B % itemsize != 0, f"begins between two ids of {itemsize} bytes"),
    ):
        if is_wrong_B.any():
            raise TokscaleError(
                f"sequence {first + int(np.argmax(is_wrong_B))} of {tokens.prefix}.bin {what}: the "
                f"file is shorter than its index says, or belongs to another index; make the "
                f"dataset again"
            )


@dataclass(frozen=True)
class Portion:
    """The sequences of one dataset in one part (train, valid or test) of a job's data.

    Attributes:
        tokens: the dataset.
        sequences: the range of its sequences in the part.
        weight: share of the part's samples that Megatron draws from the dataset; the weights of a
            part sum to 1.
        unique_name: name of the dataset, with a number if it has namesakes in the job.
        chosen: numbers of some of these sequences, ascending, where the others do not count; None
            for all of them.
    """

    tokens: IndexedTokens
    sequences: range
    weight: float
    unique_name: str = ""
    chosen: Integers32 | None = None

    @property
    def name(self) -> str:
        """Name that is unique among the job's datasets."""
        return self.unique_name or self.tokens.name

    @property
    def lengths(self) -> Integers32:
        """Tokens per sequence of the part, or of the chosen ones."""
        lengths = self.tokens.lengths
        if self.chosen is not None:
            return lengths[self.chosen]
        return lengths[self.sequences.start : self.sequences.stop]

    def numbers(self, places: Integers) -> Integers:
        """Return the numbers in the dataset of sequences, by their places in `lengths`."""
        if self.chosen is not None:
            return self.chosen[places].astype(np.int64)
        return self.sequences.start + places

    @property
    def n_tokens(self) -> int:
        """Tokens of the part."""
        return int(self.lengths.sum(dtype=np.int64))
