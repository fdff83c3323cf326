"""Learning-time spectra, and what they reconstruct of the loss curve."""

from megatron_tokscale.spectrum.density import Bins, LearningTimeSpectrum, events_of
from megatron_tokscale.spectrum.derivative import derivative_weights, measured_derivative
from megatron_tokscale.spectrum.kernel_sum import kernel_sum
from megatron_tokscale.spectrum.reconstruction import (
    Comparison,
    Reconstruction,
    compare,
    full_derivative,
    reconstruct,
)
from megatron_tokscale.spectrum.resampling import Estimate, Units
from megatron_tokscale.spectrum.run import spectrum_run
from megatron_tokscale.spectrum.sums import DocumentSums, Resampled
from megatron_tokscale.spectrum.widths import Widths, mean_curve_losses

__all__ = [
    "Bins",
    "Comparison",
    "DocumentSums",
    "Estimate",
    "LearningTimeSpectrum",
    "Reconstruction",
    "Resampled",
    "Units",
    "Widths",
    "compare",
    "derivative_weights",
    "events_of",
    "full_derivative",
    "kernel_sum",
    "mean_curve_losses",
    "measured_derivative",
    "reconstruct",
    "spectrum_run",
]
