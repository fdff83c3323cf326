"""The only reader of RUN/analysis: its files are whole, and belong to the run as it is now."""

from megatron_tokscale.results.extras import (
    AxisResult,
    known_transfers,
    read_axis,
    read_transfer,
)
from megatron_tokscale.results.fitted import (
    FittedRun,
    heading,
    non_finite,
    non_finite_line,
    read_fit,
)
from megatron_tokscale.results.laws import LawsResult, read_laws
from megatron_tokscale.results.spectrum import SpectrumResult

__all__ = [
    "AxisResult",
    "FittedRun",
    "LawsResult",
    "SpectrumResult",
    "heading",
    "known_transfers",
    "non_finite",
    "non_finite_line",
    "read_axis",
    "read_fit",
    "read_laws",
    "read_transfer",
]
