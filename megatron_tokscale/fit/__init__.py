"""One sigmoid per token, many tokens at a time. Importing this room does not load torch."""

from megatron_tokscale.fit.axis import MIN_PROBES, WidthPrior
from megatron_tokscale.fit.run import fit_run, fits_path
from megatron_tokscale.fit.sigmoids import fit_sigmoids, shared_width
from megatron_tokscale.fit.table import (
    FitStatus,
    SigmoidFits,
    TokenClass,
    Transitions,
    read_metadata,
)

__all__ = [
    "MIN_PROBES",
    "FitStatus",
    "SigmoidFits",
    "TokenClass",
    "Transitions",
    "WidthPrior",
    "fit_run",
    "fit_sigmoids",
    "fits_path",
    "read_metadata",
    "shared_width",
]
