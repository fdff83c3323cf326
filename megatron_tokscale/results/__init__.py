"""The only reader of RUN/analysis; it accepts whole files that belong to the run as it is now."""

from megatron_tokscale.results.axis import AxisResult, read_axis
from megatron_tokscale.results.comparison import Comparison, read_comparison
from megatron_tokscale.results.fitted import FittedRun, non_finite_line, read_fit
from megatron_tokscale.results.forecast import Forecast, read_forecast
from megatron_tokscale.results.laws import LawsResult, read_laws
from megatron_tokscale.results.matrix import MatrixResult, read_matrix
from megatron_tokscale.results.spectrum import SpectrumResult
from megatron_tokscale.results.transfer import Transfer, read_transfer, transfers_to_keep

__all__ = [
    "AxisResult",
    "Comparison",
    "FittedRun",
    "Forecast",
    "LawsResult",
    "MatrixResult",
    "SpectrumResult",
    "Transfer",
    "non_finite_line",
    "read_axis",
    "read_comparison",
    "read_fit",
    "read_forecast",
    "read_laws",
    "read_matrix",
    "read_transfer",
    "transfers_to_keep",
]
