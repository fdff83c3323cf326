"""The seed of everything that is drawn, where none is given."""

from typing import Final

DEFAULT_SEED: Final = 1234
