"""The states of a watched token, which a job measures and a fit determines.

A job takes them from the losses so far (`store.progress`), an analysis from the fitted curves
(`fit.states`). Each of the two says by which rule.
"""

import math
from enum import IntEnum
from typing import Final

BEGUN: Final = 0.2
"""Share of its fall from which on a token is under way, or that a forgotten token has lost (our
choice)."""
KNOWN_BELOW: Final = math.log(2)
"""Loss in nats below which a token that does not fall is known: probability 1/2 (our choice)."""


class TokenState(IntEnum):
    """The progress of a token's learning at a time."""

    UNKNOWN = -1
    KNOWN = 0
    UNMOVED = 1
    TO_COME = 2
    UNDER_WAY = 3
    LEARNED = 4
    FORGOTTEN = 5

    @property
    def label(self) -> str:
        """The name for people, e.g. "under way"."""
        return self.name.lower().replace("_", " ")


STATE_ORDER: Final = (
    TokenState.KNOWN,
    TokenState.LEARNED,
    TokenState.UNDER_WAY,
    TokenState.TO_COME,
    TokenState.UNMOVED,
    TokenState.FORGOTTEN,
)
"""The states in the order of every table and picture, of a picture from its bottom."""
