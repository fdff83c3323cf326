"""Which watched text is also in the training part, exactly: whole documents, and passages.

Both scans stream over the training part once, in bounded memory. Hashes only choose what to
compare: a document is compared by a 128-bit digest of all its tokens, a passage token by token.
Shapes: W windows, D documents, T tokens of a chunk, P passages, L their tokens, H hits.
"""

import hashlib
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_tokscale.corpus.bin_idx import IndexedTokens, Portion
from megatron_tokscale.probe.draw import Windows

PASSAGE = 64
"""Tokens of a passage, of the order of the 50 of Lee et al. 2022 (arXiv 2107.06499)."""

_DOCUMENTS = 1 << 20  # of a chunk
_TOKENS = 1 << 17
_FACTORS = (0x9E3779B1, 0x85EBCA6B, 0xC2B2AE35, 0x27D4EB2F, 0x165667B1, 0xD3A2646D)  # odd

Ids = NDArray[np.generic]
Meter = Callable[[int], None]
"""Is told how much is done."""
MakeMeter = Callable[[str, int, str], Meter]
"""Starts a report: of what, how much in all, in what unit. `progress.Progress` is one."""


@dataclass(frozen=True)
class Duplicates:
    """What of drawn windows was found in the training part.

    Attributes:
        is_whole_W: bool, the window's document is among the training documents, whole.
        is_shared_W: bool, a passage of the window is in the training part, at any place.
    """

    is_whole_W: NDArray[np.bool_]
    is_shared_W: NDArray[np.bool_]

    def __getitem__(self, chosen: NDArray[np.bool_]) -> "Duplicates":
        return Duplicates(self.is_whole_W[chosen], self.is_shared_W[chosen])

    @property
    def either_W(self) -> NDArray[np.bool_]:
        """Whether either was found."""
        return self.is_whole_W | self.is_shared_W


def find_duplicates(
    windows: Windows,
    files: Sequence[IndexedTokens],
    seq_length: int,
    training: Sequence[Portion],
    make_meter: MakeMeter,
) -> Duplicates:
    """Look for the documents of the windows and for their passages in the training part.

    Passages are cut from a window at multiples of their length.
    """
    places, place_W = np.unique(
        np.stack([windows.dataset_W, windows.document_W]), axis=1, return_inverse=True
    )
    documents = [files[dataset].sequence(document) for dataset, document in places.T]
    n_documents = sum(len(portion.sequences) for portion in training)
    meter = make_meter("duplicate documents", n_documents, "documents")
    is_whole_W = documents_in(training, documents, meter)[place_W]

    passages = [
        _passages(documents[place][start : start + seq_length + 1])
        for place, start in zip(place_W, windows.start_W, strict=True)
    ]
    n_tokens = sum(portion.n_tokens for portion in training)
    meter = make_meter("duplicate passages", n_tokens, "tokens")
    is_found_P = passages_in(training, np.concatenate(passages), meter)
    window_P = np.repeat(np.arange(len(windows)), [len(some) for some in passages])
    return Duplicates(is_whole_W, np.bincount(window_P[is_found_P], minlength=len(windows)) > 0)


def _passages(ids: Ids) -> Ids:
    return ids[: len(ids) // PASSAGE * PASSAGE].reshape(-1, PASSAGE)


def documents_in(
    training: Sequence[Portion], documents: Sequence[Ids], meter: Meter
) -> NDArray[np.bool_]:
    """Which of `documents` (token ids) occur whole among the training documents.

    `meter` is told the training documents done.
    """
    wanted: dict[bytes, list[int]] = defaultdict(list)
    for index, ids in enumerate(documents):
        wanted[_digest(ids)].append(index)
    keys = np.unique([_keys(ids, np.zeros(1, np.int64), np.array([ids.size])) for ids in documents])
    found_D = np.zeros(len(documents), np.bool_)
    done = 0
    for portion in training:
        stream, start = portion.tokens.stream(portion.sequences), 0
        for first in range(0, len(portion.sequences), _DOCUMENTS):
            length_D = portion.lengths[first : first + _DOCUMENTS].astype(np.int64)
            end_D = start + np.cumsum(length_D)
            start_D = end_D - length_D
            key_D = _keys(stream, start_D, length_D)
            for place in np.flatnonzero(_is_in(key_D, keys)):
                found_D[wanted.get(_digest(stream[start_D[place] : end_D[place]]), [])] = True
            start = int(end_D[-1])
            done += length_D.size
            meter(done)
    return found_D


def _digest(ids: Ids) -> bytes:
    return hashlib.blake2b(ids.astype(np.int32).tobytes(), digest_size=16).digest()


def _keys(
    stream: Ids, start_D: NDArray[np.int64], length_D: NDArray[np.int64]
) -> NDArray[np.uint64]:
    """A hash of the length and the first, middle and last token of each document."""
    key_D = length_D.astype(np.uint64)
    if not stream.size:
        return key_D
    for offset_D in (0, length_D // 2, length_D - 1):
        place_D = np.clip(start_D + offset_D, 0, stream.size - 1)  # of an empty document: any
        key_D = key_D * np.uint64(0x9E3779B97F4A7C15) + stream[place_D].astype(np.uint64)
    return key_D


def _is_in(key: NDArray[Any], keys: NDArray[Any]) -> NDArray[np.bool_]:
    """Whether each key is among `keys`, which ascend."""
    if not keys.size:
        return np.zeros(key.size, np.bool_)
    nearest = np.minimum(np.searchsorted(keys, key), keys.size - 1)
    is_in: NDArray[np.bool_] = keys[nearest] == key
    return is_in


def passages_in(training: Sequence[Portion], passages_PL: Ids, meter: Meter) -> NDArray[np.bool_]:
    """Which of `passages_PL` (token ids) occur in the training part, at any place.

    The end of a document is no bound: Megatron trains on documents laid end to end.
    `meter` is told the training tokens done.
    """
    found_P = np.zeros(len(passages_PL), np.bool_)
    ids_PL = passages_PL.astype(np.int32)
    wanted: dict[bytes, list[int]] = defaultdict(list)
    for index, ids in enumerate(ids_PL):
        wanted[ids.tobytes()].append(index)
    hash_P = np.unique(_hashes(ids_PL))
    bits = min(max(hash_P.size.bit_length() + 5, 20), 30)  # a table of 1 MiB stays in the cache
    shift = np.uint32(32 - bits)
    is_possible = np.zeros(1 << bits, np.bool_)
    is_possible[hash_P >> shift] = True
    done = 0
    for portion in training:
        stream = portion.tokens.stream(portion.sequences)
        for first in range(0, stream.size, _TOKENS):
            ids_T = stream[first : first + _TOKENS + PASSAGE - 1].astype(np.int32)
            hash_T = _hashes(ids_T)
            start_H = np.flatnonzero(is_possible.take(hash_T >> shift))
            start_H = start_H[_is_in(hash_T[start_H], hash_P)]
            raw, size = ids_T.tobytes(), ids_T.itemsize
            for start in start_H * size:
                found_P[wanted.get(raw[start : start + PASSAGE * size], [])] = True
            done += min(_TOKENS, stream.size - first)
            meter(done)
    return found_P


def _hashes(ids: NDArray[np.int32]) -> NDArray[np.uint32]:
    """A hash of every run of `PASSAGE` tokens along the last axis, by doubling."""
    hashes = ids.astype(np.uint32)
    for level, factor in enumerate(_FACTORS):
        width = 1 << level
        hashes = hashes[..., :-width] * np.uint32(factor) + hashes[..., width:]
    return hashes
