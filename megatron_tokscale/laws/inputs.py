"""The part of a run's spectrum that laws are fitted to.

Shapes: K probe steps, R resamples of the documents (the first is the data as they are), D datasets,
C bins of x, F groups of tokens by frequency, I fine bins of frequency.
"""

import math
from dataclasses import dataclass

import numpy as np

from megatron_tokscale.core.arrays import Floats
from megatron_tokscale.results import SpectrumResult


@dataclass(frozen=True)
class Inputs:
    """The arrays of spectrum.npz that laws need, and what spectrum.json says of them.

    Attributes:
        time: what time is counted in.
        t_K: time of the probes.
        mean_loss_RK: mean loss in nats.
        mean_loss_RDK: by dataset.
        x_C: centres of the bins of x.
        drop_RC: drop of the learning events per bin, nats per token.
        margin: two typical widths of a transition: later than that before the last probe it has not
            shown its floor (our choice).
        frequency_loss_RFK: mean loss of deciles of the tokens by frequency.
        frequency_share_F: their shares of the tokens.
        frequency_I: frequency, as a share of all tokens.
        frequency_time_I: learning time of the tokens of that frequency.
        datasets: names of the datasets.
    """

    time: str
    t_K: Floats
    mean_loss_RK: Floats
    mean_loss_RDK: Floats
    x_C: Floats
    drop_RC: Floats
    margin: float
    frequency_loss_RFK: Floats
    frequency_share_F: Floats
    frequency_I: Floats
    frequency_time_I: Floats
    datasets: tuple[str, ...]

    @property
    def last_x(self) -> float:
        """Logarithm of the last time."""
        return math.log(self.t_K[-1])

    @staticmethod
    def from_spectrum(spectrum: SpectrumResult) -> "Inputs":
        """Take what laws need from the spectrum of a run."""
        summary, arrays = spectrum.summary, spectrum.arrays
        width = summary.common_width_x.value
        return Inputs(
            time=spectrum.time,
            t_K=np.exp(arrays.x_K),
            mean_loss_RK=arrays.mean_loss_RK,
            mean_loss_RDK=arrays.mean_loss_RDK,
            x_C=arrays.x_C,
            drop_RC=arrays.drop_RC.astype(np.float64),
            margin=2 * max(summary.bandwidth_x, width if math.isfinite(width) else 0.0),
            frequency_loss_RFK=arrays.frequency_loss_RFK,
            frequency_share_F=arrays.frequency_share_F,
            frequency_I=arrays.frequency_I,
            frequency_time_I=arrays.frequency_time_I,
            datasets=tuple(dataset.name for dataset in summary.datasets),
        )
