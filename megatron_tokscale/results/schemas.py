"""Schema versions of the files in RUN/analysis, but for those of `fit`."""

from typing import Final

SPECTRUM_SCHEMA: Final = 3  # spectrum.json, reconstruction.json
TRANSFER_SCHEMA: Final = 3
LAWS_SCHEMA: Final = 3
AXIS_SCHEMA: Final = 3
