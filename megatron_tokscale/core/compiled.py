"""Compilation of inner loops by numba, and the cache of the compiled code."""

import hashlib
import pickle
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Final, cast

from numba import njit

from megatron_tokscale import __version__

try:
    from numba.core.caching import FunctionCache, IndexDataCacheFile
except ImportError:  # private names of numba: without them no compiled code is cached
    FunctionCache = IndexDataCacheFile = object

_DIGEST = 32  # bytes of a SHA-256

EXACT: Final[dict[str, str | bool]] = {"nogil": True, "error_model": "numpy"}
"""Options for loops whose results must be the same to the bit on every machine."""

FAST: Final[dict[str, str | bool | set[str]]] = {
    **EXACT,
    "fastmath": {"reassoc", "contract", "nsz", "nnan", "ninf"},
}
"""Options for loops whose sums may be taken in any order. Quotients stay those of IEEE 754: what
`arcp` and `afn` would put in their place is an estimate that differs between makes of processor."""


def compiled[R](**options: str | bool | set[str]) -> Callable[[Callable[..., R]], Callable[..., R]]:
    """Return the decorator that compiles a function with these options of `numba.njit`.

    The compiled function takes what numba can compile it for, also where that is wider than its
    annotations: numpy scalars for numbers, arrays of another memory layout.

    Numba's cache keeps the compiled code. Where the cache does not work, be it a read-only install
    without a home, a full disk, a damaged file or another numba, the function is compiled again.
    """

    def decorate(function: Callable[..., R]) -> Callable[..., R]:
        dispatcher = njit(**options)(function)
        with suppress(Exception):
            cache = _Cache(function)
            if hasattr(dispatcher, "_cache"):
                dispatcher._cache = cache
        return cast("Callable[..., R]", dispatcher)

    return decorate


class _Cache(FunctionCache):  # type: ignore[misc]
    """Numba's cache of a function's compiled code; an entry that fails to load or save is skipped.

    The objects that numba passes through it are numba's own, and are not inspected.
    """

    def __init__(self, function: Callable[..., object]) -> None:
        super().__init__(function)
        self._cache_file = _SealedFiles(
            cache_path=self._impl.locator.get_cache_path(),
            filename_base=self._impl.filename_base,
            source_stamp=(self._impl.locator.get_source_stamp(), _called(function), __version__),
        )

    def load_overload(self, *key: object) -> object:
        with suppress(Exception):
            return super().load_overload(*key)
        return None

    def save_overload(self, *key_and_code: object) -> None:
        with suppress(Exception):
            super().save_overload(*key_and_code)


def _called(function: Callable[..., object]) -> list[tuple[int, int]]:
    """Return time of change and size of this file and of those with functions that it can call.

    Numba looks at the function's own file alone, and runs old code after a change of the options
    above, or of a compiled function that another file defines.
    """
    compiled_ = (each for each in function.__globals__.values() if hasattr(each, "py_func"))
    files = {__file__, *(each.py_func.__code__.co_filename for each in compiled_)}
    stats = [Path(file).stat() for file in sorted(files)]
    return [(stat.st_mtime_ns, stat.st_size) for stat in stats]


class _SealedFiles(IndexDataCacheFile):  # type: ignore[misc]
    """Numba's index and data files, each behind a checksum; one with a wrong checksum is ignored.

    Numba alone unpickles any file it finds, and runs code in which a byte is flipped. Processes
    that compile at once may also give one name to two entries, so an entry holds its key.
    """

    def save(self, key: object, data: object) -> None:
        super().save(key, (key, data))

    def load(self, key: object) -> object:
        found, data = super().load(key) or (None, None)
        return data if found == key else None

    def _load_index(self) -> object:
        index = _unsealed(self._index_path) or (None, None, {})
        version, stamp, overloads = cast("tuple[object, object, object]", index)
        is_fresh = (version, stamp) == (self._version, self._source_stamp)
        return overloads if is_fresh else {}

    def _save_index(self, overloads: object) -> None:
        self._seal(self._index_path, (self._version, self._source_stamp, overloads))

    def _load_data(self, name: str) -> object:
        return _unsealed(self._data_path(name))

    def _save_data(self, name: str, data: object) -> None:
        self._seal(self._data_path(name), data)

    def _seal(self, path: str, content: object) -> None:
        body = self._dump(content)
        with self._open_for_write(path) as file:
            file.write(hashlib.sha256(body).digest() + body)


def _unsealed(path: str) -> object:
    """Return the content of a file behind its checksum; None if it cannot be used."""
    with suppress(Exception):  # a file of another numba may need classes that this one lacks
        sealed = Path(path).read_bytes()
        if hashlib.sha256(sealed[_DIGEST:]).digest() == sealed[:_DIGEST]:
            return cast("object", pickle.loads(sealed[_DIGEST:]))
    return None
