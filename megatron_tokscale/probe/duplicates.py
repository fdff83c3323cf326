"""An exact search for watched text in the training part: whole documents, and passages.

Both scans stream over the training part once, in bounded memory. Hashes only select the candidates:
a document is compared by a 128-bit digest of all its tokens, a passage token by token.
Shapes: W windows, D documents, T tokens of a chunk, P passages, L their tokens, H hits.
"""

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_tokscale.core.arrays import AnyArray, Integers, Integers32, Mask
from megatron_tokscale.core.progress import Meter, Progress
from megatron_tokscale.corpus.bin_idx import IndexedTokens, Portion
from megatron_tokscale.probe.draw import Windows

PASSAGE = 64
"""Tokens of a passage: near the 50 of Lee et al. 2022 (arXiv 2107.06499), and a power of two, so
that a passage is hashed by doubling."""

_DOCUMENTS = 1 << 20  # training documents hashed at a time: 8 MB per array
_TOKENS = 1 << 17  # training tokens hashed at a time: their hashes stay in the CPU's cache
_FACTORS = (0x9E3779B1, 0x85EBCA6B, 0xC2B2AE35, 0x27D4EB2F, 0x165667B1, 0xD3A2646D)
"""Odd factors of the hash, one per doubling, with well-mixed bits."""
_KEY_FACTOR = np.uint64(0x9E3779B97F4A7C15)  # 2^64 over the golden ratio, odd

Ids = AnyArray


@dataclass(frozen=True)
class Duplicates:
    """Masks of the drawn windows that were found in the training part.

    Attributes:
        is_whole_W: true if the window's whole document is one of the training documents.
        is_shared_W: true if a passage of the window is in the training part, at any place.
    """

    is_whole_W: Mask
    is_shared_W: Mask

    def __getitem__(self, chosen: Mask) -> "Duplicates":
        return Duplicates(self.is_whole_W[chosen], self.is_shared_W[chosen])

    @property
    def either_W(self) -> Mask:
        """Mask of the windows whose document or passage was found."""
        return self.is_whole_W | self.is_shared_W


def find_duplicates(
    windows: Windows,
    files: Sequence[IndexedTokens],
    seq_length: int,
    training: Sequence[Portion],
    progress: Progress,
) -> Duplicates:
    """Search the training part for the documents of the windows and for their passages.

    Passages are cut from a window at multiples of their length.
    """
    places, place_W = np.unique(
        np.stack([windows.dataset_W, windows.document_W]), axis=1, return_inverse=True
    )
    documents = [files[dataset].sequence(document) for dataset, document in places.T]
    n_documents = sum(len(portion.sequences) for portion in training)
    meter = progress.meter("duplicate documents", n_documents, "documents")
    is_whole_W = documents_in(training, documents, meter)[place_W]

    passages = [
        _passages(documents[place][start : start + seq_length + 1])
        for place, start in zip(place_W, windows.start_W, strict=True)
    ]
    n_tokens = sum(portion.n_tokens for portion in training)
    meter = progress.meter("duplicate passages", n_tokens, "tokens")
    is_found_P = passages_in(training, np.concatenate(passages), meter)
    window_P = np.repeat(np.arange(len(windows)), [len(some) for some in passages])
    return Duplicates(is_whole_W, np.bincount(window_P[is_found_P], minlength=len(windows)) > 0)


def _passages(ids: Ids) -> Ids:
    return ids[: len(ids) // PASSAGE * PASSAGE].reshape(-1, PASSAGE)


def documents_in(training: Sequence[Portion], documents: Sequence[Ids], meter: Meter) -> Mask:
    """Return a mask of the `documents` (token ids) that are whole among the training documents.

    `meter` is called with the number of training documents searched so far.
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


def _keys(stream: Ids, start_D: Integers, length_D: Integers) -> NDArray[np.uint64]:
    """Return a hash of the length and the first, middle and last token of each document."""
    key_D = length_D.astype(np.uint64)
    if not stream.size:
        return key_D
    for offset_D in (0, length_D // 2, length_D - 1):
        place_D = np.clip(start_D + offset_D, 0, stream.size - 1)  # an empty one has any hash
        key_D = key_D * _KEY_FACTOR + stream[place_D].astype(np.uint64)
    return key_D


def _is_in[Key: (np.uint32, np.uint64)](key: NDArray[Key], keys: NDArray[Key]) -> Mask:
    """Return a mask of the keys that are among `keys`, which ascend."""
    if not keys.size:
        return np.zeros(key.size, np.bool_)
    nearest = np.minimum(np.searchsorted(keys, key), keys.size - 1)
    is_in: Mask = keys[nearest] == key
    return is_in


def passages_in(training: Sequence[Portion], passages_PL: Ids, meter: Meter) -> Mask:
    """Return a mask of the `passages_PL` (token ids) that are in the training part, at any place.

    A passage may span two documents: Megatron trains on documents laid end to end. `meter` is
    called with the number of training tokens searched so far.
    """
    found_P = np.zeros(len(passages_PL), np.bool_)
    ids_PL = passages_PL.astype(np.int32)
    wanted: dict[bytes, list[int]] = defaultdict(list)
    for index, ids in enumerate(ids_PL):
        wanted[ids.tobytes()].append(index)
    hash_P = np.unique(_hashes(ids_PL))
    # A table of the hashes' leading bits: 32 entries per passage, so that few of the others match;
    # 1 MiB at least, which stays in the CPU's cache, and 1 GiB at most.
    bits = min(max(hash_P.size.bit_length() + 5, 20), 30)
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


def _hashes(ids: Integers32) -> NDArray[np.uint32]:
    """Return a hash of every run of `PASSAGE` tokens along the last axis, by doubling."""
    hashes = ids.astype(np.uint32)
    for level, factor in enumerate(_FACTORS):
        width = 1 << level
        hashes = hashes[..., :-width] * np.uint32(factor) + hashes[..., width:]
    return hashes
