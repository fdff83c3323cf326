"""A keyed permutation of range(n) in closed form: the order of a stratum's samples in one epoch.

A stored permutation costs 4 to 8 bytes per sample and epoch, and its shuffle depends on how many
epochs are built at once. A closed form costs no memory, can be evaluated at any point, and is the
same however long the job runs.

It is a Feistel network on the smallest power of two that holds n (the two halves differ by at most
one bit, and take turns to be changed by a keyed hash of the other), walked along its cycle until
it comes back into range(n), which keeps it a bijection: Black and Rogaway, "Ciphers with arbitrary
finite domains" (2002). The number of rounds and the hash (splitmix64's multipliers) are our
choice: the permutation must mix well, not keep secrets. `data/feistel.py` is the compiled part.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from typing import Final

import numpy as np
from numpy.typing import NDArray

from megatron_tokscale.core.arrays import Integers

_MASK64: Final = (1 << 64) - 1
_GOLDEN: Final = 0x9E3779B97F4A7C15  # 2^64 over the golden ratio, splitmix64's increment
_MULTIPLIER1: Final = 0xBF58476D1CE4E5B9  # splitmix64's, like the next constant
_MULTIPLIER2: Final = 0x94D049BB133111EB
ROUNDS: Final = 6  # of the network; our choice. Another number is another order of samples


def _mix64(value: int) -> int:
    """Return the finalizer of splitmix64 (Steele, Lea and Flood 2014)."""
    value = ((value ^ (value >> 30)) * _MULTIPLIER1) & _MASK64
    value = ((value ^ (value >> 27)) * _MULTIPLIER2) & _MASK64
    return value ^ (value >> 31)


def stratum_key(seed: int, name: str) -> int:
    """Return the 64-bit key of a stratum, from the plan's seed and the stratum's name."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return int.from_bytes(digest[:8], "little")


@lru_cache(maxsize=4096)
def epoch_permutation(size: int, key: int, epoch: int) -> "Permutation":
    """Return the permutation of range(`size`) for an epoch of the stratum with this key."""
    return Permutation(size, _mix64((key + epoch * _GOLDEN) & _MASK64))


@dataclass(frozen=True)
class Permutation:
    """A bijection of range(`size`) onto itself, one for each 64-bit `key`; `size` is at least 1."""

    size: int
    key: int

    @cached_property
    def _bits(self) -> tuple[int, int]:
        """Number of bits of the left and the right half, at least one each."""
        bits = max(2, (self.size - 1).bit_length())
        return bits // 2, bits - bits // 2

    @cached_property
    def _round_keys(self) -> NDArray[np.uint64]:
        keys = [_mix64((self.key + i * _GOLDEN) & _MASK64) for i in range(1, ROUNDS + 1)]
        return np.array(keys, dtype=np.uint64)

    def __call__(self, position: int) -> int:
        """Return the image of `position`."""
        return self.image(position)

    def many(self, positions: NDArray[np.integer]) -> Integers:
        """Return the images of an array of positions."""
        from megatron_tokscale.data.feistel import walk_many

        images = np.asarray(positions).astype(np.int64)
        walk_many(self.size, self._round_keys, *self._bits, images)
        return images

    @cached_property
    def image(self) -> Callable[[int], int]:
        """Compiled function that returns the image of a position; it runs once per sample."""
        from megatron_tokscale.data.feistel import walk

        return partial(walk, self.size, self._round_keys, *self._bits)

    def positions(self, images: NDArray[np.integer]) -> Integers:
        """Return the positions of an array of images: the inverse of `many`."""
        from megatron_tokscale.data.feistel import walk_back

        keys, bits = self._round_keys, self._bits
        found = [walk_back(self.size, keys, *bits, image) for image in np.asarray(images).tolist()]
        return np.array(found, np.int64)
