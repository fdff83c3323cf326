"""The schema version of every file that this package writes, in one table.

A reader refuses a newer version with a line that names both, and an older one, where it is not read
any more, with a line that says which command makes the file again.
"""

from typing import Final

PROBE_SET_SCHEMA: Final = 2  # probe.safetensors
LOSSES_SCHEMA: Final = 1  # losses/step_*.safetensors
SAMPLES_SCHEMA: Final = 1  # samples/rank_*.bin
RUN_SCHEMA: Final = 3  # run.json
TOKENS_SCHEMA: Final = 1  # tokens.safetensors of an imported run
PLAN_SCHEMA: Final = 6  # plan.json
DECISIONS_SCHEMA: Final = 2  # replans.json
DATA_SCHEMA: Final = 4  # data.json
SPIKES_SCHEMA: Final = 1  # file of trace --spikes --out
SCORES_SCHEMA: Final = 3  # PREFIX.tokscale.safetensors
FITS_SCHEMA: Final = 3  # fits.parquet
FIT_SCHEMA: Final = 5  # fit.json
SPECTRUM_SCHEMA: Final = 9  # spectrum.json, reconstruction.json
TRANSFER_SCHEMA: Final = 6  # transfer.json
LAWS_SCHEMA: Final = 7  # laws.json
CURVE_LAWS_SCHEMA: Final = 1  # curve_laws.json
MATRIX_SCHEMA: Final = 1  # matrix.json
AXIS_SCHEMA: Final = 7  # axis.json
FORECAST_SCHEMA: Final = 1  # forecast.json
COMPARISON_SCHEMA: Final = 1  # compare.json
