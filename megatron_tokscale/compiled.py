"""How inner loops are compiled by numba."""

from typing import Any, Final

from numba import njit


def _nothing() -> None:
    pass


def _finds_a_cache() -> bool:
    """Whether numba finds a folder for compiled code: not in a read-only install with no home."""
    try:
        njit(cache=True)(_nothing)
    except RuntimeError:
        return False
    return True


EXACT: Final[dict[str, Any]] = {
    "nogil": True,
    "error_model": "numpy",
    "cache": _finds_a_cache(),
}
"""Options of `numba.njit` for loops that must give the same to the bit everywhere."""

FAST: Final[dict[str, Any]] = {**EXACT, "fastmath": True}
"""Options for sums whose order does not matter."""
