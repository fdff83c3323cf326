"""Learning-time spectra, and what they reconstruct of the loss curve."""

from megatron_tokscale.spectrum.density import Events, LearningTimeSpectrum
from megatron_tokscale.spectrum.derivative import derivative_weights, measured_derivative
from megatron_tokscale.spectrum.reconstruction import (
    Comparison,
    Reconstruction,
    full_derivative,
    reconstruct,
)
from megatron_tokscale.spectrum.run import spectrum_run
from megatron_tokscale.spectrum.widths import mean_curve_losses, transition_widths

__all__ = [
    "Comparison",
    "Events",
    "LearningTimeSpectrum",
    "Reconstruction",
    "derivative_weights",
    "full_derivative",
    "mean_curve_losses",
    "measured_derivative",
    "reconstruct",
    "spectrum_run",
    "transition_widths",
]
