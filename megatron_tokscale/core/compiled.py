"""Compilation of inner loops by numba, and the cache of the compiled code."""

import hashlib
import pickle
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from numba import njit

from megatron_tokscale import __version__

try:
    from numba.core.caching import FunctionCache, IndexDataCacheFile
except ImportError:  # private names of numba: without them nothing is kept
    FunctionCache = IndexDataCacheFile = object

_DIGEST = 32

EXACT: Final[dict[str, Any]] = {"nogil": True, "error_model": "numpy"}
"""Options for loops that must give the same to the bit everywhere."""

FAST: Final[dict[str, Any]] = {**EXACT, "fastmath": True}
"""Options for sums whose order does not matter."""


def compiled(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """Return the decorator that compiles a function with these options of `numba.njit`.

    The code is kept where numba keeps it. Where that does not work, be it a read-only install
    without a home, a full disk, a damaged file or another numba, it is compiled again.
    """

    def decorate(function: Callable[..., Any]) -> Any:
        dispatcher = njit(**options)(function)
        with suppress(Exception):
            cache = _Cache(function)
            if hasattr(dispatcher, "_cache"):
                dispatcher._cache = cache
        return dispatcher

    return decorate


class _Cache(FunctionCache):  # type: ignore[misc]
    """Numba's cache of a function's compiled code, of which a failure is no error."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__(function)
        self._cache_file = _SealedFiles(
            cache_path=self._impl.locator.get_cache_path(),
            filename_base=self._impl.filename_base,
            source_stamp=(self._impl.locator.get_source_stamp(), __version__),
        )

    def load_overload(self, *key: Any) -> Any:
        with suppress(Exception):
            return super().load_overload(*key)
        return None

    def save_overload(self, *key_and_code: Any) -> None:
        with suppress(Exception):
            super().save_overload(*key_and_code)


class _SealedFiles(IndexDataCacheFile):  # type: ignore[misc]
    """Numba's index and data files behind their checksums; what does not match is not there.

    Numba unpickles what it finds, and runs code in which a byte is flipped. Processes that compile
    at once may also give one name to two entries, so an entry holds its key.
    """

    def save(self, key: Any, data: Any) -> None:
        super().save(key, (key, data))

    def load(self, key: Any) -> Any:
        found, data = super().load(key) or (None, None)
        return data if found == key else None

    def _load_index(self) -> Any:
        version, stamp, overloads = _unsealed(self._index_path) or (None, None, {})
        is_fresh = (version, stamp) == (self._version, self._source_stamp)
        return overloads if is_fresh else {}

    def _save_index(self, overloads: Any) -> None:
        self._seal(self._index_path, (self._version, self._source_stamp, overloads))

    def _load_data(self, name: str) -> Any:
        return _unsealed(self._data_path(name))

    def _save_data(self, name: str, data: Any) -> None:
        self._seal(self._data_path(name), data)

    def _seal(self, path: str, content: Any) -> None:
        body = self._dump(content)
        with self._open_for_write(path) as file:
            file.write(hashlib.sha256(body).digest() + body)


def _unsealed(path: str) -> Any:
    """Return the content of a file behind its checksum; None if it cannot be used."""
    with suppress(Exception):  # another numba's content need not be one that can be unpickled
        sealed = Path(path).read_bytes()
        if hashlib.sha256(sealed[_DIGEST:]).digest() == sealed[:_DIGEST]:
            return pickle.loads(sealed[_DIGEST:])
    return None
