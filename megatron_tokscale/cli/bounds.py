"""Bounds of the numbers that the options of the command line take."""

import argparse
import math
from collections.abc import Callable
from typing import Final

_LARGEST: Final = 2**63 - 1  # largest 64-bit integer
_LARGEST_ID: Final = 2**31 - 1  # largest token id or length in tokens: int32 on disk
_ABOVE_ZERO: Final = math.ulp(0.0)
_ABOVE_ONE: Final = 1 + 1e-9
_BELOW_INFINITY: Final = 1e300  # so that products with counts stay finite

_BOUNDS: Final[dict[str, tuple[float, float]]] = {
    **dict.fromkeys(("seed", "sample", "until_sample", "from_sample", "min_tokens"), (0, _LARGEST)),
    **dict.fromkeys(("seq_length", "vocab_size"), (1, _LARGEST_ID)),
    "eod": (0, _LARGEST_ID),
    **dict.fromkeys(("size", "training_tokens"), (1, _LARGEST)),
    "threshold": (_ABOVE_ZERO, 1000),  # nats: far above any token's loss
    "training_seed": (0, _LARGEST),
    "resamples": (2, 10**6),  # one resample has no interval
    "quantiles": (1, 10**4),
    "stages": (1, 10**5),
    "interval": (1, 86_400),  # seconds
    "budget": (_ABOVE_ZERO, 1),
    "unlearned": (_ABOVE_ZERO, 1),
    "floor": (_ABOVE_ZERO, 1),
    "strength": (0, 1000),
    "window": (_ABOVE_ONE, 10**9),
    "max_change": (_ABOVE_ONE, 10**9),
}
"""Least and largest value of each option, by name. Others take whole numbers from 1, or
numbers above 0."""


def check_numbers(parser: argparse.ArgumentParser) -> None:
    """Make every numeric option of a parser and of its verbs refuse numbers out of bounds."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for verb in action.choices.values():
                check_numbers(verb)
        elif action.type is int:
            action.type = _within(int, "a whole number", *_BOUNDS.get(action.dest, (1, _LARGEST)))
        elif action.type is float:
            default = (_ABOVE_ZERO, _BELOW_INFINITY)
            action.type = _within(float, "a number", *_BOUNDS.get(action.dest, default))


def _within(
    kind: Callable[[str], float], what: str, low: float, high: float
) -> Callable[[str], float]:
    """Return a reader of numbers that refuses those below `low` or above `high`."""

    def read(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"'{text}' is not {what} {_range(low, high)}")
        return value

    return read


def _range(low: float, high: float) -> str:
    if low == _ABOVE_ZERO:
        least = "above 0"
    elif low == _ABOVE_ONE:
        least = "above 1"
    else:
        least = f"from {low:g}"
    return least if high in (_LARGEST, _BELOW_INFINITY) else f"{least} to {high:,}"
