"""Arrays of a run's spectrum that laws are fitted to.

Shapes: K probe steps, R resamples of the documents (the first is the data as they are), D datasets,
C bins of x, F groups of tokens by frequency, I fine bins of frequency.
"""

import math
from dataclasses import dataclass
from typing import Self

import numpy as np

from megatron_tokscale.core.arrays import Floats, Integers
from megatron_tokscale.results import SpectrumResult


@dataclass(frozen=True)
class Inputs:
    """Arrays of spectrum.npz that laws need, with their description from spectrum.json.

    Attributes:
        t_K: time of the probes.
        mean_loss_RK: mean loss in nats.
        mean_loss_RDK: mean loss of each dataset in nats.
        x_C: centres of the bins of x.
        drop_RC: drop of the learning events in each bin, in nats per token.
        first_x: x at which the scored range starts.
        margin: two typical widths of a transition, in units of x. A transition whose midpoint is
            closer to the last probe has not reached its floor (our choice).
        frequency_loss_RFK: mean loss of the tokens of each decile by frequency, in nats.
        frequency_share_F: share of the tokens in each decile.
        frequency_I: frequency of the tokens in each fine bin, as a share of all tokens.
        frequency_time_I: learning time of the tokens in each fine bin.
        frequency_events_I: number of learning events in each fine bin.
        datasets: names of the datasets.
    """

    t_K: Floats
    mean_loss_RK: Floats
    mean_loss_RDK: Floats
    x_C: Floats
    drop_RC: Floats
    first_x: float
    margin: float
    frequency_loss_RFK: Floats
    frequency_share_F: Floats
    frequency_I: Floats
    frequency_time_I: Floats
    frequency_events_I: Integers
    datasets: tuple[str, ...]

    @property
    def last_x(self) -> float:
        """Natural logarithm of the last time."""
        return math.log(self.t_K[-1])

    @classmethod
    def from_spectrum(cls, spectrum: SpectrumResult) -> Self:
        """Take the arrays that laws need from the spectrum of a run."""
        summary, arrays = spectrum.summary, spectrum.arrays
        width = summary.common_width_x.value
        return cls(
            t_K=np.exp(arrays.x_K),
            mean_loss_RK=arrays.mean_loss_RK,
            mean_loss_RDK=arrays.mean_loss_RDK,
            x_C=arrays.x_C,
            drop_RC=arrays.drop_RC.astype(np.float64),
            first_x=summary.scored.from_x,
            margin=2 * max(summary.bandwidth_x, width if math.isfinite(width) else 0.0),
            frequency_loss_RFK=arrays.frequency_loss_RFK,
            frequency_share_F=arrays.frequency_share_F,
            frequency_I=arrays.frequency_I,
            frequency_time_I=arrays.frequency_time_I,
            frequency_events_I=arrays.frequency_events_I,
            datasets=tuple(dataset.name for dataset in summary.datasets),
        )
