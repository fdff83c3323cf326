"""The rounds of `data/permutation.py`, compiled; loaded with the first image, not at import."""

import numpy as np
from numpy.typing import NDArray

from megatron_tokscale.core.compiled import EXACT, compiled

_compiled = compiled(**EXACT)

_MULTIPLIER1 = np.uint64(0xBF58476D1CE4E5B9)  # splitmix64's, as in permutation.py
_MULTIPLIER2 = np.uint64(0x94D049BB133111EB)
_HALF = np.uint64(32)  # bits: the upper half of a product is mixed into the lower


@_compiled
def walk(
    size: int, round_keys: NDArray[np.uint64], left_bits: int, right_bits: int, position: int
) -> int:
    """Return the image of a position in range(size)."""
    shift = np.uint64(right_bits)
    mask = (np.uint64(1) << shift) - np.uint64(1)
    left_shift, right_shift = np.uint64(64 - left_bits), np.uint64(64 - right_bits)
    image = np.uint64(position)
    while True:
        left, right = image >> shift, image & mask
        for i in range(0, round_keys.size, 2):
            mixed = (right ^ round_keys[i]) * _MULTIPLIER1
            left ^= ((mixed ^ (mixed >> _HALF)) * _MULTIPLIER2) >> left_shift
            mixed = (left ^ round_keys[i + 1]) * _MULTIPLIER1
            right ^= ((mixed ^ (mixed >> _HALF)) * _MULTIPLIER2) >> right_shift
        image = left << shift | right
        if image < np.uint64(size):
            return int(image)


@_compiled
def walk_back(
    size: int, round_keys: NDArray[np.uint64], left_bits: int, right_bits: int, image: int
) -> int:
    """Return the position in range(size) whose image is `image`: `walk`, round by round back."""
    shift = np.uint64(right_bits)
    mask = (np.uint64(1) << shift) - np.uint64(1)
    left_shift, right_shift = np.uint64(64 - left_bits), np.uint64(64 - right_bits)
    position = np.uint64(image)
    while True:
        left, right = position >> shift, position & mask
        for i in range(round_keys.size - 2, -1, -2):
            mixed = (left ^ round_keys[i + 1]) * _MULTIPLIER1
            right ^= ((mixed ^ (mixed >> _HALF)) * _MULTIPLIER2) >> right_shift
            mixed = (right ^ round_keys[i]) * _MULTIPLIER1
            left ^= ((mixed ^ (mixed >> _HALF)) * _MULTIPLIER2) >> left_shift
        position = left << shift | right
        if position < np.uint64(size):
            return int(position)


@_compiled
def walk_many(
    size: int,
    round_keys: NDArray[np.uint64],
    left_bits: int,
    right_bits: int,
    positions: NDArray[np.int64],
) -> None:
    """Replace positions by their images."""
    for i in range(positions.size):
        positions[i] = walk(size, round_keys, left_bits, right_bits, positions[i])
