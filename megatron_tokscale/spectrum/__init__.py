"""Learning-time spectra, and the tests of how much of the loss curve they explain."""

from megatron_tokscale.core.resampling import Units
from megatron_tokscale.results.estimate import Estimate
from megatron_tokscale.spectrum.density import Bins, LearningTimeSpectrum
from megatron_tokscale.spectrum.derivative import SlopeEstimator
from megatron_tokscale.spectrum.events import Events, events_of, learning_times
from megatron_tokscale.spectrum.evidence.forward import predict_forward
from megatron_tokscale.spectrum.evidence.group_curves import group_curve_losses
from megatron_tokscale.spectrum.evidence.locality import Widths
from megatron_tokscale.spectrum.evidence.order import learning_order
from megatron_tokscale.spectrum.evidence.reconstruction import (
    Comparison,
    Reconstruction,
    compare,
    reconstruct,
    slope_noise,
)
from megatron_tokscale.spectrum.evidence.run_transfer import transfer_run
from megatron_tokscale.spectrum.evidence.transfer import Alignment, TransferSums
from megatron_tokscale.spectrum.groups import groupings
from megatron_tokscale.spectrum.isotonic import threshold_times
from megatron_tokscale.spectrum.matrix import matrix_run
from megatron_tokscale.spectrum.run_axis import axis_run
from megatron_tokscale.spectrum.run_spectrum import spectrum_run
from megatron_tokscale.spectrum.scored_range import scored_range_of
from megatron_tokscale.spectrum.sums import DocumentSums, Resampled
from megatron_tokscale.spectrum.survival import product_limit

__all__ = [
    "Alignment",
    "Bins",
    "Comparison",
    "DocumentSums",
    "Estimate",
    "Events",
    "LearningTimeSpectrum",
    "Reconstruction",
    "Resampled",
    "SlopeEstimator",
    "TransferSums",
    "Units",
    "Widths",
    "axis_run",
    "compare",
    "events_of",
    "group_curve_losses",
    "groupings",
    "learning_order",
    "learning_times",
    "matrix_run",
    "predict_forward",
    "product_limit",
    "reconstruct",
    "scored_range_of",
    "slope_noise",
    "spectrum_run",
    "threshold_times",
    "transfer_run",
]
