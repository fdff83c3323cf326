"""Bounds of the numbers that the options of the command line take."""

import argparse
import math
from collections.abc import Callable
from typing import Any, Final

_LARGEST: Final = 2**63 - 1
_ABOVE_ZERO: Final = math.ulp(0.0)
_BELOW_INFINITY: Final = 1e300

_BOUNDS: Final[dict[str, tuple[float, float]]] = {
    **dict.fromkeys(("seed", "sample", "until_sample", "min_tokens"), (0, _LARGEST)),
    **dict.fromkeys(("seq_length", "vocab_size"), (1, 2**31 - 1)),
    "eod": (0, 2**31 - 1),
    "resamples": (1, 10**6),
    "quantiles": (1, 10**4),
    "stages": (1, 10**5),
    "budget": (_ABOVE_ZERO, 1),
    "unlearned": (_ABOVE_ZERO, 1),
    "floor": (_ABOVE_ZERO, 1),
    "strength": (0, 1000),
    "window": (1 + 1e-9, 10**9),
    "max_change": (1 + 1e-9, 10**9),
}
"""By the option's name. Others take whole numbers from 1 on, or any above 0."""


def check_numbers(parser: argparse.ArgumentParser) -> None:
    """Let every option of a parser and its verbs that takes a number refuse one out of bounds."""
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
) -> Callable[[str], Any]:
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
    least = "above 0" if low == _ABOVE_ZERO else f"above {low:g}" if low % 1 else f"from {low:g}"
    return least if high in (_LARGEST, _BELOW_INFINITY) else f"{least} to {high:,}"
