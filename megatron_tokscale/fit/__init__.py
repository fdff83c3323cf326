"""The fit of one sigmoid per token, many tokens at a time; its import does not load torch."""

from megatron_tokscale.fit.fits_file import read_metadata
from megatron_tokscale.fit.probe_axis import MIN_PROBES
from megatron_tokscale.fit.run_fit import fit_run
from megatron_tokscale.fit.sigmoids import fit_sigmoids
from megatron_tokscale.fit.states import states_at
from megatron_tokscale.fit.summary import FitSummary
from megatron_tokscale.fit.table import FitStatus, SigmoidFits, TokenClass, Transitions
from megatron_tokscale.store.token_state import TokenState

__all__ = [
    "MIN_PROBES",
    "FitStatus",
    "FitSummary",
    "SigmoidFits",
    "TokenClass",
    "TokenState",
    "Transitions",
    "fit_run",
    "fit_sigmoids",
    "read_metadata",
    "states_at",
]
