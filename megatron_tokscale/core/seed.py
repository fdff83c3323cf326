"""The default seed of all random draws."""

from typing import Final

DEFAULT_SEED: Final = 1234
