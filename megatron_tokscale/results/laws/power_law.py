"""Power laws of a run's mean losses, and the tail of its spectrum beside them.

Shapes: R resamples of the documents (the first is the data as they are).
"""

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import ArrayLike

from megatron_tokscale.core.arrays import Floats
from megatron_tokscale.results.estimate import Estimate, Undefined
from megatron_tokscale.results.verdict import Claim, ClaimTest

DRIFT: Final = 0.7
"""Largest lag-1 correlation of residuals that scatter about a law; at it, 40 probes count as 7 (our
choice)."""


CLAIM: Final = Claim.about("the spectrum's tail has the exponent of the loss", 0.0, 0.1)
"""Claim on the exponent of the tail minus that of the loss (the margin is our choice)."""


@dataclass(frozen=True)
class PowerLaw:
    """L(t) = floor + scale * t^-exponent, in nats, with intervals over the scatter of the probes.

    Attributes:
        floor: E, the loss at infinite time; 0 where the curve shows no floor.
        scale: B, in nats times the unit of time to the power of the exponent.
        exponent: alpha, which does not depend on the unit of time.
        exponent_se: standard error of the exponent.
        r2: R^2 of the log losses.
        autocorrelation: lag-1 correlation of the residuals, corrected for the fit's bias.
        n_points: number of probes fitted.
        from_time: first fitted time.
        to_time: last fitted time.
        converged: whether the optimiser reached a minimum, with the exponent not at a bound.
    """

    floor: Estimate
    scale: Estimate
    exponent: Estimate
    exponent_se: float
    r2: float
    autocorrelation: float
    n_points: int
    from_time: float
    to_time: float
    converged: bool

    @property
    def drifts(self) -> bool:
        """True if the residuals drift so slowly that the curve follows no power law."""
        return self.autocorrelation > DRIFT

    def predict(self, time: ArrayLike) -> Floats:
        """Return the law's loss at `time`, in nats."""
        t = np.asarray(time, dtype=np.float64)
        return np.asarray(self.floor.value + self.scale.value * t**-self.exponent.value)


@dataclass(frozen=True)
class LossPowerLaw:
    """Power law of a mean loss, with a second interval of floor and exponent: over documents.

    Attributes:
        law: the fitted law.
        floor_documents: the floor, over resamples of the documents, in nats.
        exponent_documents: the exponent, over resamples of the documents.
        exponent_R: the exponent of each resample; NaN where a resample has no loss.
    """

    law: PowerLaw
    floor_documents: Estimate
    exponent_documents: Estimate
    exponent_R: tuple[float, ...]


@dataclass(frozen=True)
class DatasetPowerLaw:
    """Power law of the mean loss of one dataset.

    Attributes:
        name: name of the dataset.
        power_law: the law, or why it is undefined.
    """

    name: str
    power_law: LossPowerLaw | Undefined


@dataclass(frozen=True)
class OtherStart:
    """Power law of the mean loss of all tokens, fitted from another time on.

    Attributes:
        start: first time that may be fitted.
        power_law: the law, or why it is undefined.
    """

    start: float
    power_law: LossPowerLaw | Undefined


@dataclass(frozen=True)
class TailExponent:
    """Tail of the drop-weighted spectrum: rho(x) = const * exp(-exponent * x) between two x.

    Attributes:
        exponent: the exponent a, over resamples of the documents; negative where the spectrum
            rises.
        exponent_R: a of each resample; NaN where its tail is empty.
        from_x: start of the tail.
        to_x: end of the tail.
        share: share of the drop of all events that lies in the tail.
    """

    exponent: Estimate
    exponent_R: tuple[float, ...]
    from_x: float
    to_x: float
    share: float


@dataclass(frozen=True)
class TailMinusLaw:
    """Exponent of the tail minus the exponent of the loss, paired by resample.

    Attributes:
        difference: tail minus loss, with a normal 95% interval from `se`.
        se: standard error over documents and, in quadrature, over the scatter of the probes.
        law: power law of the mean loss of all tokens from the start of the tail on.
    """

    difference: Estimate
    se: float
    law: LossPowerLaw

    @property
    def test(self) -> ClaimTest:
        """The test of `CLAIM`."""
        return ClaimTest.of(CLAIM, self.difference)
